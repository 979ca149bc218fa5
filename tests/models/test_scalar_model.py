import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaModel, PreTrainedModel

from remax_lightning.functional.sequence import right_pad
from remax_lightning.models.scalar_model import load_reward_model, sequence_scores
from remax_lightning.models.source import ModelSource

ARCHITECTURES = ["llama", "qwen2", "gpt2", "opt", "gemma", "mistral", "gemma2", "bert"]
ROWS = [[3, 4, 5, 1], [6, 7, 8, 9, 10, 11, 12, 0], [13, 1, 1], [14]]


def load(path: str, trained: bool = True) -> PreTrainedModel:
    return load_reward_model(ModelSource(path=path), trained=trained).eval()


@torch.no_grad()
def alone(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """Scores of unpadded rows; without a pad token, transformers reads the last token."""
    kept, model.config.pad_token_id = model.config.pad_token_id, None
    scores = torch.stack([model(torch.tensor([row])).logits[0, 0] for row in rows])
    model.config.pad_token_id = kept
    return scores


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pad", [0, 1, 20])
def test_scores_are_read_at_the_last_token(tmp_path: Path, architecture: str, pad: int) -> None:
    path = tiny.save_reward_model(tmp_path / "reward", architecture, vocab_size=tiny.VOCABULARY)
    model = load(path)
    scores = sequence_scores(model, *right_pad(ROWS, pad))
    assert scores.shape == (4,)
    torch.testing.assert_close(scores, alone(model, ROWS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad_token_id", [None, 0, 1])
def test_the_configured_pad_token_stays(tmp_path: Path, pad_token_id: int | None) -> None:
    model = load(tiny.save_reward_model(tmp_path / "reward"))
    model.config.pad_token_id = pad_token_id
    scores = sequence_scores(model, *right_pad(ROWS, 0))
    assert model.config.pad_token_id == pad_token_id
    torch.testing.assert_close(scores, alone(model, ROWS), atol=1e-5, rtol=1e-5)
    with pytest.raises((IndexError, RuntimeError)):
        sequence_scores(model, torch.tensor([[3, 4]]), torch.ones(1, 3))
    assert model.config.pad_token_id == pad_token_id


def test_scores_have_gradients(tmp_path: Path) -> None:
    model = load(tiny.save_reward_model(tmp_path / "reward"))
    sequence_scores(model, *right_pad(ROWS, 0)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_scores_are_float32(tmp_path: Path) -> None:
    path = tiny.save_reward_model(tmp_path / "reward")
    model = load_reward_model(ModelSource(path=path, dtype="bfloat16"), trained=True)
    assert sequence_scores(model, *right_pad(ROWS, 0)).dtype == torch.float32


def test_a_head_is_added_to_a_language_model(tmp_path: Path) -> None:
    path = tiny.save_model(tmp_path / "policy")
    model = load(path, trained=False)
    assert model.config.num_labels == 1
    body = {name: value for name, value in tiny.weights(model).items() if name.startswith("model.")}
    policy = tiny.weights(tiny.AutoModelForCausalLM.from_pretrained(path))
    assert body
    assert all(torch.equal(value, policy[name]) for name, value in body.items())


def test_a_trained_head_is_kept(tmp_path: Path) -> None:
    path = tiny.save_reward_model(tmp_path / "reward")
    assert tiny.are_equal(tiny.weights(load(path, trained=True)), tiny.weights(load(path, trained=False)))


def test_a_configuration_gives_random_weights_with_one_label(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "words")
    config = {"model_type": "llama", **tiny.SHAPES["llama"]}
    model = load_reward_model(ModelSource(config=config, tokenizer=str(tmp_path / "words")), trained=False)
    assert model.config.num_labels == 1
    assert sequence_scores(model, *right_pad(ROWS, 0)).shape == (4,)


def test_a_missing_head_and_two_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has one label, but .* has 3"):
        load(tiny.save_reward_model(tmp_path / "three", num_labels=3))
    with pytest.raises(ValueError, match=r"it lacks .*score.weight"):
        load(tiny.save_model(tmp_path / "policy", num_labels=1))


def save_ultrarm(folder: Path, kind: str) -> tuple[LlamaModel, nn.Linear]:
    """A folder as that of UltraRM-13B: a Llama, a head of its own name, and a configuration without labels."""
    torch.manual_seed(0)
    words = tiny.tokenizer()
    config = LlamaConfig(**tiny.SHAPES["llama"], vocab_size=len(words) + 1, bos_token_id=1, eos_token_id=1)
    backbone, head = LlamaModel(config).eval(), nn.Linear(config.hidden_size, 1, bias=False)
    values = {name: value for name, value in config.to_dict().items() if name not in ("num_labels", "id2label")}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**values, "architectures": ["LlamaRewardModel"]}))
    words.save_pretrained(folder)
    weights = {f"model.{name}": value for name, value in backbone.state_dict().items()}
    weights["regression_head.weight"] = head.weight.detach()
    if kind == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    return backbone, head


@torch.no_grad()
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_regression_head_is_read(tmp_path: Path, kind: str) -> None:
    backbone, head = save_ultrarm(tmp_path / "ultrarm", kind)
    model = load(str(tmp_path / "ultrarm"))
    assert torch.equal(model.score.weight, head.weight)
    expected = [head(backbone(torch.tensor([row])).last_hidden_state[0, -1])[0] for row in ROWS]
    torch.testing.assert_close(sequence_scores(model, *right_pad(ROWS, 0)), torch.stack(expected))
    model.save_pretrained(tmp_path / "exported")
    exported, loading = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "exported", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert tiny.are_equal(tiny.weights(exported), tiny.weights(model))


def test_no_other_weight_of_a_wrong_shape_is_taken(tmp_path: Path) -> None:
    path = tiny.save_reward_model(tmp_path / "reward")
    larger = tiny.save_reward_model(tmp_path / "larger", intermediate_size=56)
    with pytest.raises(ValueError, match=r"reward does not fit its config.json: .*mlp.* is .*48.*, expected .*56"):
        load_reward_model(ModelSource(path=path, architecture=larger), trained=False)


def test_three_labels_are_no_start_of_a_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has one label, but .* has 3"):
        load(tiny.save_reward_model(tmp_path / "three", num_labels=3), trained=False)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_one_label_of_several_is_read(tmp_path: Path, architecture: str) -> None:
    path = tiny.save_reward_model(tmp_path / "two", architecture, num_labels=2)
    model = load_reward_model(ModelSource(path=path), trained=True, label=1).eval()
    whole = AutoModelForSequenceClassification.from_pretrained(path).eval()
    whole.config.pad_token_id = None
    for label in (0, 1):
        scores = sequence_scores(model, *right_pad(ROWS, 0), label=label)
        expected = [whole(torch.tensor([row])).logits[0, label] for row in ROWS]
        torch.testing.assert_close(scores, torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_that_there_is_not_is_refused(tmp_path: Path, label: int) -> None:
    path = tiny.save_reward_model(tmp_path / "two", num_labels=2)
    with pytest.raises(ValueError, match=rf"label must be one of the 2 of .*two, from 0, got {label}"):
        load_reward_model(ModelSource(path=path), trained=True, label=label)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="embeds only 40"):
        load(tiny.save_reward_model(tmp_path / "reward", vocab_size=40))
