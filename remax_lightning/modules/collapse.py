"""Signs in the metrics of a step that a policy no longer learns, or has left its reference far behind."""

from collections import Counter
from collections.abc import Mapping
from math import inf, isfinite, nan

from remax_lightning.rewards.failures import is_power_of_ten

PATIENCE = 10
"""Steps in a row that a sign has to last. Less is an accident of small batches: with a success in 1 of 100 responses, a
batch of 16 has none in 85 % of the steps, but ten in a row in only 20 % of the runs of ten."""
USUAL_KL = 50.0
"""Mean KL of a response, nats, from which it is spoken of; in most runs it stays within a few tens."""
SENTENCES = {
    "equal_rewards": "all rewards of a step are equal",
    "zero_gradient": "the gradient is 0",
    "one_token": "all responses have at most one token",
}


class CollapseWatch:
    """From the metrics of each step to sentences about a run that learns nothing, or too far from its reference.

    A sign is spoken of when it has lasted 10, 100, 1000, ... steps in a row; the KL when it passes 50 nats, or twice
    ``kl.target``, and each time that it has doubled.

    Args:
        has_greedy_baseline: Whether baselines are rewards of other responses, so that there is something to learn as
            long as they differ from those of the sampled ones.
        kl_target: Mean KL of a response that is held, nats; None if none is.
    """

    def __init__(self, *, has_greedy_baseline: bool = False, kl_target: float | None = None) -> None:
        self.has_greedy_baseline = has_greedy_baseline
        self.num_steps: Counter[str] = Counter()
        self.kl_bound = max(USUAL_KL, 2 * (kl_target or 0.0))

    def observe(self, means: Mapping[str, float]) -> list[str]:
        """What there is to say after a step.

        Args:
            means: The step's metrics over all ranks. A skipped step says nothing about the policy and is passed over.
        """
        if means.get("steps_skipped") == 1:
            return []
        said = []
        for name, is_seen in self._signs(means).items():
            self.num_steps[name] = count = self.num_steps[name] + 1 if is_seen else 0
            if count >= PATIENCE and is_power_of_ten(count):
                said.append(
                    f"{SENTENCES[name]}, for {count} steps in a row, so nothing is learned: look at the responses and "
                    "their rewards; a policy that has collapsed starts again from an earlier checkpoint, with a lower "
                    "learning rate or a higher kl_coef"
                )
        kl = means.get("kl", nan)
        if isfinite(kl) and kl > self.kl_bound:
            said.append(
                f"the mean KL of a response is {kl:.4g} nats, which in most runs stays below {USUAL_KL:g}: the policy "
                "may have lost its language; lower the learning rate, raise kl_coef, or set kl.limit, which ends a run"
            )
            while kl > self.kl_bound:
                self.kl_bound *= 2
        return said

    def _signs(self, means: Mapping[str, float]) -> dict[str, bool]:
        # the last bits of equal scores differ by the row in the batch
        tolerance = 1e-6 * max(abs(means.get("reward", nan)), 1.0)
        gap = abs(means.get("baseline_gap", inf)) if self.has_greedy_baseline else 0.0
        return {
            "equal_rewards": means.get("reward_std", nan) <= tolerance and gap <= tolerance,
            "zero_gradient": means.get("grad_norm", nan) == 0,
            "one_token": means.get("response_length", nan) <= 1,
        }
