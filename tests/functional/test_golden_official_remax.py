"""Parity with the official ReMax code; `golden_official_remax.json` says where its numbers come from."""

import json
from pathlib import Path

import pytest
import torch

from remax_lightning.functional import policy_gradient_loss, remax_advantages, token_log_probs

CASES = json.loads((Path(__file__).parent / "golden_official_remax.json").read_text())["cases"]
EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(params=CASES, ids=[f"kl_coef={c['kl_coef']}-gamma={c['gamma']}" for c in CASES])
def case(request):
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in request.param.items() if isinstance(v, list)}
    return request.param | tensors | {"tokens": tensors["tokens"].long(), "mask": tensors["response_mask"].bool()}


def advantages_of(case, kl_form="one_step"):
    settings = {name: case[name] for name in ("log_probs", "ref_log_probs", "kl_coef", "gamma", "reward_clip")}
    return remax_advantages(case["rewards"], case["baselines"], case["mask"], kl_form=kl_form, **settings)


def test_advantages_equal_the_official_returns(case):
    torch.testing.assert_close(advantages_of(case), case["returns"] * case["mask"], **EXACT)
    assert (advantages_of(case, "full_step") - case["returns"]).abs().max() > 0.01


def test_loss_and_gradient_equal_the_official_ones(case):
    logits = case["logits"].requires_grad_()
    start = case["prompt_length"]
    log_probs = token_log_probs(logits[:, start - 1 : -1], case["tokens"][:, start:])
    torch.testing.assert_close(log_probs[case["mask"]].detach(), case["log_probs"][case["mask"]], **EXACT)
    loss = policy_gradient_loss(log_probs, advantages_of(case), case["mask"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(case["loss"], dtype=torch.float64), **EXACT)
    torch.testing.assert_close(logits.grad, case["grad_logits"], **EXACT)


def test_the_clip_is_reached_in_some_case():
    assert any(abs(r - b) > c["reward_clip"] for c in CASES for r, b in zip(c["rewards"], c["baselines"], strict=True))
