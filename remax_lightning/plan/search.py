"""The largest micro-batch that fits, and what to change where none does; every proposal is a plan that was made."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from remax_lightning.models.lora import LoRA
from remax_lightning.plan.bench import Bench
from remax_lightning.plan.memory import usable
from remax_lightning.plan.models import Optimizer
from remax_lightning.plan.phases import plan
from remax_lightning.plan.recipe import Recipe

EIGHT_BIT_ADAM = "torchao.optim.AdamW8bit"


@dataclass(frozen=True)
class Proposal:
    """Changes of a run with which it fits.

    Args:
        arguments: Command-line arguments that make them.
        recipe: The changed run.
        peak: Bytes it takes of one GPU at its worst moment.
    """

    arguments: tuple[str, ...]
    recipe: Recipe
    peak: int


def with_micro_batch(recipe: Recipe, rows: int) -> Recipe:
    """A run with micro-batches of so many rows; it goes on to be limited by tokens if it was."""
    if recipe.micro_batch_tokens is None:
        return replace(recipe, micro_batch_size=rows)
    row = recipe.length * (2 if recipe.method == "RewardModel" else 1)
    return replace(recipe, micro_batch_size=None, micro_batch_tokens=rows * row)


def micro_batch_argument(recipe: Recipe) -> str:
    """The limit of a run's micro-batches as it is set on the command line."""
    if recipe.micro_batch_tokens is None:
        return f"--model.micro_batch_size {recipe.micro_batch_size}"
    return f"--model.micro_batch_tokens {recipe.micro_batch_tokens}"


def largest_micro_batch(recipe: Recipe, bench: Bench, gpu_memory: float) -> Recipe | None:
    """The run with the largest micro-batch that fits: a power of two of rows, or the whole batch.

    The whole batch in one pass may take less than two halves, whose gradients have to be added up.

    Args:
        recipe: The run.
        bench: What was measured so far.
        gpu_memory: Memory of a GPU, GiB.

    Returns:
        The changed run; None if no micro-batch fits.
    """
    sizes = [recipe.learned_rows]
    sizes += [2**power for power in reversed(range(recipe.learned_rows.bit_length())) if 2**power < recipe.learned_rows]
    candidates = (with_micro_batch(recipe, rows) for rows in sizes)
    return next((each for each in candidates if plan(each, bench).fits(gpu_memory)), None)


def proposals(recipe: Recipe, bench: Bench, gpu_memory: float) -> list[Proposal]:
    """Changes with which a run fits that does not with any micro-batch: each alone, or else as few as were found.

    Args:
        recipe: The run.
        bench: What was measured so far.
        gpu_memory: Memory of a GPU, GiB.
    """
    smallest = with_micro_batch(recipe, 1)
    tried = (_tried(smallest, [change], bench) for change in changes(smallest))
    alone = [each for each in tried if each.peak <= usable(gpu_memory)]
    halved = (_tried(smallest, [change], bench) for change in smaller_batches(smallest))
    alone += [each for each in halved if each.peak <= usable(gpu_memory)][:1]
    return alone or _together(smallest, bench, gpu_memory)


Change = tuple[str, Callable[[Recipe], Recipe]]


def _together(recipe: Recipe, bench: Bench, gpu_memory: float) -> list[Proposal]:
    """One set of changes that fit together and none of which can be left out; nothing if all of them do not."""
    chosen: list[Change] = [*changes(recipe), *list(smaller_batches(recipe))[1:2]]
    if _tried(recipe, chosen, bench).peak > usable(gpu_memory):
        return []
    for each in reversed(list(chosen)):
        rest = [other for other in chosen if other is not each]
        if _tried(recipe, rest, bench).peak <= usable(gpu_memory):
            chosen = rest
    return [_tried(recipe, chosen, bench)]


def _tried(recipe: Recipe, chosen: list[Change], bench: Bench) -> Proposal:
    for _, change in chosen:
        recipe = change(recipe)
    arguments = (*(argument for argument, _ in chosen), micro_batch_argument(recipe))
    return Proposal(arguments, recipe, plan(recipe, bench).peak)


def changes(recipe: Recipe) -> Iterator[Change]:
    """What may be changed in a run, the cheapest first."""
    layout = recipe.layout
    if not recipe.activation_checkpointing:
        yield "--model.activation_checkpointing true", lambda each: replace(each, activation_checkpointing=True)
    if layout.is_sharded:
        yield from _changes_of_fsdp2(recipe)
    elif layout.gpus > 1:
        yield "--trainer.strategy fsdp2 --trainer.precision 32-true", _split
    if any(scorer.source.dtype == "float32" for scorer in recipe.scorers):
        yield "--model.reward.dtype bfloat16", _half_rewards
    if "Adam" in recipe.optimizer.class_path and not recipe.optimizer.is_8bit and recipe.lora is None:
        yield f"--model.optimizer {EIGHT_BIT_ADAM}", _eight_bit
    if layout.is_sharded:
        yield f"--gpus {2 * layout.gpus}", _twice_the_gpus
    if recipe.lora is None:
        yield "--model.lora.rank 16", lambda each: replace(each, lora=LoRA(rank=16))


def smaller_batches(recipe: Recipe) -> Iterator[Change]:
    """Half of the prompts that are decoded together, a quarter, and so on."""
    size = recipe.batch_size // 2 if recipe.has_rollouts else 0
    while size > 0:
        yield f"--data.batch_size {size}", partial(_with_batch, size=size)
        size //= 2


def _with_batch(recipe: Recipe, size: int) -> Recipe:
    return replace(recipe, batch_size=size)


def _changes_of_fsdp2(recipe: Recipe) -> Iterator[Change]:
    layout, name = recipe.layout, "--trainer.strategy"
    if not layout.sync_every_micro_batch:
        yield (
            f"{name}.sync_every_micro_batch true",
            lambda each: replace(each, layout=replace(each.layout, sync_every_micro_batch=True)),
        )
    if not layout.offload_frozen and (recipe.scorers or recipe.has_reference):
        yield (
            f"{name}.offload_frozen true",
            lambda each: replace(each, layout=replace(each.layout, offload_frozen=True)),
        )


def _split(recipe: Recipe) -> Recipe:
    gpus = recipe.layout.gpus
    layout = replace(recipe.layout, strategy="fsdp2", shards=gpus, itemsize=2, autocast=False, has_buckets=False)
    return replace(recipe, layout=layout)


def _half_rewards(recipe: Recipe) -> Recipe:
    scorers = [replace(scorer, source=replace(scorer.source, dtype="bfloat16")) for scorer in recipe.scorers]
    return replace(recipe, scorers=tuple(scorers))


def _eight_bit(recipe: Recipe) -> Recipe:
    return replace(recipe, optimizer=Optimizer(EIGHT_BIT_ADAM, recipe.optimizer.init_args))


def _twice_the_gpus(recipe: Recipe) -> Recipe:
    layout = recipe.layout
    return replace(recipe, layout=replace(layout, gpus=2 * layout.gpus, shards=2 * layout.shards))
