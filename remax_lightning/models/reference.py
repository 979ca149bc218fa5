"""The policy that a KL penalty is measured against: another model, a frozen copy, or the policy without adapters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from remax_lightning.models.language_model import freeze, frozen_copy, load_language_model
from remax_lightning.models.lora import without_adapters
from remax_lightning.models.parallelize import Sharding
from remax_lightning.models.sharded_loading import load_sharded, sharded_frozen_copy
from remax_lightning.models.source import ModelSource
from remax_lightning.models.weight_sample import weight_sample

REFERENCE = "the reference"


class Reference:
    """A frozen policy. It is no nn.Module, so optimizers, checkpoints and strategies do not see it.

    Args:
        model: The frozen model; with ``is_policy`` the policy itself.
        is_policy: The reference is the policy without its adapters.
        is_sharded: The model is sharded over ranks.
    """

    def __init__(self, model: PreTrainedModel, *, is_policy: bool = False, is_sharded: bool = False) -> None:
        self.model, self.is_policy, self.is_sharded = model, is_policy, is_sharded

    @classmethod
    def load(
        cls, source: ModelSource | None, policy: PreTrainedModel, policy_source: ModelSource, sharding: Sharding | None
    ) -> "Reference":
        """The model of a source; without one the policy as it is now.

        Args:
            source: The reference, if it is not the policy's start.
            policy: The policy, just loaded.
            policy_source: What the policy was loaded from.
            sharding: How models are sharded over ranks; None where each rank has full models.
        """
        if source is None and isinstance(policy, PeftModel):
            return cls(policy, is_policy=True, is_sharded=sharding is not None)
        if sharding is None:
            return cls(frozen_copy(policy) if source is None else freeze(load_language_model(source)))
        if source is None:
            return cls(sharded_frozen_copy(policy, load_language_model, policy_source, sharding), is_sharded=True)
        return cls(freeze(load_sharded(load_language_model, source, sharding, frozen=True)), is_sharded=True)

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The model; where it is the policy, its adapters are off inside the context."""
        if self.is_policy:
            with without_adapters(cast(PeftModel, self.model)):
                yield self.model
        else:
            yield self.model

    def samples(self) -> dict[str, dict[str, Any]]:
        """A sample of the weights by their name, see :func:`weight_sample`; none of the policy's; collective."""
        return {} if self.is_policy else {REFERENCE: weight_sample(self.model)}

    def to(self, device: torch.device) -> None:
        """Move the model; a sharded one was placed when it was loaded."""
        if not self.is_sharded:
            self.model.to(device)  # type: ignore[arg-type]
