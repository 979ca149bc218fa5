"""Our RLOO against TRL's ``RLOOTrainer`` on the same responses: advantages, and the gradient of its loss.

Both have the same policy, reference, responses and rewards; neither normalises advantages or clips rewards. What is
left of differences is accounted for by hand:

* TRL's loss is the mean over responses of a sum over tokens, ours the sum over all tokens by their number.
* TRL's loss is a clipped ratio of whole responses, which is 1 before the first step: its value is minus the mean
  advantage, but its gradient is that of ``advantage * log_prob``, so the gradients are compared.
* TRL takes the KL of a whole response from its reward before the baseline is made. Ours (``full_step``) is taken from
  each token for the tokens from itself on. The two differ by the KL of the tokens before, and by that of the prompt's
  other responses, which is in TRL's baseline; both are 0 in expectation times the gradient of the token's log-prob.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from reward_functions import letter_values
from torch import Tensor
from transformers import AutoModelForCausalLM

from remax_lightning.functional.advantages import baseline_advantages, leave_one_out_baselines
from remax_lightning.functional.log_probs import kl_k1
from remax_lightning.models.source import ModelSource
from remax_lightning.modules import RLOO
from remax_lightning.rewards import FunctionReward
from remax_lightning.rollout import Rollout, Sampling

pytestmark = pytest.mark.skipif(
    find_spec("trl") is None, reason="trl, the peer, is not installed; install it by: pip install -e '.[bench]'"
)
KL_COEF = 0.3
NUM_SAMPLES = 3


def ours(policy: str, folder: Path, kl_coef: float = 0.0, reference: str | None = None) -> tuple[Any, ...]:
    """One step: the rollout, the advantages, and the gradient."""
    module = RLOO(
        policy=ModelSource(path=policy),
        reference=None if reference is None else ModelSource(path=reference),
        reward=FunctionReward("reward_functions.letter_values"),
        sampling=Sampling(max_new_tokens=8, num_samples=NUM_SAMPLES),
        kl_coef=kl_coef,
        optimizer=tiny.sgd(),
        lr_schedule="constant",
        max_grad_norm=None,
    )
    seen: dict[str, Any] = {}
    advantages: Callable[[Rollout], Tensor] = module.advantages

    def watched(rollout: Rollout) -> Tensor:
        seen.update(rollout=rollout, advantages=advantages(rollout), before=tiny.weights(module.policy))
        return seen["advantages"]

    module.advantages = watched  # type: ignore[method-assign]
    tiny.fit(module, tiny.prompt_data(folder), folder)
    return seen["rollout"], seen["advantages"], tiny.difference(seen["before"], tiny.weights(module.policy))


def theirs(
    policy: str, folder: Path, rollout: Rollout, kl_coef: float = 0.0, reference: str | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The advantages of a rollout's responses, (B,), and the gradient of the loss."""
    import trl
    from datasets import Dataset

    rows = [{"prompt": prompt} for prompt in prompts_of(rollout)]
    arguments = trl.RLOOConfig(
        output_dir=str(folder / "trl"),
        num_generations=NUM_SAMPLES,
        per_device_train_batch_size=len(rows),
        beta=kl_coef,
        normalize_advantages=False,
        disable_dropout=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    trainer = trl.RLOOTrainer(
        model=policy,
        reward_funcs=lambda prompts, completions, **columns: letter_values(prompts, completions),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
    )
    if reference is not None:
        trainer.ref_model.load_state_dict(AutoModelForCausalLM.from_pretrained(reference).state_dict())
    trainer._generate = lambda prompts: generated(rollout)
    scored = trainer._generate_and_score_completions(rows)
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, scored).backward()
    gradients = {name: each.grad for name, each in trainer.model.named_parameters()}
    return scored["advantages"], gradients


def generated(rollout: Rollout) -> tuple[list[list[int]], list[list[int]], list[str]]:
    """Prompts and responses as ``RLOOTrainer._generate`` returns them."""
    prompts = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    responses = [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    return prompts, responses, tiny.tokenizer().batch_decode(responses, skip_special_tokens=True)


def prompts_of(rollout: Rollout) -> list[str]:
    return tiny.tokenizer().batch_decode(generated(rollout)[0])


def test_the_gradient_of_a_step_is_that_of_trl(policy: str, tmp_path: Path) -> None:
    rollout, advantages, gradient = ours(policy, tmp_path)
    their_advantages, their_gradient = theirs(policy, tmp_path, rollout)
    mask = rollout.response_mask
    assert len(set(rollout.lengths.tolist())) > 1  # or the two divisors would be the same for each response
    torch.testing.assert_close(advantages, their_advantages[:, None] * mask, atol=1e-5, rtol=1e-5)
    tokens_per_response = float(mask.sum() / len(mask))
    assert tiny.norm(gradient) > 1e-3
    tiny.assert_close(
        {name: each * tokens_per_response for name, each in gradient.items()}, their_gradient, atol=1e-5, rtol=1e-4
    )


def test_advantages_with_a_kl_penalty_differ_by_what_has_no_expectation(
    policy: str, other: str, tmp_path: Path
) -> None:
    rollout, advantages, _ = ours(policy, tmp_path, KL_COEF, other)
    their_advantages, _ = theirs(policy, tmp_path, rollout, KL_COEF, other)
    mask, ref_log_probs = rollout.response_mask, rollout.ref_log_probs
    assert ref_log_probs is not None
    kl = kl_k1(rollout.log_probs, ref_log_probs).masked_fill(~mask, 0.0)
    assert float(kl.abs().sum()) > 1.0
    before = kl.cumsum(1) - kl
    of_others = leave_one_out_baselines(kl.sum(1), NUM_SAMPLES)[:, None]
    expected = their_advantages[:, None] + KL_COEF * (before - of_others)
    torch.testing.assert_close(advantages, expected.masked_fill(~mask, 0.0), atol=1e-4, rtol=1e-4)


def test_with_the_kl_in_the_rewards_the_advantages_are_those_of_trl(policy: str, other: str, tmp_path: Path) -> None:
    rollout, _, _ = ours(policy, tmp_path, KL_COEF, other)
    their_advantages, _ = theirs(policy, tmp_path, rollout, KL_COEF, other)
    mask, ref_log_probs = rollout.response_mask, rollout.ref_log_probs
    assert ref_log_probs is not None
    rewards = rollout.rewards - KL_COEF * kl_k1(rollout.log_probs, ref_log_probs).masked_fill(~mask, 0.0).sum(1)
    advantages = baseline_advantages(rewards, leave_one_out_baselines(rewards, NUM_SAMPLES), mask)
    torch.testing.assert_close(advantages, their_advantages[:, None] * mask, atol=1e-4, rtol=1e-4)
