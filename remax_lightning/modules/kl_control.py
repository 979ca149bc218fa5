"""How a KL penalty is taken and how its weight is steered."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remax_lightning.functional.log_probs import KLEstimator
from remax_lightning.functional.returns import adapted_kl_coef


@dataclass(frozen=True)
class KLControl:
    """What is done with the KL to the reference, beside its weight ``kl_coef``.

    Args:
        estimator: Of a token's KL: ``k1`` is the log-ratio, whose penalty in the reward has the exact gradient;
            ``k2`` half its square; ``k3`` is never negative. In the loss, the expected gradient of ``k2`` is that of
            KL(policy || reference), of ``k3`` that of KL(reference || policy), of each token alone.
        in_loss: Take the penalty in the loss, with the estimator's own gradient, not in the reward.
        target: Mean KL of a response to hold, nats: after each step kl_coef is raised if it was above and lowered if it
            was below (Ziegler et al. 2019, arXiv 1909.08593); the default keeps kl_coef.
        horizon: Responses in which an error of 20 % changes kl_coef by about 20 %.
        limit: Mean KL of a response, nats, above which training ends, with a checkpoint; the default is none.

    Raises:
        ValueError: If a value is out of its range, or the estimator has no gradient in the loss.
    """

    estimator: KLEstimator = "k1"
    in_loss: bool = False
    target: float | None = None
    horizon: int = 10_000
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.in_loss and self.estimator == "k1":
            raise ValueError("k1 in the loss has an expected gradient of 0; set kl.estimator to k2 or k3, got k1")
        for name, value in (("target", self.target), ("limit", self.limit)):
            if value is not None and not value > 0:
                raise ValueError(f"kl.{name} is a KL in nats above 0, or null for none, got {value}")
        if self.horizon < 1:
            raise ValueError(f"kl.horizon is a number of responses, at least 1, got {self.horizon}")


class KLController(nn.Module):
    """The weight of the KL penalty; with a target it is adapted after each step and is part of checkpoints.

    Args:
        coef: The weight, reward per nat; where it is adapted, at the first step.
        control: How it is steered.
    """

    adapted: Tensor

    def __init__(self, coef: float, control: KLControl) -> None:
        super().__init__()
        self.coef, self.control = coef, control
        if control.target is not None:
            self.register_buffer("adapted", torch.tensor(coef, dtype=torch.float64))

    @property
    def weight(self) -> float:
        """Weight of the KL penalty at this step, reward per nat."""
        return self.coef if self.control.target is None else float(self.adapted)

    def check(self, num_responses: int) -> None:
        """Refuse a horizon that is shorter than a step.

        Args:
            num_responses: Responses of a step, of all ranks.

        Raises:
            ValueError: If it is.
        """
        if self.control.target is not None and num_responses > self.control.horizon:
            raise ValueError(
                f"kl.horizon must be at least the {num_responses} responses of a step, got {self.control.horizon}: a "
                "shorter one would make kl_coef swing"
            )

    def observe(self, kl: float, num_responses: int) -> None:
        """Adapt the weight to the KL of a step.

        Args:
            kl: Mean KL of a response, nats, over all ranks.
            num_responses: Responses of the step, of all ranks.
        """
        target, horizon = self.control.target, self.control.horizon
        if target is not None:
            self.adapted.fill_(adapted_kl_coef(self.weight, kl, target, horizon=horizon, num_samples=num_responses))

    def exceeds_limit(self, kl: float) -> bool:
        """Whether training has to end at a mean KL of a response, nats."""
        return self.control.limit is not None and kl > self.control.limit
