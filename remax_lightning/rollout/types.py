"""What a rollout needs and what it returns."""

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from remax_lightning.functional.sequence import align_left

ResponsesType = TypeVar("ResponsesType", bound="Responses")


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        max_new_tokens: Longest response, in tokens, the stop token included.
        temperature: Divisor of the logits, in sampling and in every log-prob.
        top_p: Draw from the most probable tokens that together reach this probability; 1 draws from all. Below 1 the
            responses no longer come from the distribution whose gradient is taken, so the gradient is biased.
        top_k: Draw from this many most probable tokens; 0 draws from all. Above 0 the gradient is biased, too.
        num_samples: Responses drawn for each prompt.

    Raises:
        ValueError: If a value is out of its range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_samples: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be > 0, got {self.temperature}; the greedy response is generated separately, no "
                "temperature is needed for it"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or positive, got {self.top_k}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens are never drawn, so that the gradient is biased."""
        return self.top_p < 1 or self.top_k > 0


@dataclass(frozen=True, kw_only=True)
class Responses:
    """Responses of a policy to a batch of prompts; a prompt's responses are adjacent.

    Args:
        prompt_ids: Left-padded prompts, (B, P).
        prompt_mask: True at prompt tokens, (B, P).
        response_ids: Right-padded responses, (B, T).
        response_mask: True where the policy chose the token, the stop token included, nothing after it, (B, T).
        truncated: True where the response reached its longest length without a stop token, (B,).
        failed: True where the policy's logits were not finite: the response ends before that token and gets no reward,
            (B,); None from an engine that does not look.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    truncated: Tensor
    failed: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Length of each response in tokens, (B,)."""
        return self.response_mask.sum(dim=1)

    @property
    def is_finite(self) -> Tensor:
        """Where all that the policy said was a finite number, (B,) bool."""
        return torch.ones_like(self.truncated) if self.failed is None else ~self.failed

    @property
    def total_lengths(self) -> Tensor:
        """Length of each prompt with its response in tokens, (B,)."""
        return self.prompt_mask.sum(dim=1) + self.lengths

    def sequences(self) -> tuple[Tensor, Tensor]:
        """Prompts with their responses, right-padded, (B, L), and True at the response tokens, (B, L)."""
        ids = torch.cat([self.prompt_ids, self.response_ids], dim=1)
        is_response = torch.cat([torch.zeros_like(self.prompt_mask), self.response_mask], dim=1)
        mask = torch.cat([self.prompt_mask, self.response_mask], dim=1)
        return align_left(ids, mask), align_left(is_response, mask)

    def at_tokens(self, values: Tensor) -> Tensor:
        """Values of all N response tokens, row by row, (N,), at their positions, (B, T); 0 elsewhere."""
        return values.new_zeros(self.response_mask.shape).masked_scatter(self.response_mask, values)

    def rows(self: ResponsesType, index: Tensor) -> ResponsesType:
        """The rows of an index, without the columns that are padding in all of them."""
        prompt_length = max(int(self.prompt_mask[index].sum(dim=1).max()), 1)
        response_length = max(int(self.lengths[index].max()), 1)
        values: dict[str, Any] = {}
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            if value is not None:
                value = value[index]
                if name.startswith("prompt_"):
                    value = value[:, -prompt_length:]
                elif value.dim() == 2:
                    value = value[:, :response_length]
            values[name] = value
        return type(self)(**values)


@dataclass(frozen=True, kw_only=True)
class Samples(Responses):
    """Responses that were drawn at random.

    Args:
        log_probs: The sampler's log-probs of the response tokens, nats, (B, T).
    """

    log_probs: Tensor

    @property
    def is_finite(self) -> Tensor:
        """Where all that the policy said was a finite number, its log-probs too, (B,) bool."""
        return super().is_finite & are_finite(self.log_probs, self.response_mask)

    def scored(self, rewards: Tensor, baselines: Tensor, ref_log_probs: Tensor | None) -> "Rollout":
        """The samples with what a policy learns from."""
        return Rollout(**vars(self), rewards=rewards, baselines=baselines, ref_log_probs=ref_log_probs)


@dataclass(frozen=True, kw_only=True)
class Rollout(Samples):
    """Sampled responses with what a policy learns from.

    Args:
        rewards: Reward of each response, (B,); NaN where there is none.
        baselines: Baseline of each response, (B,).
        ref_log_probs: Log-probs of the response tokens under the reference, nats, (B, T); None without a reference.
    """

    rewards: Tensor
    baselines: Tensor
    ref_log_probs: Tensor | None

    @property
    def has_finite_reference(self) -> Tensor:
        """Where the log-probs under the reference are finite, or there is no reference, (B,) bool."""
        if self.ref_log_probs is None:
            return torch.ones_like(self.truncated)
        return are_finite(self.ref_log_probs, self.response_mask)


def are_finite(values: Tensor, mask: Tensor) -> Tensor:
    """Which rows have finite values alone where the mask is True, (B,) bool, of values and a mask, (B, T) each."""
    return (values.isfinite() | ~mask).all(dim=1)
