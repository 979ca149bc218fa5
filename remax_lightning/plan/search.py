"""The largest micro-batch that fits, and what to change where none does; every proposal is planned itself."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from remax_lightning.plan.cache import DryRunCache
from remax_lightning.plan.memory import usable
from remax_lightning.plan.phases import plan
from remax_lightning.plan.recipe import Recipe, read

EIGHT_BIT_ADAM = "torchao.optim.AdamW8bit"
Change = dict[str, Any]
"""Arguments of the command line and their values."""


@dataclass(frozen=True)
class Proposal:
    """Changes of a run with which it fits.

    Args:
        arguments: The changed arguments of the command line, as they are typed.
        peak: Bytes that the changed run takes of a GPU at most.
    """

    arguments: str
    peak: int


def largest_micro_batch(recipe: Recipe, cache: DryRunCache, gpu_memory: float) -> Recipe | None:
    """The run with the largest micro-batch that fits: a power of two of rows, or the whole batch; None if none fits.

    The whole batch in one pass may take less than two halves, whose gradients have to be added up.
    """
    sizes = [recipe.learned_rows]
    sizes += [2**power for power in reversed(range(recipe.learned_rows.bit_length())) if 2**power < recipe.learned_rows]
    candidates = (with_micro_batch(recipe, rows) for rows in sizes)
    return next((each for each in candidates if plan(each, cache).fits(gpu_memory)), None)


def with_micro_batch(recipe: Recipe, rows: int) -> Recipe:
    """A run with micro-batches of this many rows, limited by tokens if it was before."""
    if recipe.micro_batch_tokens is None:
        return replace(recipe, micro_batch_size=rows)
    return replace(recipe, micro_batch_size=None, micro_batch_tokens=rows * recipe.row_tokens)


def micro_batch_argument(recipe: Recipe) -> str:
    """The limit of a run's micro-batches as it is set on the command line."""
    limits = {"micro_batch_tokens": recipe.micro_batch_tokens, "micro_batch_size": recipe.micro_batch_size}
    return next(f"--model.{name} {limit}" for name, limit in limits.items() if limit is not None)


def proposals(config: Mapping[str, Any], gpus: int, cache: DryRunCache, gpu_memory: float) -> list[Proposal]:
    """Changes with which a run fits that does not with any micro-batch: each alone, or else the fewest together.

    Args:
        config: The parsed configuration of the run.
        gpus: Number of GPUs.
        cache: What was built and run so far.
        gpu_memory: Memory of a GPU, GiB.
    """
    limit, recipe = usable(gpu_memory), read(config, gpus)

    def tried(chosen: Sequence[Change]) -> Proposal:
        arguments = {key: value for change in chosen for key, value in change.items()}
        changed = config
        for key, value in arguments.items():
            changed = changed if key == "gpus" else with_argument(changed, key, value)
        smallest = with_micro_batch(read(changed, arguments.get("gpus", gpus)), 1)
        typed = [f"--{key} {str(value).lower() if value is True else value}" for key, value in arguments.items()]
        return Proposal(" ".join([*typed, micro_batch_argument(smallest)]), plan(smallest, cache).peak)

    larger, smaller = list(changes(recipe)), list(smaller_batches(recipe))
    alone = [each for each in map(tried, ([change] for change in larger)) if each.peak <= limit]
    alone += [each for each in map(tried, ([change] for change in smaller)) if each.peak <= limit][:1]
    chosen = [*larger, *smaller[1:2]]
    if alone or tried(chosen).peak > limit:
        return alone
    for change in reversed(list(chosen)):  # what is not needed with all the others is dropped, the costliest first
        rest = [other for other in chosen if other is not change]
        chosen = rest if tried(rest).peak <= limit else chosen
    return [tried(chosen)]


def changes(recipe: Recipe) -> Iterator[Change]:
    """What may be changed in a run, the cheapest first."""
    layout = recipe.layout
    if not recipe.model.is_checkpointed:
        yield {"model.activation_checkpointing": True}
    if layout.is_sharded and not layout.sync_every_micro_batch:
        yield {"trainer.strategy.sync_every_micro_batch": True}
    if layout.is_sharded and not layout.offload_frozen and (recipe.scorers or recipe.has_reference):
        yield {"trainer.strategy.offload_frozen": True}
    if layout.gpus > 1 and not layout.is_sharded:
        yield {"trainer.strategy": "fsdp2", "trainer.precision": "32-true"}
    if wide := [each.spec.name for each in recipe.scorers if each.spec.source.dtype == "float32"]:
        yield {f"{name}.dtype": "bfloat16" for name in wide}
    if "Adam" in recipe.optimizer.class_path and not recipe.optimizer.is_8bit and recipe.model.lora is None:
        yield {"model.optimizer": EIGHT_BIT_ADAM}
    if layout.is_sharded:
        yield {"gpus": 2 * layout.gpus}
    if recipe.model.lora is None:
        yield {"model.lora.rank": 16}


def smaller_batches(recipe: Recipe) -> Iterator[Change]:
    """Half of the prompts that are decoded together, a quarter, and so on."""
    size = recipe.batch_size // 2 if recipe.sampling is not None else 0
    while size > 0:
        yield {"data.batch_size": size}
        size //= 2


def with_argument(config: Any, key: str, value: Any) -> Any:
    """A parsed configuration with one argument as the command line would set it.

    Args:
        config: Nested dictionaries and lists; it is not changed.
        key: Names joined by dots, without the ``init_args`` of classes.
        value: The value; the name of a class leaves the arguments of the class before it.
    """
    first, _, rest = key.partition(".")
    if isinstance(config, list):
        return [with_argument(each, rest, value) if str(place) == first else each for place, each in enumerate(config)]
    given = {"class_path": config} if isinstance(config, str) else config or {}
    if "class_path" in given:
        return {**given, "init_args": with_argument(given.get("init_args"), key, value)}
    before = given.get(first)
    if rest:
        return {**given, first: with_argument(before, rest, value)}
    if isinstance(before, Mapping) and "class_path" in before:
        value = {**before, "class_path": value}
    return {**given, first: value}
