"""Prints a plan: a table of phases and terms, whether it fits, and what to change."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from remax_lightning.plan.cache import DryRunCache
from remax_lightning.plan.memory import CONTEXT, FRAGMENTATION, GIB, TERMS, Plan, usable
from remax_lightning.plan.phases import as_ppo, plan, value_model
from remax_lightning.plan.recipe import Recipe, read
from remax_lightning.plan.search import EIGHT_BIT_ADAM, largest_micro_batch, micro_batch_argument, proposals

WIDTH = 100


def print_plan(config: Mapping[str, Any], gpus: int, gpu_memory: float) -> None:
    """Print the memory that a run takes of each GPU.

    Args:
        config: The parsed configuration of the run, as nested dictionaries.
        gpus: Number of GPUs.
        gpu_memory: Memory of each, GiB.

    Raises:
        ValueError: If a number is out of its range, or the run is of a kind whose memory is not known.
    """
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    if not usable(gpu_memory) > 0:
        raise ValueError(f"gpu_memory, in GiB, must be more than what is reserved of it, got {gpu_memory}")
    recipe, cache = read(config, gpus), DryRunCache()
    recipes = [recipe]
    if recipe.sampling is not None and not recipe.trains_value:
        recipes.append(as_ppo(recipe))
    plans = [plan(each, cache) for each in recipes]
    console = Console(width=max(WIDTH, Console().width), highlight=False, markup=False)
    console.print(f"Peak memory of each of {gpus} GPU(s) in GiB")
    console.print(table(plans))
    lines = summary(plans, recipe, gpu_memory)
    if (best := best_micro_batch(recipe, cache, gpu_memory)) is not None:
        lines.append(f"{recipe.name}: {best}")
    else:
        lines += advice(config, gpus, cache, gpu_memory)
    if len(plans) > 1 and not plans[1].fits(gpu_memory):
        lines.append(f"PPO: {best_micro_batch(recipes[1], cache, gpu_memory) or 'no micro-batch fits'}")
    for line in lines:
        console.print(line, soft_wrap=True)


def table(plans: Sequence[Plan]) -> Table:
    """Terms by phase, GiB, each phase at its peak; the plans side by side."""
    result = Table()
    result.add_column("")
    for each in plans:
        for number, phase in enumerate(each.phases):
            result.add_column(f"{'' if number else each.name}\n{phase}", justify="right")
    peaks = [peak for each in plans for peak in each.peaks.values()]
    result.add_row("at", *(peak.name for peak in peaks), end_section=True)
    for term in TERMS:
        sizes = [peak.terms[term] for peak in peaks]
        if any(sizes):
            result.add_row(term, *(f"{size / GIB:.2f}" if size else "" for size in sizes))
    result.add_section()
    result.add_row("total", *(f"{peak.total / GIB:.2f}" for peak in peaks))
    return result


def summary(plans: Sequence[Plan], recipe: Recipe, gpu_memory: float) -> list[str]:
    """Whether each plan fits, and what was counted."""
    lines = []
    for each in plans:
        verdict = "fits" if each.fits(gpu_memory) else "does not fit"
        lines.append(f"{each.name}: peak {each.peak / GIB:.1f} GiB of {usable(gpu_memory) / GIB:.1f} usable: {verdict}")
    lines.append(
        f"Usable of {gpu_memory:g} GiB: all but {CONTEXT:g} GiB for CUDA and NCCL and {FRAGMENTATION:.0%} for the "
        "allocator's gaps."
    )
    passes = f"{recipe.num_passes} x {recipe.micro_rows} {'pairs' if recipe.model.is_scalar else 'rows'}"
    lines.append(f"A step of a GPU trains on {passes} of {recipe.length} tokens; all rows at full length.")
    if len(plans) > 1:
        lines.append(
            f"The PPO has a value model of {value_model(recipe).name}'s architecture, updated after the policy."
        )
    if recipe.engine == "other":
        lines.append("Responses come from an engine whose memory is not counted.")
    return lines


def best_micro_batch(recipe: Recipe, cache: DryRunCache, gpu_memory: float) -> str | None:
    """The largest micro-batch that fits, in words; None if there is none."""
    if (largest := largest_micro_batch(recipe, cache, gpu_memory)) is None:
        return None
    peak = plan(largest, cache).peak / GIB
    return f"largest micro-batch that fits: {micro_batch_argument(largest)} (peak {peak:.1f} GiB)"


def advice(config: Mapping[str, Any], gpus: int, cache: DryRunCache, gpu_memory: float) -> list[str]:
    """What to change in a run that fits with no micro-batch."""
    if not (found := proposals(config, gpus, cache, gpu_memory)):
        return ["No micro-batch fits, and nothing that plan knows to change makes it fit."]
    lines = ["No micro-batch fits. It would with:"]
    for each in found:
        needed = ", needs torchao" if EIGHT_BIT_ADAM in each.arguments else ""
        lines.append(f"  {each.arguments} (peak {each.peak / GIB:.1f} GiB{needed})")
    return lines
