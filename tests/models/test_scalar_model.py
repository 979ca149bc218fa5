from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

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


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="embeds only 40"):
        load(tiny.save_reward_model(tmp_path / "reward", vocab_size=40))
