"""A policy as what answers prompts: engine, tokenizer, stop tokens and the key of its random numbers."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remax_lightning.models.parallelize import gathered
from remax_lightning.rollout.engine import RolloutEngine
from remax_lightning.rollout.types import Responses, Samples, Sampling


@dataclass(frozen=True)
class Responder:
    """Draws responses of a policy and reads them as text.

    Args:
        engine: What decodes.
        tokenizer: The policy's tokenizer.
        stop_token_ids: Tokens that end a response.
        seed: Key of all samples: they are a function of the weights, this seed, the step and the prompt.
    """

    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: list[int]
    seed: int

    def sample(self, policy: PreTrainedModel, batch: dict[str, Any], sampling: Sampling, *, step: int = 0) -> Samples:
        """Sampled responses to a batch of prompts; see :meth:`RolloutEngine.sample`."""
        with gathered(policy):
            return self.engine.sample(
                policy, batch, sampling, stop_token_ids=self.stop_token_ids, seed=self.seed, step=step
            )

    def sample_and_greedy(
        self,
        policy: PreTrainedModel,
        batch: dict[str, Any],
        sampling: Sampling,
        *,
        step: int = 0,
        greedy_max_new_tokens: int | None = None,
    ) -> tuple[Samples, Responses]:
        """Sampled responses and the greedy ones; see :meth:`RolloutEngine.sample_and_greedy`."""
        with gathered(policy):
            return self.engine.sample_and_greedy(
                policy,
                batch,
                sampling,
                stop_token_ids=self.stop_token_ids,
                greedy_max_new_tokens=greedy_max_new_tokens,
                seed=self.seed,
                step=step,
            )

    def texts(self, responses: Responses) -> list[str | None]:
        """The responses as text, without special tokens; None where the policy's logits were not finite."""
        rows = zip(responses.response_ids, responses.response_mask, strict=True)
        ids = [tokens[mask].tolist() for tokens, mask in rows]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            text if is_finite else None for text, is_finite in zip(texts, responses.is_finite.tolist(), strict=True)
        ]

    def rows(self, policy: PreTrainedModel, batch: dict[str, Any], sampling: Sampling) -> list[dict[str, Any]]:
        """A row for each prompt: the data's columns, a sampled response and the greedy one; see :meth:`texts`."""
        samples, greedy = self.sample_and_greedy(policy, batch, sampling)
        responses = list(zip(self.texts(samples), self.texts(greedy), strict=True))
        if missing := sum(None in pair for pair in responses):
            warnings.warn(
                f"the policy's logits are not finite for {missing} of {len(responses)} prompts, whose responses are "
                "null; look at the weights of the policy",
                stacklevel=2,
            )
        return [
            {**row, "response": response, "greedy_response": greedy_response}
            for row, (response, greedy_response) in zip(as_rows(raw_columns(batch)), responses, strict=True)
        ]


def raw_columns(batch: dict[str, Any]) -> dict[str, list[Any]]:
    """The columns of a batch that are as the data has them: all that are not tensors.

    Args:
        batch: Tensors of B rows, and columns of B values; nothing else.

    Raises:
        TypeError: If there is something else in it.
    """
    columns = {name: column for name, column in batch.items() if not isinstance(column, Tensor)}
    for name, column in columns.items():
        if not isinstance(column, Collection) or isinstance(column, str | bytes | Mapping):
            raise TypeError(
                f"the entries of a batch are tensors of B rows and lists of B values, a list for each column of the "
                f"data; {name} is of type {type(column).__name__}: leave it out of the batches"
            )
    return columns


def first_rows(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """The first rows of a batch, of all its tensors and columns."""
    raw_columns(batch)  # refuses what has no rows
    return {name: column[:count] for name, column in batch.items()}


def as_rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Columns of equal length as rows."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
