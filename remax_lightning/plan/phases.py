"""The points of a step at which memory may be at its peak, for a run and for a PPO of the same size."""

from dataclasses import replace

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from remax_lightning.plan import passes
from remax_lightning.plan.cache import DryRunCache
from remax_lightning.plan.dry_run import Usage
from remax_lightning.plan.memory import MemoryPoint, Plan
from remax_lightning.plan.models import ModelSpec, Weights
from remax_lightning.plan.recipe import Recipe
from remax_lightning.rollout.next_logits import compiled_length
from remax_lightning.rollout.types import Sampling


def plan(recipe: Recipe, cache: DryRunCache) -> Plan:
    """The memory of one GPU over a step, every sequence at its full length."""
    step = _Step(recipe, cache)
    phases = {"training": step.training()}
    if recipe.sampling is not None:
        phases = {"rollout": step.rollout(recipe.sampling), "scoring": step.scoring(), **phases}
    return Plan("PPO" if recipe.trains_value else recipe.name, phases)


def as_ppo(recipe: Recipe) -> Recipe:
    """A PPO of the same size: a trained value model, no greedy responses.

    Policy and value model are updated one after the other, so the activations of only one exist at a time.
    """
    return replace(recipe, decodes_greedy=False, trains_value=True)


def value_model(recipe: Recipe) -> ModelSpec:
    """The value model: as the reward model if that is a decoder, else as the policy; stored in the policy's type."""
    source, name = recipe.model.source, recipe.model.name
    for scorer in recipe.scorers[:1]:
        if scorer.spec.load_config().model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            source, name = replace(scorer.spec.source, dtype=source.dtype), scorer.spec.name
    return ModelSpec(source, name, is_scalar=True, is_trained=True, is_checkpointed=recipe.model.is_checkpointed)


class _Step:
    """A recipe with what all points have in common."""

    def __init__(self, recipe: Recipe, cache: DryRunCache) -> None:
        self.recipe, self.layout, self.cache = recipe, recipe.layout, cache
        self.weights = cache.weights(recipe.model, recipe.optimizer, self.layout)
        self.value: tuple[ModelSpec, Weights] | None = None
        if recipe.trains_value:
            spec = value_model(recipe)
            self.value = (spec, cache.weights(spec, recipe.optimizer, self.layout))
        self.states = self._states()

    def _states(self) -> dict[str, int]:
        """What is in memory all the time."""
        recipe, layout, reference = self.recipe, self.layout, self._separate_reference
        states = {
            "master weights": self.weights.masters,
            "optimizer states": self.weights.optimizer,
            "gradients": self.weights.gradients if layout.has_buckets else 0,
            "reference": 0 if reference is None else self.cache.frozen(reference, layout),
            "reward model": sum(self.cache.frozen(scorer.spec, layout) for scorer in recipe.scorers),
        }
        if recipe.engine == "compiled" and recipe.sampling is not None:
            states["KV cache"] = self._rollout_usages(recipe.sampling)[0].cache
        if self.value is not None:
            _, value = self.value
            states["value model"] = value.masters + value.optimizer + (value.gradients if layout.has_buckets else 0)
        return states

    def _point(self, name: str, *parts: dict[str, int]) -> MemoryPoint:
        return MemoryPoint.of(name, self.states, *parts)

    def _pass(self, name: str, gathered: int, usage: Usage, *parts: dict[str, int]) -> MemoryPoint:
        """The peak of a pass through a model of which this many bytes are gathered."""
        return self._point(name, {"compute copy": gathered + usage.copies, "activations": usage.peak}, *parts)

    @property
    def _separate_reference(self) -> ModelSpec | None:
        """The reference, if it has weights of its own: a policy with adapters is its own reference without them."""
        recipe = self.recipe
        if recipe.has_reference and recipe.reference is not None:
            return recipe.reference
        if not recipe.has_reference or recipe.model.lora is not None:
            return None
        source = recipe.model.source
        if self.layout.itemsize == 2:  # a sharded copy is stored in the type of the computation
            source = replace(source, dtype="bfloat16")
        return ModelSpec(source, recipe.model.name)

    def rollout(self, sampling: Sampling) -> list[MemoryPoint]:
        """Prefill and the last step of decoding, the policy gathered."""
        if self.recipe.engine == "other":
            return [self._point("in another engine")]
        gathered = self.cache.gathered(self.recipe.model, self.layout)
        is_kept = self.recipe.engine == "compiled"  # the cache is in memory all the time
        return [
            self._pass(name, gathered, usage, {"KV cache": 0 if is_kept else usage.cache})
            for name, usage in zip(("prefill", "decoding"), self._rollout_usages(sampling), strict=True)
        ]

    def _rollout_usages(self, sampling: Sampling) -> tuple[Usage, Usage]:
        recipe = self.recipe
        columns = compiled_length(recipe.length) if recipe.engine == "compiled" else recipe.length
        arguments = (recipe.batch_size, recipe.decoded_rows, (recipe.prompt_length, columns), sampling)
        spec = replace(recipe.model, is_checkpointed=False)
        return self.cache.run(passes.rollout, spec, self.layout, *arguments)

    def scoring(self) -> list[MemoryPoint]:
        """Reward, reference and value model one after the other."""
        recipe, points = self.recipe, []
        for scorer in recipe.scorers:
            if scorer.spec.name.startswith("model.reward"):  # a judge scores in evaluations alone
                rows = min(scorer.batch_size, recipe.decoded_rows)
                length = min(scorer.max_length or recipe.length, recipe.length)
                usage = self.cache.run(passes.scalar_model_scoring, scorer.spec, self.layout, rows, length)
                points.append(self._pass("reward model", self.cache.gathered(scorer.spec, self.layout), usage))
        if recipe.has_reference:
            points.append(self._reference())
        if self.value is not None:
            spec, weights = self.value
            usage = self.cache.run(passes.scalar_model_scoring, spec, self.layout, recipe.micro_rows, recipe.length)
            points.append(self._pass("value model", weights.working, usage))
        return points or [self._point("reward")]

    def _reference(self) -> MemoryPoint:
        recipe = self.recipe
        spec = self._separate_reference or replace(recipe.model, is_checkpointed=False)
        rows, learned = recipe.micro_rows, recipe.learned_length
        usage = self.cache.run(passes.language_model_scoring, spec, self.layout, rows, recipe.length, learned)
        head = self.cache.run(passes.head_scoring, spec, self.layout, rows * learned)
        return self._pass("reference", self.cache.gathered(spec, self.layout), usage, {"head": head.peak})

    def training(self) -> list[MemoryPoint]:
        """The head, the rest of the backward pass and the optimizer's step, of the policy and of the value model."""
        recipe, usage, gradients = self.recipe, self._training_usage(), self._in_backward(self.weights)
        update = {"compute copy": self.weights.working + usage.copies, "gradients": gradients}
        points = []
        if (head := self._head_usage().peak) > 0:
            terms = {"activations": usage.saved, "head": head}
            if recipe.num_passes == 1:  # the backward pass that makes the other gradients comes after the head's
                terms["gradients"] = -gradients
            points.append(self._point("head", update, terms))
        points.append(self._point("backward", update, {"activations": usage.peak, "head": self.weights.head}))
        step = {"gradients": self.weights.gradients + self.weights.step, "compute copy": usage.copies}
        if self.value is not None:
            _, value = self.value
            points.append(self._value_backward(*self.value))
            step["value model"] = value.gradients + value.step
        return [*points, self._point("optimizer step", step)]

    def _value_backward(self, spec: ModelSpec, weights: Weights) -> MemoryPoint:
        """The value model's backward pass, after the policy's."""
        arguments = (self.recipe.micro_rows, self.recipe.length, self._gradient_size(weights))
        usage = self.cache.run(passes.scalar_model_training, spec, self.layout, *arguments)
        gradients = {"gradients": self.weights.gradients, "value model": self._in_backward(weights)}
        return self._pass("value backward", weights.working, usage, gradients)

    def _training_usage(self) -> Usage:
        recipe, size = self.recipe, self._gradient_size(self.weights)
        if recipe.model.is_scalar:
            arguments = (2 * recipe.micro_rows, recipe.length, size)
            return self.cache.run(passes.scalar_model_training, recipe.model, self.layout, *arguments)
        shape = (recipe.micro_rows, recipe.length, recipe.learned_length)
        return self.cache.run(passes.language_model_training, recipe.model, self.layout, *shape, size)

    def _head_usage(self) -> Usage:
        if self.recipe.model.is_scalar:
            return Usage()
        tokens = self.recipe.micro_rows * self.recipe.learned_length
        return self.cache.run(passes.head_training, self.recipe.model, self.layout, tokens)

    def _gradient_size(self, weights: Weights) -> float:
        """Bytes stored of a number in a gradient, if gradients come in the only pass; 0 if they are there before it."""
        return 4 * weights.gradients / weights.unsharded_gradients if self.recipe.num_passes == 1 else 0.0

    def _in_backward(self, weights: Weights) -> int:
        """Bytes of gradients in the last backward pass of a step."""
        accumulates = self.recipe.num_passes > 1 and not self.layout.sync_every_micro_batch
        if self.layout.is_sharded and accumulates:
            return max(weights.unsharded_gradients, weights.gradients) + weights.reduced
        return weights.gradients + weights.reduced
