from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from remax_lightning.data import PreferenceDataModule
from remax_lightning.models.export import export
from remax_lightning.models.source import ModelSource
from remax_lightning.modules import RewardModel
from remax_lightning.rewards import ModelReward

ROWS = [
    {"prompt": "Say it", "chosen": " now.", "rejected": " no"},
    {"prompt": "b", "chosen": " y", "rejected": " and a longer answer"},
    {"prompt": "A much longer prompt it is", "chosen": " x", "rejected": " q"},
]
SEPARABLE = [{"prompt": word, "chosen": " yes", "rejected": " no"} for word in ("one", "two", "three", "four")]


@pytest.fixture
def scored(tmp_path: Path) -> str:
    return tiny.save_reward_model(tmp_path / "scored")


def preferences(folder: Path, rows: list[dict[str, str]] = ROWS, **options: Any) -> PreferenceDataModule:
    path = tiny.write_rows(folder / "preferences.jsonl", rows)
    return PreferenceDataModule(**{"train": path, "batch_size": len(rows), **options})


def reward_model(path: str, **options: Any) -> RewardModel:
    defaults: dict[str, Any] = {"optimizer": tiny.sgd(), "lr_schedule": "constant", "max_grad_norm": None}
    return RewardModel(model=ModelSource(path=path), **{**defaults, **options})


def score(model: torch.nn.Module, words: Any, prompt: str, response: str) -> Tensor:
    """Score of one conversation, unpadded, by transformers; without a pad token it reads the last one, eos or not."""
    model.config.pad_token_id = None
    ids = [*words(prompt)["input_ids"], *words(response)["input_ids"], words.eos_token_id]
    return model(torch.tensor([ids])).logits[0, 0]


def by_hand(path: str) -> tuple[list[float], float, dict[str, Tensor]]:
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    words = AutoTokenizer.from_pretrained(path)
    margins = [
        score(model, words, row["prompt"], row["chosen"]) - score(model, words, row["prompt"], row["rejected"])
        for row in ROWS
    ]
    loss = torch.stack([torch.log1p(torch.exp(-margin)) for margin in margins]).mean()
    loss.backward()
    gradient = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return [float(margin) for margin in margins], float(loss), gradient


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_loss_and_update_are_those_by_hand(tmp_path: Path, architecture: str, pad_is_eos: bool) -> None:
    path = tiny.save_reward_model(tmp_path / "scored", architecture, pad_is_eos=pad_is_eos)
    module = reward_model(path)
    module.configure_model()
    before = tiny.weights(module.model)
    history = tiny.fit(module, preferences(tmp_path), tmp_path)
    margins, loss, gradient = by_hand(path)
    assert history["train/loss"] == [pytest.approx(loss, abs=1e-4)]
    assert history["train/accuracy"] == [pytest.approx(sum(margin > 0 for margin in margins) / len(margins))]
    moved = tiny.difference(before, tiny.weights(module.model))
    tiny.assert_close({name: moved[name] for name in gradient}, gradient, atol=2e-6)


def test_the_update_does_not_depend_on_the_micro_batch(scored: str, tmp_path: Path) -> None:
    results = []
    for size in (None, 1, 2):
        module = reward_model(scored, micro_batch_size=size)
        metrics = tiny.fit(module, preferences(tmp_path), tmp_path).steps[0]
        results.append((metrics["train/loss"], metrics["train/accuracy"], tiny.weights(module.model)))
    for loss, accuracy, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-5)
        assert accuracy == pytest.approx(results[0][1])
        tiny.assert_close(weights, results[0][2], atol=2e-6, rtol=0)


def test_separable_pairs_are_learned_from_a_language_model(tmp_path: Path) -> None:
    module = reward_model(
        tiny.save_model(tmp_path / "policy"),
        optimizer=lambda ps: torch.optim.AdamW(ps, lr=3e-3),
        max_grad_norm=1.0,
    )
    data = preferences(tmp_path, SEPARABLE)
    data.validation = data.train
    history = tiny.fit(module, data, tmp_path, steps=20)
    assert history["train/accuracy"][-1] == 1.0
    assert history["train/loss"][-1] < 0.1
    result = tiny.trainer(tmp_path).validate(module, data, verbose=False)[0]
    assert result["val/accuracy"] == 1.0
    assert result["val/margin"] > 2
    assert set(result) == {"val/loss", "val/accuracy", "val/margin"}


def test_validation_does_not_depend_on_the_batch_size(scored: str, tmp_path: Path) -> None:
    margins, loss, _ = by_hand(scored)
    for size in (1, 2, 3):
        data = preferences(tmp_path, eval_batch_size=size)
        data.validation = data.train
        result = tiny.trainer(tmp_path).validate(reward_model(scored), data, verbose=False)[0]
        assert result["val/loss"] == pytest.approx(loss, abs=1e-4)
        assert result["val/margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
        assert result["val/accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / len(margins))


def test_ties_count_one_half(tmp_path: Path, scored: str) -> None:
    rows = [{"prompt": "a", "chosen": " same", "rejected": " same"}]
    data = preferences(tmp_path, rows)
    history = tiny.fit(reward_model(scored), data, tmp_path)
    assert history["train/accuracy"] == [0.5]


def test_predict_gives_a_row_for_each_pair(scored: str, tmp_path: Path) -> None:
    data = preferences(tmp_path, eval_batch_size=2)
    data.predict = data.train
    predictions = tiny.trainer(tmp_path).predict(reward_model(scored), data)
    assert predictions is not None
    rows = [row for batch in predictions for row in batch]
    model, words = (
        AutoModelForSequenceClassification.from_pretrained(scored).eval(),
        AutoTokenizer.from_pretrained(scored),
    )
    assert len(rows) == len(ROWS)
    for row, pair in zip(rows, ROWS, strict=True):
        for side in ("chosen", "rejected"):
            expected = float(score(model, words, pair["prompt"], pair[side]))
            assert row[f"{side}_score"] == pytest.approx(expected, abs=1e-5)


def test_an_exported_model_gives_the_same_scores_as_a_reward(tmp_path: Path) -> None:
    module = reward_model(tiny.save_model(tmp_path / "policy"), optimizer=tiny.sgd(0.1))
    tiny.fit(module, preferences(tmp_path), tmp_path)
    folder = str(tmp_path / "exported")
    export(module.model, module.tokenizer, folder)
    reward = ModelReward(folder)
    reward.setup(torch.device("cpu"))
    words = AutoTokenizer.from_pretrained(folder)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    module.model.eval()
    for side in ("chosen", "rejected"):
        scores = reward([row["prompt"] for row in ROWS], [row[side] for row in ROWS])
        own = torch.stack([score(module.model, words, row["prompt"], row[side]) for row in ROWS])
        again = torch.stack([score(loaded, words, row["prompt"], row[side]) for row in ROWS])
        torch.testing.assert_close(scores, own, atol=1e-5, rtol=1e-5)
        assert torch.equal(own, again)
