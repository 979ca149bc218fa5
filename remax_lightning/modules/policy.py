"""A module whose model is a policy: it turns prompts into responses."""

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from remax_lightning.models.language_model import load_language_model, stop_token_ids
from remax_lightning.models.parallelize import gathered
from remax_lightning.models.sharded_loading import build_on_meta
from remax_lightning.models.source import ModelSource
from remax_lightning.modules.base import TrainableModule
from remax_lightning.rollout import Rollout, RolloutEngine, Sampling, TransformersEngine


class PolicyModule(TrainableModule):
    """A causal language model that is trained and that responds to prompts.

    Args:
        policy: The model to train.
        sampling: How its responses are drawn.
        engine: What draws them; the default is the embedded engine, which decodes with the policy itself.
        seed: Key of all sampled responses: they are a function of the weights, this seed, the step and the prompt.
        **kwargs: As in TrainableModule.
    """

    policy: PreTrainedModel

    def __init__(
        self, policy: ModelSource, sampling: Sampling, engine: RolloutEngine | None = None, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.policy_source, self.sampling, self.seed = policy, sampling, seed
        self.engine = TransformersEngine() if engine is None else engine
        self.tokenizer = policy.load_tokenizer()

    @property
    def trained_model(self) -> PreTrainedModel:
        """The policy."""
        return self.policy

    def build_on_meta(self) -> PreTrainedModel:
        """The policy on the meta device."""
        return build_on_meta(load_language_model, self.policy_source, self.lora)

    def setup(self, stage: str) -> None:
        """Refuse what cannot be right."""
        super().setup(stage)
        if self.sharding is not None and isinstance(self.engine, TransformersEngine) and self.engine.compile:
            raise ValueError("engine.compile does not work under fsdp2, whose weights move; set it to false")

    def configure_model(self) -> None:
        """Load or build the policy, once."""
        if "policy" not in self._modules:
            self.policy = self.load(load_language_model, self.policy_source)
            self.stop_token_ids = stop_token_ids(self.policy, self.tokenizer)

    def respond(
        self,
        policy: PreTrainedModel,
        batch: dict[str, Any],
        sampling: Sampling,
        *,
        step: int = 0,
        greedy: bool = True,
        greedy_max_new_tokens: int | None = None,
    ) -> tuple[Rollout, Rollout | None]:
        """Sampled responses of a policy to a batch of prompts, and the greedy ones; see RolloutEngine.generate."""
        with gathered(policy):
            return self.engine.generate(
                policy,
                batch,
                sampling,
                stop_token_ids=self.stop_token_ids,
                greedy=greedy,
                greedy_max_new_tokens=greedy_max_new_tokens,
                seed=self.seed,
                step=step,
            )

    def texts(self, rollout: Rollout) -> list[str]:
        """The responses as text, without special tokens."""
        rows = [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """A row for each prompt: the data's columns, a sampled response and the greedy one."""
        sampled, greedy = self.respond(self.policy, batch, replace(self.sampling, num_samples=1))
        assert greedy is not None
        responses = zip(self.texts(sampled), self.texts(greedy), strict=True)
        return [
            {**row, "response": response, "greedy_response": greedy_response}
            for row, (response, greedy_response) in zip(rows_of(raw_columns(batch)), responses, strict=True)
        ]


def raw_columns(batch: dict[str, Any]) -> dict[str, list[Any]]:
    """The columns of a batch as they stand in the data: all that are not tensors."""
    return {name: column for name, column in batch.items() if not isinstance(column, Tensor)}


def rows_of(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Columns of equal length as rows."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
