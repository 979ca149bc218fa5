"""How a KL penalty is taken and how its weight is steered."""

from dataclasses import dataclass

from remax_lightning.functional.log_probs import KLEstimator


@dataclass(frozen=True)
class KLControl:
    """What becomes of the KL to the reference beside its weight, ``kl_coef``.

    Args:
        estimator: Of a token's KL: ``k1`` is the log-ratio, whose penalty in the reward has the exact gradient;
            ``k2`` half its square; ``k3`` is never negative. In the loss, the expected gradient of ``k2`` is that of
            KL(policy || reference), of ``k3`` that of KL(reference || policy), each token for itself.
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
