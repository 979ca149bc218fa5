"""While a policy learns: how much would each baseline lower the variance of its gradient?"""

import time
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from remax_lightning.functional.advantages import leave_one_out_baselines, mean_of_others
from remax_lightning.functional.gradient_variance import (
    BASELINES,
    VarianceSums,
    count_sketch,
    gradient_variances,
    variance_sums,
)
from remax_lightning.models.next_token import policy_gradient_of
from remax_lightning.modules.policy_gradient import PolicyGradientModule
from remax_lightning.modules.remax import ReMax
from remax_lightning.rollout import Responses
from remax_lightning.rollout.responder import first_rows, raw_columns


class GradientVariance(Callback):
    """Logs, every few steps, the variance of the policy gradient with each baseline over that with none.

    A few prompts of the coming batch get ``num_samples`` responses each and the greedy one, drawn beside those of
    training, which stay bitwise what they are. ``diagnostics/variance_ratio_greedy`` (ReMax's baseline),
    ``diagnostics/variance_ratio_leave_one_out`` (RLOO's, of ``num_samples`` responses) and
    ``diagnostics/variance_ratio_batch_mean`` (of all other responses drawn here) are ratios of the variance within
    prompts, the part that a baseline can change, for the same number of sampled responses: below 1 the baseline helps,
    at 0.25 it is worth four times the responses. ``diagnostics/greedy_helps`` is the share of prompts whose gradient
    varies less with the greedy baseline than with none, as far as its few responses show. All are NaN where
    there is no variance without a baseline or no prompt with finite rewards. A few dozen responses give rough numbers:
    look at many steps.

    The gradient is that of the reward alone (less ``missing_stop_penalty``): the KL penalty, ``gamma`` and
    ``reward_clip`` are left out. For PPO the ratios say what baselines would do for the plain policy gradient. A
    response without a finite reward is left out, as is a prompt without one of its greedy response or with fewer than
    two sampled ones that have one. Does not work under fsdp2, where no process has a response's whole gradient.

    Each process takes, every so many steps, one rollout of ``num_prompts`` times ``num_samples`` sampled and
    ``num_prompts`` greedy responses, their rewards, and a forward and backward pass for each of the sampled ones, by
    itself; in memory, the gradients of one response at a time. Of a gradient a random projection is kept (a count
    sketch, which keeps inner products in expectation). ``time/gradient_variance`` is what it takes, in seconds.

    Args:
        every_n_train_steps: Training batches between two estimates; the first is made before the first update.
        num_prompts: Prompts in each process, from the front of its batch; all of a smaller batch.
        num_samples: Responses drawn for each prompt, at least 2.
        dimensions: Length of the projection; a product of two gradients is off by at most about sqrt(2 / dimensions)
            of the product of their norms.

    Raises:
        ValueError: If an argument is out of its range.

    Reference: Greensmith, Bartlett, Baxter 2004, jmlr.org/papers/v5/greensmith04a.html, on baselines; Li et al. 2024,
        arXiv 2310.10505, on ReMax.
    """

    def __init__(
        self, every_n_train_steps: int = 50, num_prompts: int = 8, num_samples: int = 4, dimensions: int = 1024
    ) -> None:
        numbers = {"every_n_train_steps": every_n_train_steps, "num_prompts": num_prompts, "dimensions": dimensions}
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, since one response shows no variance, got {num_samples}")
        self.every_n_train_steps, self.num_prompts = every_n_train_steps, num_prompts
        self.num_samples, self.dimensions = num_samples, dimensions

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to train what has no such gradient.

        Raises:
            ValueError: If the module does not learn from rewards, or is split over processes.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, PolicyGradientModule):
            name = type(pl_module).__name__
            raise ValueError(f"GradientVariance needs a policy that learns from rewards, got {name}; leave it out")
        if pl_module.sharding is not None:
            raise ValueError(
                "GradientVariance does not work under fsdp2, where no process has the whole gradient of a response; "
                "leave it out, or use trainer.strategy=ddp"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Estimate and log, with the weights that the step starts from."""
        assert isinstance(pl_module, PolicyGradientModule)
        if pl_module.global_step // pl_module.updates_per_batch % self.every_n_train_steps > 0:
            return
        start = time.perf_counter()
        part = first_rows(batch, self.num_prompts)
        with trainer.profiler.profile("gradient_variance"), trainer.precision_plugin.forward_context():  # type: ignore[attr-defined]
            own = self._sums(pl_module, part)
            sums = VarianceSums(*(pl_module.sum_over_ranks(each) for each in own))
        variances = gradient_variances(sums)
        ratios = torch.where(variances[0] > 0, variances / variances[0], torch.nan)
        found = {f"variance_ratio_{name}": ratio for name, ratio in zip(BASELINES, ratios, strict=True)}
        del found["variance_ratio_none"]
        found["greedy_helps"] = sums.num_helped / sums.num_prompts
        metrics = {f"diagnostics/{name}": float(value) for name, value in found.items()}
        _log(trainer, {**metrics, "time/gradient_variance": time.perf_counter() - start})

    def _sums(self, module: PolicyGradientModule, batch: dict[str, Any]) -> VarianceSums:
        sampled, greedy = module.responder.sample_and_greedy(
            module.policy,
            batch,
            replace(module.sampling, num_samples=self.num_samples),
            step=-1 - module.global_step,  # a key that no step of training has
            greedy_max_new_tokens=module.greedy_max_new_tokens if isinstance(module, ReMax) else None,
        )
        scored = module.collector.scorer.score(
            raw_columns(batch), *map(module.responder.texts, (sampled, greedy)), device=module.device
        )
        rewards, greedy_rewards = (
            (each - module.missing_stop_penalty * rollout.truncated).double()
            for each, rollout in zip(scored, (sampled, greedy), strict=True)
        )
        advantages = self._advantages(module, rewards, greedy_rewards)  # (B * num_samples, 4)
        usable = advantages.isfinite().all(dim=1).nonzero()[:, 0]
        scores = self._scores(module, sampled, usable)
        return variance_sums(scores, advantages[usable], usable // self.num_samples)

    def _advantages(self, module: PolicyGradientModule, rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
        """Rewards less each of the BASELINES, (B * num_samples, 4); not finite in the rows that do not count."""
        compared = torch.stack(
            [
                rewards,
                greedy_rewards.repeat_interleave(self.num_samples),
                leave_one_out_baselines(rewards, self.num_samples),
            ]
        )
        counts = compared.isfinite().all(dim=0)
        batch_mean = mean_of_others(rewards.masked_fill(~counts, torch.nan), module.sum_over_ranks)
        return rewards[:, None] - torch.stack([torch.zeros_like(rewards), *compared[1:], batch_mean], dim=1)

    def _scores(self, module: PolicyGradientModule, rollout: Responses, rows: Tensor) -> Tensor:
        """Projected gradient of the log-prob of each of some responses, up to its sign, (rows, dimensions)."""
        parameters = [parameter for parameter in module.policy.parameters() if parameter.requires_grad]
        scores = torch.zeros(len(rows), self.dimensions, device=module.device)
        for place, row in enumerate(rows):
            response = rollout.rows(row[None])
            loss = policy_gradient_of(
                module.policy,
                *response.sequences(),
                torch.ones(int(response.lengths), device=module.device),
                temperature=module.sampling.temperature,
            ).loss
            # not backward(): the gradients of training, and their exchange between processes, never see these
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            scores[place] = count_sketch(gradients, self.dimensions, seed=module.global_step)
        return scores


def _log(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Log what belongs to this step alone; what a module logs, Lightning repeats at the steps after it."""
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
