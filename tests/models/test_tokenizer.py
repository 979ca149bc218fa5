import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from remax_lightning.models.tokenizer import encode_prompt, encode_response, load_tokenizer

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SENTENCES = ["The fox lives in the forest.", "Where does the owl live?", "Human: hello\n\nAssistant: hi there"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHANGED_BY_RESPONSE = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
CHAT = [{"role": "user", "content": "Where does the fox live?"}]
ANSWER = "The fox lives in the forest."


def build(template=None, special_tokens=None, pad="<pad>", eos="</s>"):
    """Tiny byte-level BPE; `special_tokens` is the post-processor's pattern, such as `<s> $A`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    if special_tokens:
        pairs = [(token, core.token_to_id(token)) for token in ("<s>", "</s>")]
        core.post_processor = processors.TemplateProcessing(single=special_tokens, special_tokens=pairs)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


def test_text_prompt_without_special_tokens_is_its_tokens():
    tokenizer = build()
    assert tokenizer.decode(encode_prompt(tokenizer, ANSWER)) == ANSWER


@pytest.mark.parametrize("text", [ANSWER, "<s>" + ANSWER])
@pytest.mark.parametrize("pattern", ["<s> $A", "<s> $A </s>"])
def test_text_prompt_has_one_bos_and_no_trailing_special_token(text, pattern):
    tokenizer = build(special_tokens=pattern)
    assert tokenizer.decode(encode_prompt(tokenizer, text)) == "<s>" + ANSWER


def test_trailing_special_token_alone_is_left_out():
    tokenizer = build(special_tokens="$A </s>")
    assert tokenizer.decode(encode_prompt(tokenizer, ANSWER)) == ANSWER


def test_bos_that_nobody_adds_stays_single_in_the_text():
    tokenizer = build()
    assert tokenizer.decode(encode_prompt(tokenizer, "<s>" + ANSWER)) == "<s>" + ANSWER


def test_rendered_messages_have_no_doubled_bos():
    tokenizer = build(LLAMA, special_tokens="<s> $A </s>")
    assert tokenizer.decode(encode_prompt(tokenizer, CHAT)) == "<s>[INST] Where does the fox live? [/INST]"


def test_messages_without_template_are_refused():
    with pytest.raises(ValueError, match="chat_template"):
        encode_prompt(build(), CHAT)


def test_text_response_ends_with_one_eos_and_has_no_bos():
    tokenizer = build(special_tokens="<s> $A </s>")
    assert tokenizer.decode(encode_response(tokenizer, "Q:", " " + ANSWER)) == f" {ANSWER}</s>"
    assert tokenizer.decode(encode_response(tokenizer, "Q:", ANSWER + "</s>")) == f"{ANSWER}</s>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ANSWER + "<|im_end|>"),
        (LLAMA, f" {ANSWER} </s>"),
        (NO_END, ANSWER + "\n</s>"),
        (CHANGED_BY_RESPONSE, ANSWER + "</s>"),
    ],
)
def test_chat_response_is_the_template_s_up_to_its_end_token(template, expected):
    tokenizer = build(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert tokenizer.decode(encode_response(tokenizer, CHAT, ANSWER)) == expected


def test_special_token_inside_a_response_does_not_cut_it():
    tokenizer = build(NO_END)
    ids = encode_response(tokenizer, CHAT, "The <s> fox")
    assert tokenizer.decode(ids) == "The <s> fox\n</s>"


def test_pad_equal_to_eos_keeps_the_eos():
    tokenizer = build(pad="</s>")
    assert encode_response(tokenizer, "Q:", ANSWER)[-1] == tokenizer.pad_token_id == tokenizer.eos_token_id


def test_response_without_any_end_token_is_refused():
    with pytest.raises(ValueError, match="no eos token"):
        encode_response(build(eos=None), "Q:", ANSWER)


def test_load_pads_with_eos_and_replaces_the_template(tmp_path):
    build(CHATML, pad=None).save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "other.jinja"
    file.write_text(LLAMA)
    plain = load_tokenizer(str(tmp_path / "tokenizer"))
    assert (plain.pad_token, plain.chat_template) == ("</s>", CHATML)
    assert load_tokenizer(str(tmp_path / "tokenizer"), NO_END).chat_template == NO_END
    assert load_tokenizer(str(tmp_path / "tokenizer"), str(file)).chat_template == LLAMA


def test_load_keeps_a_pad_token(tmp_path):
    build().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<pad>"


def test_load_without_pad_and_eos_is_refused(tmp_path):
    build(pad=None, eos=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a pad nor an eos"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere", "~/nowhere", "runs/sft/hf"])
def test_missing_folder_is_named(path):
    with pytest.raises(FileNotFoundError, match=r"does not exist; .* name of a tokenizer"):
        load_tokenizer(path)
