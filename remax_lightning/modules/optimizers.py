"""Optimizers and learning-rate schedules; the default is AdamW, in torch's fused kernel where it can be.

The defaults are functions with a name, not lambdas, so that a printed or saved configuration can be read again.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

LearningRateSchedule = Literal["constant", "linear", "cosine"]

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


def adamw(params: Parameters, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)) -> AdamW:
    """AdamW, in one fused kernel if all parameters are on a GPU, sharded ones too; elsewhere as torch chooses.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate at its peak.
        weight_decay: Times the learning rate, the part of a weight that each step takes off.
        betas: Decay of the means of the gradient and of its square; the default is that of the official ReMax scripts.
    """
    groups: list[Any] = list(params)
    # torch never chooses the fused kernel itself; on a CPU it would change the last bits of the results
    return AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True if can_be_fused(groups) else None)


def can_be_fused(params: Iterable[Any]) -> bool:
    """True if all parameters, or those of all groups, are floating-point numbers on a GPU."""
    parameters = [p for each in params for p in (each["params"] if isinstance(each, dict) else [each])]
    return all(parameter.device.type == "cuda" and parameter.is_floating_point() for parameter in parameters)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices, and norms and biases, which no weight decay pulls to zero."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


class Schedule(LambdaLR):
    """The course of the learning rate over the steps of a run.

    A run that is resumed with another number of steps, or another schedule, goes on on the new curve at once; a warning
    says what becomes of the rate. Without one, the rate is that of the checkpoint, to the bit.

    Args:
        optimizer: The optimizer.
        factor: From the number of steps taken to the factor of the peak rate.
        total_steps: Steps of the run; None if the rate does not depend on it.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float], total_steps: int | None) -> None:
        self.total_steps = total_steps
        super().__init__(optimizer, factor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; the optimizer's has to be loaded before."""
        total_steps = self.total_steps
        super().load_state_dict(state_dict)
        before, self.total_steps = self.total_steps, total_steps
        groups, step = self.optimizer.param_groups, self.last_epoch
        rates = [rate * factor(step) for rate, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        saved = [float(group["lr"]) for group in groups]
        is_same = all(math.isclose(*pair, rel_tol=1e-6) for pair in zip(rates, saved, strict=True))
        if is_same and before == total_steps:
            return
        for group, rate in zip(groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = rates
        rank_zero_warn(
            f"the learning rate of step {step} is {float(rates[0]):.4g}, where the checkpoint has {saved[0]:.4g}: it "
            f"follows the schedule of this run ({total_steps or 'any number of'} steps; before: "
            f"{before or 'any number of'}) from here on; set trainer.max_steps (or max_epochs) and model.lr_schedule "
            "as they were for the old course"
        )


def configured_schedule(
    optimizer: Optimizer,
    lr_schedule: LearningRateSchedule,
    warmup_fraction: float,
    trainer: Trainer,
    updates_per_batch: int,
) -> LRScheduler:
    """The course of the learning rate over all steps of a fit.

    Args:
        optimizer: The optimizer.
        lr_schedule: From the peak to the last step.
        warmup_fraction: Fraction of all steps over which the rate rises from zero to its peak.
        trainer: Knows the number of steps.
        updates_per_batch: Optimizer steps on each batch.

    Raises:
        ValueError: If the number of steps is needed and not known.
    """
    if lr_schedule == "constant" and warmup_fraction == 0:
        return Schedule(optimizer, lambda step: 1.0, None)
    steps = trainer.estimated_stepping_batches
    if trainer.max_steps == -1:  # batches; otherwise optimizer steps
        steps *= updates_per_batch
    if steps == float("inf") or steps < 0:
        raise ValueError(
            f"lr_schedule={lr_schedule} with warmup_fraction={warmup_fraction} needs to know the number of steps; set "
            "trainer.max_steps or trainer.max_epochs"
        )
    name = "constant_with_warmup" if lr_schedule == "constant" else lr_schedule
    (factor, *_) = get_scheduler(name, optimizer, int(warmup_fraction * int(steps)), int(steps)).lr_lambdas
    return Schedule(optimizer, factor, int(steps))


def policy_gradient_adamw(params: Parameters) -> AdamW:
    """AdamW as in the official ReMax scripts: a rate of 1e-6 and a weight decay of 0.1."""
    return adamw(params, lr=1e-6, weight_decay=0.1)


def sft_adamw(params: Parameters) -> AdamW:
    """AdamW for supervised fine-tuning: a rate of 1e-5 and no weight decay."""
    return adamw(params, lr=1e-5, weight_decay=0.0)


def reward_model_adamw(params: Parameters) -> AdamW:
    """AdamW for a reward model: a rate of 1e-5 and a weight decay of 0.1."""
    return adamw(params, lr=1e-5, weight_decay=0.1)
