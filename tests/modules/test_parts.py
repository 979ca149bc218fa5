"""The parts that a policy-gradient module owns, each alone."""

import math
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from remax_lightning.models.lora import LoRA, with_lora
from remax_lightning.models.reference import Reference
from remax_lightning.models.source import ModelSource
from remax_lightning.modules.evaluation import win
from remax_lightning.modules.kl_control import KLControl, KLController
from remax_lightning.rollout import Responder, Sampling, TransformersEngine
from remax_lightning.rollout.per_token import per_token


@pytest.mark.parametrize(
    ("score", "other", "are_equal", "expected"),
    [(1.0, 0.0, False, 1.0), (0.0, 1.0, False, 0.0), (1.0, 1.0, False, 0.5), (1.0000001, 1.0, True, 0.5)],
)
def test_win(score: float, other: float, are_equal: bool, expected: float) -> None:
    assert win(score, other, are_equal=are_equal) == expected
    assert math.isnan(win(math.nan, other, are_equal=are_equal))
    assert math.isnan(win(score, math.nan, are_equal=are_equal))


def prompts() -> dict[str, Tensor]:
    ids = torch.tensor([[0, 5, 6], [7, 8, 9]])
    return {"prompt_ids": ids, "prompt_mask": ids > 0, "prompt_index": torch.tensor([3, 4])}


def test_a_responder_reads_its_responses_as_text() -> None:
    model, words = tiny.language_model(vocab_size=len(tiny.tokenizer())), tiny.tokenizer()
    responder = Responder(TransformersEngine(), words, [1], seed=3)
    samples, greedy = responder.sample_and_greedy(model, prompts(), Sampling(6), step=2, greedy_max_new_tokens=3)
    assert responder.texts(samples) == responder.texts(responder.sample(model, prompts(), Sampling(6), step=2))
    assert int(greedy.lengths.max()) <= 3
    tokens = [ids[mask].tolist() for ids, mask in zip(greedy.response_ids, greedy.response_mask, strict=True)]
    assert responder.texts(greedy) == words.batch_decode(tokens, skip_special_tokens=True)
    (row, _) = responder.rows(model, {**prompts(), "prompt": ["a", "b"], "answer": [1, 2]}, Sampling(6))
    assert row.keys() == {"prompt", "answer", "response", "greedy_response"}


def test_a_number_for_each_token_does_not_depend_on_micro_batches() -> None:
    model = tiny.language_model()
    samples = TransformersEngine().sample(model, prompts(), Sampling(9, num_samples=2), stop_token_ids=tiny.STOPS)

    def ends(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        return ids.cumsum(dim=1)[mask].float()

    together = per_token(ends, model, samples, [torch.arange(4)])
    alone = per_token(ends, model, samples, torch.arange(4).split(1))
    assert torch.equal(together, alone)  # sums of integers
    assert not together[~samples.response_mask].any()
    assert together[samples.response_mask].all()


def test_a_reference_is_a_copy_another_model_or_the_policy_without_adapters(policy: str, other: str) -> None:
    source, ids = ModelSource(path=policy), torch.tensor([[5, 6, 7]])
    base = tiny.language_model(vocab_size=len(tiny.tokenizer()))
    copied = Reference.load(None, base, source, None)
    assert copied.model is not base
    with torch.no_grad():
        before = base(ids).logits
        for parameter in base.parameters():
            parameter.add_(0.1)
    with copied.active() as model:
        torch.testing.assert_close(model(ids).logits, before)
    assert not any(each.requires_grad for each in model.parameters())
    named = Reference.load(ModelSource(path=other), base, source, None)
    assert named.model.name_or_path == other
    adapted = with_lora(tiny.language_model(), LoRA(rank=2))
    with torch.no_grad():
        plain = adapted(ids).logits
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
    own = Reference.load(None, adapted, source, None)
    assert own.model is adapted
    with own.active() as model, torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain)
    with torch.no_grad():
        assert not torch.allclose(adapted(ids).logits, plain)


def test_the_weight_of_the_kl_penalty() -> None:
    fixed = KLController(0.2, KLControl())
    fixed.observe(100.0, 8)
    assert fixed.weight == 0.2
    assert not fixed.exceeds_limit(1e9)
    assert not fixed.state_dict()
    adapted = KLController(0.2, KLControl(target=1.0, horizon=10, limit=5.0))
    adapted.observe(2.0, 5)
    assert adapted.weight == pytest.approx(0.2 * (1 + 0.2 * 0.5))
    assert adapted.exceeds_limit(5.1)
    assert not adapted.exceeds_limit(5.0)
    again = KLController(0.2, KLControl(target=1.0, horizon=10))
    again.load_state_dict(adapted.state_dict())
    assert again.weight == adapted.weight
    with pytest.raises(ValueError, match="horizon must be at least the 11 responses of a step, got 10"):
        adapted.check(11)
