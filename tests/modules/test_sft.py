from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from remax_lightning.data import DemonstrationDataModule
from remax_lightning.models.source import ModelSource
from remax_lightning.modules import SFT
from remax_lightning.rollout import Sampling

ROWS = [
    {"prompt": "Say it", "response": " now."},
    {"prompt": "b", "response": " and a longer answer"},
    {"prompt": "A much longer prompt it is", "response": " x"},
]


def demonstrations(folder: Path, rows: list[dict[str, str]] = ROWS, **options: Any) -> DemonstrationDataModule:
    path = tiny.write_rows(folder / "demonstrations.jsonl", rows)
    return DemonstrationDataModule(**{"train": path, "batch_size": len(rows), **options})


def sft(policy: str, **options: Any) -> SFT:
    defaults: dict[str, Any] = {"optimizer": tiny.sgd(), "lr_schedule": "constant", "max_grad_norm": None}
    return SFT(policy=ModelSource(path=policy), **{**defaults, **options})


def by_hand(policy: str, rows: list[dict[str, str]] = ROWS) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of every response token and the end, row by row and unpadded."""
    model, words = AutoModelForCausalLM.from_pretrained(policy).eval(), AutoTokenizer.from_pretrained(policy)
    losses = []
    for row in rows:
        prompt = words(row["prompt"])["input_ids"]
        response = [*words(row["response"])["input_ids"], words.eos_token_id]
        logits = model(torch.tensor([prompt + response])).logits[0]
        for position, token in enumerate(response):
            losses.append(-logits[len(prompt) + position - 1].log_softmax(-1)[token])
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def start(policy: str) -> dict[str, Tensor]:
    return tiny.weights(AutoModelForCausalLM.from_pretrained(policy))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_loss_and_update_are_those_by_hand(tmp_path: Path, architecture: str, pad_is_eos: bool) -> None:
    policy = tiny.save_model(tmp_path / "policy", architecture, pad_is_eos=pad_is_eos)
    module = sft(policy)
    history = tiny.fit(module, demonstrations(tmp_path), tmp_path)
    loss, gradient = by_hand(policy)
    assert history["train/loss"] == [pytest.approx(float(loss), abs=1e-4)]
    assert history["train/grad_norm"] == [pytest.approx(tiny.norm(gradient), rel=1e-3)]
    tiny.assert_close(tiny.difference(start(policy), tiny.weights(module.policy)), gradient, atol=2e-6)


def test_the_update_does_not_depend_on_the_micro_batch(policy: str, tmp_path: Path) -> None:
    results = []
    for size in (None, 1, 2):
        module = sft(policy, micro_batch_size=size)
        loss = tiny.fit(module, demonstrations(tmp_path), tmp_path)["train/loss"][0]
        results.append((loss, tiny.weights(module.policy)))
    for loss, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-5)
        tiny.assert_close(weights, results[0][1], atol=2e-6, rtol=0)


def test_prompt_tokens_have_no_part_in_the_loss(policy: str, tmp_path: Path) -> None:
    """The gradient reaches the head through response positions alone."""
    module = sft(policy)
    tiny.fit(module, demonstrations(tmp_path, [{"prompt": "abc", "response": "z"}]), tmp_path)
    _, gradient = by_hand(policy, [{"prompt": "abc", "response": "z"}])
    moved = tiny.difference(start(policy), tiny.weights(module.policy))
    torch.testing.assert_close(moved["lm_head.weight"], gradient["lm_head.weight"], atol=2e-6, rtol=1e-4)


def test_the_loss_falls(policy: str, tmp_path: Path) -> None:
    module = sft(policy, optimizer=lambda ps: torch.optim.AdamW(ps, lr=1e-2), max_grad_norm=1.0)
    loss = tiny.fit(module, demonstrations(tmp_path), tmp_path, steps=30)["train/loss"]
    assert loss[-1] < 0.2 * loss[0]


def test_validation_loss_is_the_mean_over_tokens(policy: str, tmp_path: Path) -> None:
    expected = float(by_hand(policy)[0])
    for size in (1, 2, 3):
        data = demonstrations(tmp_path, eval_batch_size=size)
        data.sources["validation"] = data.sources["test"] = data.sources["train"]
        trainer = tiny.trainer(tmp_path)
        assert trainer.validate(sft(policy), data, verbose=False) == [{"val/loss": pytest.approx(expected, abs=1e-4)}]
        assert trainer.test(sft(policy), data, verbose=False) == [{"test/loss": pytest.approx(expected, abs=1e-4)}]


def test_metrics(policy: str, tmp_path: Path) -> None:
    history = tiny.fit(sft(policy), demonstrations(tmp_path), tmp_path)
    names = {"train/loss", "train/grad_norm", "train/steps_skipped", "train/learning_rate", "time/update"}
    assert names <= set(history.steps[0])


def test_predict_responds_to_prompts(policy: str, tmp_path: Path) -> None:
    data = tiny.prompt_data(tmp_path)
    data.sources["predict"] = data.sources["train"]
    predictions = tiny.trainer(tmp_path).predict(sft(policy, sampling=Sampling(6)), data)
    assert predictions is not None
    rows = [row for batch in predictions for row in batch]
    assert [row["prompt"] for row in rows] == tiny.PROMPTS
    assert all(set(row) == {"prompt", "response", "greedy_response"} for row in rows)
    assert all(len(row["response"]) <= 6 for row in rows)
