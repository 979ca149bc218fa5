"""The moments of a step at which memory may be at its peak, for a run and for a PPO of the same size."""

from dataclasses import replace

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from remax_lightning.plan import passes
from remax_lightning.plan.bench import Bench, Body
from remax_lightning.plan.dry_run import Usage
from remax_lightning.plan.memory import Moment, Phase, Plan, moment
from remax_lightning.plan.models import Weights, load_config
from remax_lightning.plan.recipe import Recipe, Scorer

Terms = dict[str, int]
LENGTH_STEP = 128
"""A compiled rollout rounds the length of its cache up to a multiple of this."""


def plan(recipe: Recipe, bench: Bench) -> Plan:
    """The memory of one GPU over a step, every sequence at its full length."""
    run = _Run(recipe, bench)
    phases = [Phase("training", tuple(run.training()))]
    if recipe.has_rollouts:
        phases = [Phase("rollout", tuple(run.rollout())), Phase("scoring", tuple(run.scoring())), *phases]
    return Plan("PPO" if recipe.trains_value else recipe.name, tuple(phases))


def as_ppo(recipe: Recipe) -> Recipe:
    """A PPO of the same size: a trained value model, no greedy responses.

    Policy and value model are updated one after the other, so the activations of only one exist at a time.
    """
    return replace(recipe, method="PolicyGradientModule", trains_value=True)


def value_body(recipe: Recipe) -> Body:
    """The value model: as the reward model if that is a decoder, else as the policy; kept in the policy's type."""
    source, name = recipe.source, "model.policy"
    for scorer in recipe.scorers[:1]:
        if load_config(scorer.source, scorer.name).model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            source, name = replace(scorer.source, dtype=recipe.source.dtype), scorer.name
    return Body(source, name, is_scalar=True, is_trained=True, is_checkpointed=recipe.activation_checkpointing)


class _Run:
    """A recipe with what all moments have in common."""

    def __init__(self, recipe: Recipe, bench: Bench) -> None:
        self.recipe, self.layout, self.bench = recipe, recipe.layout, bench
        self.body = Body(
            recipe.source,
            "model.model" if recipe.method == "RewardModel" else "model.policy",
            is_scalar=recipe.method == "RewardModel",
            is_trained=True,
            is_checkpointed=recipe.activation_checkpointing,
            lora=recipe.lora,
        )
        self.weights = bench.weights(self.body, recipe.optimizer, self.layout)
        self.value = value_body(recipe) if recipe.trains_value else None
        self.value_weights = None if self.value is None else bench.weights(self.value, recipe.optimizer, self.layout)
        self.head = None if self.body.is_scalar else bench.head(self.body, self.layout)
        self.states = self._states()

    def _states(self) -> Terms:
        """What is there all the time."""
        layout, scorers = self.layout, self.recipe.scorers
        terms = {
            "master weights": self.weights.masters,
            "optimizer states": self.weights.optimizer,
            "gradients": self.weights.gradients if layout.has_buckets else 0,
            "reference": 0 if self._own_reference is None else self.bench.frozen(self._own_reference, layout),
            "reward model": sum(self.bench.frozen(_scorer_body(scorer), layout) for scorer in scorers),
            "KV cache": self._rollout_usages()[0].cache if self.recipe.keeps_cache else 0,
        }
        if self.value_weights is not None:
            buckets = self.value_weights.gradients if layout.has_buckets else 0
            terms["value model"] = self.value_weights.masters + self.value_weights.optimizer + buckets
        return terms

    @property
    def _own_reference(self) -> Body | None:
        """The reference, if it is a model of its own: without its adapters a policy is its own reference."""
        if not self.recipe.has_reference or (self.recipe.lora is not None and self.recipe.reference is None):
            return None
        if self.recipe.reference is None:
            is_half = (
                self.layout.is_sharded and self.layout.itemsize == 2
            )  # a split copy has the type of the computation
            source = replace(self.recipe.source, dtype="bfloat16") if is_half else self.recipe.source
            return Body(source, "model.policy")
        return Body(self.recipe.reference, "model.reference")

    def rollout(self) -> list[Moment]:
        """Prefill and the last step of decoding, the whole policy gathered."""
        if not self.recipe.has_engine:
            return [moment("in another engine", self.states)]
        copy = self.bench.gathered(self.body, self.layout)
        moments = []
        for name, usage in zip(("prefill", "decoding"), self._rollout_usages(), strict=True):
            cache = 0 if self.recipe.keeps_cache else usage.cache
            own = {"compute copy": copy + usage.copies, "KV cache": cache, "activations": usage.peak}
            moments.append(moment(name, self.states, own))
        return moments

    def _rollout_usages(self) -> tuple[Usage, Usage]:
        recipe = self.recipe
        columns = recipe.length
        if recipe.keeps_cache:
            columns = -(-columns // LENGTH_STEP) * LENGTH_STEP
        body = replace(self.body, is_checkpointed=False)
        arguments = (recipe.batch_size, recipe.decoded_rows, (recipe.prompt_length, columns), recipe.sampling)
        return self.bench.run(passes.rollout, body, self.layout, *arguments)

    def scoring(self) -> list[Moment]:
        """Reward, reference and value model one after the other."""
        moments = [self._reward(scorer) for scorer in self.recipe.scorers if scorer.name.startswith("model.reward")]
        if self.recipe.has_reference:
            moments.append(self._reference())
        if self.value is not None and self.value_weights is not None:
            rows = self.recipe.micro_rows
            usage = self.bench.run(passes.scalar_model_scoring, self.value, self.layout, rows, self.recipe.length)
            copy = self.value_weights.working + usage.copies
            moments.append(moment("value model", self.states, {"compute copy": copy, "activations": usage.peak}))
        return moments or [moment("reward", self.states)]

    def _reward(self, scorer: Scorer) -> Moment:
        rows = min(scorer.batch_size, self.recipe.decoded_rows)
        length = min(scorer.max_length or self.recipe.length, self.recipe.length)
        body = _scorer_body(scorer)
        usage = self.bench.run(passes.scalar_model_scoring, body, self.layout, rows, length)
        copy = self.bench.gathered(body, self.layout) + usage.copies
        return moment("reward model", self.states, {"compute copy": copy, "activations": usage.peak})

    def _reference(self) -> Moment:
        recipe = self.recipe
        body = self._own_reference or replace(self.body, is_checkpointed=False)
        kept = recipe.sampling.max_new_tokens
        arguments = (recipe.micro_rows, recipe.length, kept)
        usage = self.bench.run(passes.language_model_scoring, body, self.layout, *arguments)
        head = self.bench.head(body, self.layout)
        tokens = recipe.micro_rows * kept
        own = {
            "compute copy": self.bench.gathered(body, self.layout) + usage.copies,
            "activations": usage.peak,
            "head": 0 if head is None else head.scoring(tokens),
        }
        return moment("reference", self.states, own)

    def training(self) -> list[Moment]:
        """The head, the rest of the backward pass and the optimizer's step, of the policy and of the value model."""
        recipe, usage = self.recipe, self._training_usage()
        update = {
            "compute copy": self.weights.working + usage.copies,
            "gradients": in_backward(self.weights, recipe),
        }
        moments = []
        if self.head is not None:
            tokens = recipe.micro_rows * self._kept
            head = {"activations": usage.saved, "head": max(self.head.training(tokens), self.head.backward(tokens))}
            if recipe.num_passes == 1:  # there are no others yet
                head["gradients"] = -update["gradients"]
            moments.append(moment("head", self.states, update, head))
        body = {"activations": usage.peak, "head": self.weights.head}
        moments.append(moment("backward", self.states, update, body))
        step = {"gradients": self.weights.gradients + self.weights.step, "compute copy": usage.copies}
        if self.value is not None:
            moments.append(self._value_backward())
        if self.value_weights is not None:
            step["value model"] = self.value_weights.gradients + self.value_weights.step
        return [*moments, moment("optimizer step", self.states, step)]

    def _value_backward(self) -> Moment:
        """The value model's backward pass, after the policy's."""
        assert self.value is not None
        assert self.value_weights is not None
        arguments = (self.recipe.micro_rows, self.recipe.length, self._gradient_size(self.value_weights))
        usage = self.bench.run(passes.scalar_model_training, self.value, self.layout, *arguments)
        own = {
            "gradients": self.weights.gradients,
            "value model": in_backward(self.value_weights, self.recipe),
            "compute copy": self.value_weights.working + usage.copies,
            "activations": usage.peak,
        }
        return moment("value backward", self.states, own)

    @property
    def _kept(self) -> int:
        """Last positions of a row that are learned from, at most."""
        return self.recipe.sampling.max_new_tokens if self.recipe.has_rollouts else self.recipe.length - 1

    def _training_usage(self) -> Usage:
        rows, length, size = self.recipe.micro_rows, self.recipe.length, self._gradient_size(self.weights)
        if self.body.is_scalar:  # pairs
            return self.bench.run(passes.scalar_model_training, self.body, self.layout, 2 * rows, length, size)
        return self.bench.run(passes.language_model_training, self.body, self.layout, rows, length, self._kept, size)

    def _gradient_size(self, weights: Weights) -> float:
        """Bytes kept of a number in a gradient, if gradients come in the only pass; 0 if they are there before it."""
        return 4 * weights.gradients / weights.whole_gradients if self.recipe.num_passes == 1 else 0.0


def in_backward(weights: Weights, recipe: Recipe) -> int:
    """Bytes of gradients in the last backward pass of a step."""
    accumulates = recipe.num_passes > 1 and not recipe.layout.sync_every_micro_batch
    if recipe.layout.is_sharded and accumulates:
        return max(weights.whole_gradients, weights.gradients) + weights.reduced
    return weights.gradients + weights.reduced


def _scorer_body(scorer: Scorer) -> Body:
    return Body(scorer.source, scorer.name, is_scalar=True, label=scorer.label)
