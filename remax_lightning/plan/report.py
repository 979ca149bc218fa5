"""Prints a plan: a table of phases and terms, whether it fits, and what to change."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from remax_lightning.plan.bench import Bench
from remax_lightning.plan.memory import CONTEXT, FRAGMENTATION, GIB, TERMS, Plan, usable
from remax_lightning.plan.phases import as_ppo, plan, value_body
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
    recipe, bench = read(config, gpus), Bench()
    own = plan(recipe, bench)
    compared = [own]
    if recipe.has_rollouts and not recipe.trains_value:
        compared.append(plan(as_ppo(recipe), bench))
    console = Console(width=max(WIDTH, Console().width), highlight=False, markup=False)
    console.print(f"Peak memory of each of {gpus} GPU(s) in GiB")
    console.print(table(compared))
    lines = [*summary(compared, recipe, gpu_memory), *advice(recipe, bench, gpu_memory)]
    if not compared[-1].fits(gpu_memory) and len(compared) > 1:
        lines.append(f"PPO: {best_micro_batch(as_ppo(recipe), bench, gpu_memory) or 'no micro-batch fits'}")
    for line in lines:
        console.print(line, soft_wrap=True)


def table(plans: Sequence[Plan]) -> Table:
    """Terms by phase, GiB, each phase at its peak; the plans side by side."""
    result = Table()
    result.add_column("")
    peaks = [(each.name, phase.name, phase.peak) for each in plans for phase in each.phases]
    for number, (name, phase, _) in enumerate(peaks):
        is_new = number == 0 or peaks[number - 1][0] != name
        result.add_column(f"{name if is_new else ''}\n{phase}", justify="right")
    result.add_row("at", *(peak.name for *_, peak in peaks), end_section=True)
    for term in TERMS:
        sizes = [peak.terms[term] for *_, peak in peaks]
        if any(sizes):
            result.add_row(term, *(f"{size / GIB:.2f}" if size else "" for size in sizes))
    result.add_section()
    result.add_row("total", *(f"{peak.total / GIB:.2f}" for *_, peak in peaks))
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
    passes = f"{recipe.num_passes} x {recipe.micro_rows} {'pairs' if recipe.method == 'RewardModel' else 'rows'}"
    lines.append(f"A step of a GPU trains on {passes} of {recipe.length} tokens; all rows at full length.")
    if len(plans) > 1:
        source = value_body(recipe).name
        lines.append(f"The PPO has a value model of {source}'s architecture, updated after the policy.")
    if not recipe.has_engine:
        lines.append("Responses come from an engine whose memory is not counted.")
    return lines


def best_micro_batch(recipe: Recipe, bench: Bench, gpu_memory: float) -> str | None:
    """A sentence on the largest micro-batch that fits; None if there is none."""
    largest = largest_micro_batch(recipe, bench, gpu_memory)
    if largest is None:
        return None
    peak = plan(largest, bench).peak / GIB
    return f"largest micro-batch that fits: {micro_batch_argument(largest)} (peak {peak:.1f} GiB)"


def advice(recipe: Recipe, bench: Bench, gpu_memory: float) -> list[str]:
    """The largest micro-batch that fits, or what to change."""
    if (best := best_micro_batch(recipe, bench, gpu_memory)) is not None:
        return [f"{recipe.name}: {best}"]
    found = proposals(recipe, bench, gpu_memory)
    if not found:
        return ["No micro-batch fits, and nothing that plan knows to change makes it fit."]
    lines = ["No micro-batch fits. It would with:"]
    for each in found:
        needed = ", needs torchao" if any(EIGHT_BIT_ADAM in argument for argument in each.arguments) else ""
        lines.append(f"  {' '.join(each.arguments)} (peak {each.peak / GIB:.1f} GiB{needed})")
    return lines
