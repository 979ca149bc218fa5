import warnings
from collections import Counter
from dataclasses import asdict
from itertools import chain

import pytest
import torch
from data.helpers import (
    PAIRS,
    ROWS,
    WORDS,
    Recorder,
    attach,
    build_tokenizer,
    dropped,
    encoded,
    fit,
    indices,
    real,
    train_batches,
)
from lightning.pytorch import Trainer

from remax_lightning.data import DemonstrationDataModule, PreferenceDataModule, PromptDataModule
from remax_lightning.data.sources import load_tables
from remax_lightning.models.tokenizer import encode_prompt, encode_response

# batches


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
@pytest.mark.parametrize("bos", [False, True])
def test_prompt_batch(write, pad, bos):
    tokenizer = build_tokenizer(pad, bos)
    data = attach(PromptDataModule(train=write(ROWS), batch_size=5), tokenizer=tokenizer)
    for batch in train_batches(data):
        assert batch["prompt_mask"].dtype == torch.bool
        assert batch["prompt_index"].tolist() == batch["answer"]
        for row in range(5):
            source = ROWS[batch["answer"][row]]
            mask = batch["prompt_mask"][row]
            assert batch["prompt"][row] == source["prompt"]
            assert batch["response"][row] == source["response"]
            assert batch["prompt_ids"][row][mask].tolist() == encode_prompt(tokenizer, source["prompt"])
            assert mask.tolist() == sorted(mask.tolist())
            assert set(batch["prompt_ids"][row][~mask].tolist()) <= {tokenizer.pad_token_id}


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("as_chat", [False, True])
def test_demonstration_batch_is_the_prompt_of_the_rollout_and_a_response_under_loss(write, pad, bos, as_chat):
    tokenizer = build_tokenizer(pad, bos)
    arguments = {"validation": write(ROWS), "eval_batch_size": 7, "as_chat": as_chat}
    demonstrations = attach(DemonstrationDataModule(**arguments), tokenizer=tokenizer, stage="validate")
    prompts = attach(PromptDataModule(**arguments), tokenizer=tokenizer, stage="validate")
    for batch, asked in zip(demonstrations.val_dataloader(), prompts.val_dataloader(), strict=True):
        assert batch["loss_mask"].dtype == batch["attention_mask"].dtype == torch.bool
        for row in range(len(batch["input_ids"])):
            ids, loss_mask = batch["input_ids"][row], batch["loss_mask"][row]
            prompt = asked["prompt_ids"][row][asked["prompt_mask"][row]].tolist()
            response = encode_response(tokenizer, asked["prompt"][row], asked["response"][row])
            assert ids[batch["attention_mask"][row]].tolist() == prompt + response
            assert ids[loss_mask].tolist() == response
            assert loss_mask.nonzero().flatten().tolist() == list(range(len(prompt), len(prompt + response)))
            assert prompt.count(tokenizer.bos_token_id) == int(bos and not as_chat)


def test_preference_batch_has_the_chosen_rows_first(write):
    tokenizer = build_tokenizer(pad="</s>", bos=True)
    data = attach(
        PreferenceDataModule(validation=write(PAIRS), eval_batch_size=4), tokenizer=tokenizer, stage="validate"
    )
    batch = next(iter(data.val_dataloader()))
    rows = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in PAIRS[:4]]
    assert len(batch["input_ids"]) == 8
    for (prompt, response), ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        assert ids[mask].tolist() == encode_prompt(tokenizer, prompt) + encode_response(tokenizer, prompt, response)


def test_columns_named_like_the_batch_s_own_give_way(write):
    data = attach(PromptDataModule(train=write([{"prompt": "Hi", "prompt_index": "x", "prompt_ids": 1}]), batch_size=1))
    batch = train_batches(data)[0]
    assert batch["prompt_index"].tolist() == [0]
    assert batch["prompt_ids"].shape == (1, len(encode_prompt(build_tokenizer(), "Hi")))


# dropped rows


def test_one_warning_counts_the_dropped_rows_by_reason(write):
    rows = [*ROWS, {"prompt": ""}, {"prompt": None}, {"prompt": "fox " * 100}]
    data = PromptDataModule(train=write(rows), max_prompt_length=30)
    assert dropped(data) == ["train: dropped 3 of 23 rows (2 x empty prompt, 1 x prompt above 30 tokens)"]
    assert [example["prompt_index"] for example in data.examples["train"]] == list(range(20))


def test_no_warning_when_nothing_is_dropped(write):
    assert dropped(PromptDataModule(train=write(ROWS))) == []


def test_prompt_index_is_the_row_in_the_file_whatever_is_dropped(write):
    data = PromptDataModule(train=write([{"prompt": None}, ROWS[0], {"prompt": None}, ROWS[1]]), batch_size=2)
    dropped(data)
    batch = train_batches(data)[0]
    assert {index: ROWS.index({k: batch[k][row] for k in ROWS[0]}) for row, index in enumerate(indices([batch]))} == {
        1: 0,
        3: 1,
    }


def test_all_rows_dropped_is_an_error(write):
    with pytest.raises(ValueError, match=r"train: none of 2 rows can be used \(2 x empty prompt\).*\['prompt'\]"):
        attach(PromptDataModule(train=write([{"prompt": ""}, {"prompt": " "}])))


def test_different_prompts_are_dropped_and_counted(write):
    human = "\n\nHuman: {}\n\nAssistant: {}"
    same = [{"chosen": human.format(w, "yes"), "rejected": human.format(w, "no")} for w in WORDS]
    other = {"chosen": human.format("a", "yes"), "rejected": human.format("b", "no")}
    message = "train: dropped 1 of 21 rows (1 x chosen and rejected have different prompts)"
    assert dropped(PreferenceDataModule(train=write([*same, other]))) == [message]


def test_unknown_columns_list_what_was_found_and_what_to_set(write):
    path = write([{"text": "Hi", "label": 1}])
    for kind, argument in [
        (PromptDataModule, "prompt_column"),
        (DemonstrationDataModule, "response_column"),
        (PreferenceDataModule, "chosen_column"),
    ]:
        with pytest.raises(ValueError, match=rf"\['text', 'label'\].*{argument}"):
            attach(kind(train=path))


def test_column_that_is_not_there_is_named(write):
    with pytest.raises(ValueError, match=r"question.*set prompt_column"):
        attach(PromptDataModule(train=write(ROWS), prompt_column="question"))


# options


def test_long_prompts_truncate_keeps_the_last_tokens(write):
    long = "Name a red animal and a blue animal and a green animal"
    tokenizer = build_tokenizer()
    arguments = {"train": write([{"prompt": long}, ROWS[0]]), "max_prompt_length": 6, "batch_size": 1}
    data = attach(PromptDataModule(long_prompts="truncate", **arguments))
    assert list(data.examples["train"][0]["prompt_ids"]) == encode_prompt(tokenizer, long)[-6:]
    kept = PromptDataModule(long_prompts="drop", **arguments)
    assert dropped(kept) == ["train: dropped 1 of 2 rows (1 x prompt above 6 tokens)"]


def test_long_prompts_keep_start_keeps_the_first_tokens_and_their_text(write):
    long = "Name a red animal and a blue animal and a green animal"
    tokenizer = build_tokenizer()
    arguments = {"max_prompt_length": 6, "batch_size": 1, "long_prompts": "keep_start"}
    data = attach(PromptDataModule(train=write([{"prompt": long, "whole": long}, {"prompt": "Hi"}]), **arguments))
    first, second = data.examples["train"]
    assert list(first["prompt_ids"]) == encode_prompt(tokenizer, long)[:6]
    assert first["prompt"] == tokenizer.decode(first["prompt_ids"])
    assert first["whole"] == long
    assert (second["prompt"], list(second["prompt_ids"])) == ("Hi", encode_prompt(tokenizer, "Hi"))


def test_long_prompts_keep_start_drops_long_messages(write):
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("Hi", "Hi there " * 20)]
    data = PromptDataModule(train=write(rows), max_prompt_length=30, batch_size=1, long_prompts="keep_start")
    assert dropped(data) == ["train: dropped 1 of 2 rows (1 x prompt above 30 tokens)"]


def test_max_length_cuts_the_end_of_a_demonstration(write):
    tokenizer = build_tokenizer()
    row = {"prompt": "Hi", "response": "The red fox and the blue fox and the green fox"}
    data = attach(DemonstrationDataModule(train=write([row]), batch_size=1, max_prompt_length=5, max_length=9))
    batch = train_batches_of_one(data)
    prompt, response = encoded(tokenizer, row)
    assert batch["input_ids"][0].tolist() == (prompt + response)[:9]
    assert batch["loss_mask"].sum() == 9 - len(prompt)
    assert tokenizer.eos_token_id not in batch["input_ids"]


def train_batches_of_one(data):
    (batch,) = list(data.train_dataloader())
    return batch


def test_max_length_drops_a_pair(write):
    long = {**PAIRS[0], "rejected": "The red fox " * 30}
    data = PreferenceDataModule(train=write([*PAIRS, long]), max_prompt_length=20, max_length=50)
    assert dropped(data) == ["train: dropped 1 of 21 rows (1 x prompt and response above 50 tokens)"]


@pytest.mark.parametrize("kind", [DemonstrationDataModule, PreferenceDataModule])
def test_max_length_must_leave_room_for_a_response(kind):
    with pytest.raises(ValueError, match="max_length must exceed max_prompt_length"):
        kind(max_length=10, max_prompt_length=10)


def test_as_chat_applies_the_template_and_gives_messages_to_the_reward(write):
    data = attach(PromptDataModule(train=write([{"prompt": "Hi"}]), batch_size=1, as_chat=True))
    batch = train_batches_of_one(data)
    assert batch["prompt"] == [[{"role": "user", "content": "Hi"}]]
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert build_tokenizer().decode(batch["prompt_ids"][0]) == expected


def test_as_chat_takes_the_blank_off_the_response(write):
    pair = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}
    data = attach(PreferenceDataModule(train=write([pair]), batch_size=1, as_chat=True))
    text = build_tokenizer().decode(train_batches_of_one(data)["input_ids"][0])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"


def test_messages_without_template_are_refused(write):
    with pytest.raises(ValueError, match="chat_template"):
        attach(PromptDataModule(train=write(ROWS), as_chat=True), tokenizer=build_tokenizer(template=None))


def test_columns_can_be_named(write):
    rows = [{"q": f"Hi {word}", "good": "Yes", "bad": "No", "prompt": "wrong"} for word in WORDS]
    path, tokenizer = write(rows), build_tokenizer()
    prompts = attach(PromptDataModule(train=path, prompt_column="q"))
    assert prompts.examples["train"][0]["prompt"] == "Hi red"
    data = attach(DemonstrationDataModule(train=path, prompt_column="q", response_column="good"))
    expected = encode_prompt(tokenizer, "Hi red") + encode_response(tokenizer, "Hi red", "Yes")
    assert list(data.examples["train"][0]["input_ids"]) == expected
    pairs = attach(PreferenceDataModule(train=path, prompt_column="q", chosen_column="bad", rejected_column="good"))
    assert list(pairs.examples["train"][0]["rejected_ids"]) == expected


def test_limit_takes_the_first_training_rows_only(write):
    data = attach(PromptDataModule(train=write(ROWS), validation=write(ROWS, "v.jsonl"), limit=6, batch_size=2))
    assert sorted(indices(train_batches(data))) == list(range(6))
    assert len(data.examples["validation"]) == 20


def test_validation_fraction_is_cut_from_the_training_rows_by_seed(write):
    def cut(**arguments):
        data = attach(PromptDataModule(train=write(ROWS), batch_size=2, **arguments))
        return [set(indices(loader)) for loader in (data.train_dataloader(), data.val_dataloader())]

    train, validation = cut(validation_fraction=0.2)
    assert len(validation) == 4
    assert train | validation == set(range(20))
    assert not train & validation
    assert cut(validation_fraction=0.2) == [train, validation]
    assert cut(validation_fraction=0.2, seed=1)[1] != validation
    assert len(cut(validation_fraction=0.001)[1]) == 1
    assert attach(PromptDataModule(train=write(ROWS))).val_dataloader() == []


def test_validation_fraction_beside_validation_rows_is_refused(write):
    with pytest.raises(ValueError, match=r"validation_fraction=0.5 and validation exclude each other.*null"):
        PromptDataModule(train=write(ROWS), validation=write(ROWS[:3], "v.jsonl"), validation_fraction=0.5)


def test_validation_fraction_works_without_training(write):
    data = PromptDataModule(train=write(ROWS), validation_fraction=0.25, limit=8)
    assert len(attach(data, stage="validate").examples["validation"]) == 2


def test_predict_rows_default_to_the_test_rows(write):
    test, predict = write(ROWS[:3], "test.jsonl"), write(ROWS[:5], "predict.jsonl")
    assert len(attach(PromptDataModule(test=test), stage="predict").examples["predict"]) == 3
    assert len(attach(PromptDataModule(test=test, predict=predict), stage="predict").examples["predict"]) == 5


def test_eval_batch_size(write):
    path = write(ROWS)
    for size, expected in [(None, [4] * 5), (10, [10, 10]), (19, [10, 10]), (20, [20])]:
        data = attach(PromptDataModule(test=path, batch_size=4, eval_batch_size=size), stage="test")
        assert [len(batch["prompt"]) for batch in data.test_dataloader()] == expected


def test_tokenizer_can_be_named(write, tmp_path):
    build_tokenizer(bos=True).save_pretrained(tmp_path / "tokenizer")
    data = PromptDataModule(train=write(ROWS), tokenizer=str(tmp_path / "tokenizer"))
    data.setup("fit")
    assert data.examples["train"][0]["prompt_ids"][0] == 1
    assert attach(PromptDataModule(train=write(ROWS))).examples["train"][0]["prompt_ids"][0] != 1


def test_another_tokenizer_gives_other_tokens_of_the_same_file(write):
    path = write(ROWS)
    without, with_bos = (
        attach(PromptDataModule(train=path), tokenizer=build_tokenizer(bos=bos)).examples["train"][0]["prompt_ids"]
        for bos in (False, True)
    )
    assert list(with_bos) == [1, *without]


def test_without_any_tokenizer_is_an_error(write):
    with pytest.raises(ValueError, match="set tokenizer"):
        PromptDataModule(train=write(ROWS)).setup("fit")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("eval_batch_size", 0),
        ("max_prompt_length", 0),
        ("limit", 0),
        ("validation_fraction", 1.0),
        ("seed", -1),
    ],
)
def test_impossible_values_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must .*{value}"):
        PromptDataModule(**{name: value})


@pytest.mark.parametrize(("stage", "split"), [("fit", "train"), ("validate", "validation"), ("test", "test")])
def test_stage_without_rows_is_an_error(stage, split):
    with pytest.raises(ValueError, match=f"no rows for {split}; set {split}"):
        attach(PromptDataModule(), stage=stage)


def test_too_few_rows_for_one_batch_is_an_error(write):
    data = attach(PromptDataModule(train=write(ROWS), batch_size=11), world_size=2)
    with pytest.raises(ValueError, match=r"20 usable rows.*batch_size=11 on each of 2"):
        data.train_dataloader()


def test_second_split_over_the_processes_is_refused(write):
    data = PromptDataModule(train=write(ROWS))
    assert Trainer(accelerator="cpu", logger=False)._accelerator_connector.use_distributed_sampler
    attach(data, distributed_sampler=True)
    with pytest.raises(ValueError, match="set use_distributed_sampler to false"):
        attach(data, world_size=2, distributed_sampler=True)


# order


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_two_ranks_share_what_one_reads(write, batch_size):
    path = write(ROWS)
    alone = attach(PromptDataModule(train=path, batch_size=2 * batch_size))
    ranks = [attach(PromptDataModule(train=path, batch_size=batch_size), rank, 2) for rank in (0, 1)]
    for _ in range(3):
        whole, first, second = (train_batches(data) for data in (alone, *ranks))
        assert len(whole) == len(first) == len(second) == 20 // (2 * batch_size)
        for batch, left, right in zip(whole, first, second, strict=True):
            assert indices([batch])[::2] == indices([left])
            assert indices([batch])[1::2] == indices([right])
        assert set(Counter(indices(whole)).values()) == {1}


def test_order_depends_on_seed_and_epoch_only(write):
    def epochs(**arguments):
        data = attach(PromptDataModule(train=write(ROWS), **arguments))
        return [indices(train_batches(data)) for _ in range(2)]

    first, second = epochs(seed=3, batch_size=4)
    torch.manual_seed(1234)
    assert epochs(seed=3, batch_size=4) == [first, second]
    assert epochs(seed=3, batch_size=10) == [first, second]
    assert first != second
    assert epochs(seed=4, batch_size=4)[0] != first


def test_incomplete_last_batch_is_left_out(write):
    data = attach(PromptDataModule(train=write(ROWS), batch_size=6))
    assert [len(batch["prompt"]) for batch in train_batches(data)] == [6, 6, 6]
    assert asdict(data.position) == {"epoch": 1, "rows": 0}


@pytest.mark.parametrize(("num_rows", "batch_size"), [(20, 8), (9, 4), (9, 1), (13, 2), (3, 1), (2, 8), (5, 2)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_reads_each_row_once_in_as_many_batches_on_each_rank(write, num_rows, batch_size, world_size):
    path = write(ROWS[:num_rows])
    loaders = [
        attach(
            PromptDataModule(test=path, eval_batch_size=batch_size), rank, world_size, stage="test"
        ).test_dataloader()
        for rank in range(world_size)
    ]
    batches = [list(loader) for loader in loaders]
    assert [indices(own) for own in batches] == [list(range(rank, num_rows, world_size)) for rank in range(world_size)]
    assert len({len(own) for own in batches}) == 1
    assert len(loaders[0]) == len(batches[0])
    largest = max(len(batch["prompt"]) for own in batches for batch in own)
    assert largest <= max(batch_size, world_size)


def test_fewer_rows_than_processes_is_an_error(write):
    data = attach(PromptDataModule(test=write(ROWS[:1])), world_size=2, stage="test")
    with pytest.raises(ValueError, match="1 usable rows for 2 ranks"):
        data.test_dataloader()


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_leaves_the_global_generator_alone(write, workers):
    data = attach(PromptDataModule(train=write(ROWS), validation_fraction=0.2, batch_size=4, num_workers=workers))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert len(list(data.train_dataloader())) == 4
    assert len(list(data.val_dataloader())) == 1
    assert torch.equal(torch.get_rng_state(), before)


# position


def test_position_carries_over_to_another_number_of_processes(write):
    path = write(ROWS)
    whole = attach(PromptDataModule(train=path, batch_size=4))
    expected = indices(train_batches(whole)) + indices(train_batches(whole))
    ranks = [attach(PromptDataModule(train=path, batch_size=4), rank, 2) for rank in (0, 1)]
    loaders = [iter(data.train_dataloader()) for data in ranks]
    first = [
        indices([data.on_before_batch_transfer(next(loader), 0)]) for data, loader in zip(ranks, loaders, strict=True)
    ]
    state = ranks[0].state_dict()
    assert state == ranks[1].state_dict()
    assert asdict(ranks[1].position) == {"epoch": 0, "rows": 8}
    alone = attach(PromptDataModule(train=path, batch_size=4))
    alone.load_state_dict(state)
    rest = indices(train_batches(alone))  # as many rows as an epoch has
    interleaved = [index for pair in zip(*first, strict=True) for index in pair]
    assert interleaved + rest == expected[:28]
    assert asdict(alone.position) == {"epoch": 1, "rows": 8}


def test_position_too_close_to_the_end_starts_the_next_epoch(write):
    path = write(ROWS)
    whole = attach(PromptDataModule(train=path, batch_size=10))
    train_batches(whole)
    data = attach(PromptDataModule(train=path, batch_size=10))
    data.load_state_dict({"epoch": 0, "rows": 12})
    assert indices(train_batches(data)) == indices(train_batches(whole))
    assert asdict(data.position) == {"epoch": 2, "rows": 0}


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_sees_the_rows_of_the_uninterrupted_one(write, tmp_path, workers):
    def data():
        return PromptDataModule(
            train=write(ROWS), validation=write(ROWS[:3], "v.jsonl"), batch_size=4, num_workers=workers, seed=7
        )

    whole = fit(data(), tmp_path / "whole", steps=12)
    assert len(whole.seen) == 12
    for step in (2, 5, 8, 10) if workers == 0 else (5,):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*dataloader is not resumable.*")
            resumed = fit(
                data(), tmp_path / f"from{step}", steps=12, ckpt_path=tmp_path / "whole" / f"step={step}.ckpt"
            )
        assert resumed.seen == whole.seen[step:]


def test_run_stopped_early_and_resumed(write, tmp_path):
    path = write(ROWS)
    whole = fit(PromptDataModule(train=path, batch_size=4), tmp_path / "whole", steps=8)
    start = fit(PromptDataModule(train=path, batch_size=4), tmp_path / "start", steps=5)
    checkpoint = tmp_path / "start" / "step=5.ckpt"
    rest = fit(PromptDataModule(train=path, batch_size=4), tmp_path / "rest", steps=8, ckpt_path=checkpoint)
    assert start.seen + rest.seen == whole.seen


def test_resume_between_validations(write, tmp_path):
    def run(name, **options):
        data = PromptDataModule(train=write(ROWS), validation=write(ROWS[:6], "v.jsonl"), batch_size=2)
        return fit(data, tmp_path / name, epochs=2, val_check_interval=3, **options)

    whole = run("whole")
    assert sorted(map(tuple, whole.seen[:10])) != sorted(map(tuple, whole.seen[10:]))
    for step in (3, 4, 9, 10, 11):
        assert run(f"from{step}", ckpt_path=tmp_path / "whole" / f"step={step}.ckpt").seen == whole.seen[step:]


def test_second_fit_of_a_module_begins_anew_with_another_trainer(write, tmp_path):
    data = PromptDataModule(train=write(ROWS), batch_size=4)
    assert fit(data, tmp_path / "a", steps=7).seen == fit(data, tmp_path / "b", steps=7).seen


def test_limited_epochs_go_on_in_the_same_permutation(write, tmp_path):
    recorder = fit(PromptDataModule(train=write(ROWS), batch_size=4), tmp_path, epochs=3, limit_train_batches=2)
    assert len(recorder.seen) == 6
    assert sorted(chain.from_iterable(recorder.seen[:5])) == list(range(20))


def test_trainer_validates_tests_and_predicts_every_row(write, tmp_path):
    path = write(ROWS[:11])
    data = PromptDataModule(validation=path, test=path, eval_batch_size=4)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "use_distributed_sampler": False}
    for run in ("validate", "test", "predict"):
        recorder = Recorder()
        getattr(Trainer(default_root_dir=tmp_path, **options), run)(recorder, datamodule=data)
        assert list(chain.from_iterable(recorder.evaluated)) == list(range(11))


def test_command_line_gives_every_option(write):
    from jsonargparse import ArgumentParser

    for kind in (DemonstrationDataModule, PreferenceDataModule):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(kind, "data")
        values = parser.parse_args(["--data.train", "a.jsonl", "--data.max_prompt_length=7", "--data.max_length=9"])
        assert parser.instantiate(values).data.max_prompt_length == 7
        text = " ".join(parser.format_help().split())
        assert "Longest prompt, in tokens" in text
        assert "Longest prompt and response together" in text
        with pytest.raises(Exception, match="max_lenght"):
            parser.parse_args(["--data.max_lenght=3"])


# real files


@pytest.mark.parametrize(
    ("kind", "name", "num_rows", "limit"),
    [
        (PromptDataModule, "hh_harmless_train.jsonl.gz", 1800, None),
        (DemonstrationDataModule, "hh_harmless_train.jsonl.gz", 1800, 500),
        (PreferenceDataModule, "hh_harmless_train.jsonl.gz", 1800, 500),
        (PromptDataModule, "alpaca_eval_preferences_train.jsonl.gz", 5000, 1000),
        (PreferenceDataModule, "alpaca_eval_preferences_train.jsonl.gz", 5000, 500),
        (PromptDataModule, "gsm8k_train.jsonl.gz", 7473, 1000),
        (DemonstrationDataModule, "gsm8k_train.jsonl.gz", 7473, 500),
        (PromptDataModule, "alpaca_eval_reference_outputs.json", 805, None),
        (DemonstrationDataModule, "alpaca_eval_reference_outputs.json", 805, None),
    ],
)
@pytest.mark.filterwarnings("ignore:.*dropped")
def test_real_files(kind, name, num_rows, limit):
    limits = (
        {"max_prompt_length": 4000} if kind is PromptDataModule else {"max_prompt_length": 4000, "max_length": 9000}
    )
    data = attach(kind(train=real(name), limit=limit, **limits))
    num_examples = len(data.examples["train"])
    assert sum(len(table.rows) for table in load_tables(real(name))) == num_rows
    assert 0.95 * (limit or num_rows) <= num_examples <= (limit or num_rows)
    assert len(data.train_dataloader()) == num_examples // 8
    assert len(train_batches(data)) == num_examples // 8


@pytest.mark.filterwarnings("ignore:.*dropped")
def test_real_chat_preferences():
    data = attach(PreferenceDataModule(train=real("hh_harmless_train.jsonl.gz"), as_chat=True, limit=50, batch_size=4))
    for batch in list(data.train_dataloader()):
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            text = data.encoder.tokenizer.decode(ids[mask])
            assert text.startswith("<|im_start|>user\n")
            assert text.endswith("<|im_end|>")
            assert "Human:" not in text


@pytest.mark.parametrize(
    ("name", "columns", "num_rows"),
    [
        ("mt_bench_questions.jsonl", {"question_id", "category", "turns"}, 80),
        ("alpaca_eval_reference_outputs.json", {"instruction", "output", "generator", "dataset"}, 805),
    ],
)
def test_real_benchmarks_keep_their_columns(name, columns, num_rows):
    source = [row for table in load_tables(real(name)) for row in table.rows]
    data = attach(PromptDataModule(test=real(name), eval_batch_size=64, max_prompt_length=4000), stage="test")
    batches = list(data.test_dataloader())
    assert indices(batches) == list(range(num_rows))
    for column in columns:
        assert [value for batch in batches for value in batch[column]] == [row[column] for row in source]
    prompts = [row["turns"][0] if "turns" in row else row["instruction"] for row in source]
    assert [prompt for batch in batches for prompt in batch["prompt"]] == prompts
