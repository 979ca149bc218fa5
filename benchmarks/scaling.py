"""How the cost of one ReMax step grows with prompts, response length and vocabulary, and whether memory stays apart.

A step is a rollout (a sampled and a greedy response to each prompt), the log-probs of a frozen reference and an update
by AdamW; reward, data and trainer are left out. A Llama with random weights (hidden 256, 4 layers, untied), fp32, one
thread, prompts of 64 tokens, no stop token. One variable at a time leaves the base of 16 prompts, 128 new tokens and a
vocabulary of 8192. Reference and update go over 1024 tokens at a time (1 and 4 prompts have fewer), so of all memory
only the key-value cache should grow with prompts times length; the vocabulary counts for the head: its gradient, its
weight as laid out for decoding, the logits of a chunk. Seconds have a term of vocabulary times tokens, memory has none.

Each point is a process of its own: CPU seconds after a small warm-up, and the peak memory of each phase beyond what is
resident once the models and the optimizer's state exist. An exponent is a slope in logarithms: 1 is linear, less has a
constant part. The corner, longest responses and largest vocabulary at once, has to take less memory than these two
apart take together, and a small part of what all logits of the responses would take.

    python benchmarks/scaling.py --output benchmarks/results/scaling.json
"""

import argparse
import ctypes
import json
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from harness import one_thread, peak_mib
from machine import machine
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table
from rollout import build
from torch import Tensor

from remax_lightning.functional import remax_advantages
from remax_lightning.models.language_model import frozen_copy
from remax_lightning.models.next_token import log_probs_of, policy_gradient_of
from remax_lightning.rollout import Rollout, Samples, Sampling, TransformersEngine
from remax_lightning.rollout.types import ResponsesType

PROMPT_LENGTH, MICRO_BATCH_TOKENS, KL_COEF = 64, 1024, 0.05
BASE = {"prompts": 16, "length": 128, "vocabulary": 8192}
AXES = {"prompts": [1, 4, 16, 64], "length": [32, 128, 512], "vocabulary": [8192, 32768, 152064]}
POINTS = {axis: [{**BASE, axis: size} for size in sizes] for axis, sizes in AXES.items()}
CORNER = {**BASE, "length": AXES["length"][-1], "vocabulary": AXES["vocabulary"][-1]}
PHASES = ("rollout", "reference", "update", "step")


def micro_batches(rollout: ResponsesType, tokens: int) -> list[ResponsesType]:
    """Rows of equal length, so many that they have up to this number of tokens."""
    rows = torch.arange(len(rollout.response_ids))
    return [rollout.rows(index) for index in rows.split(max(1, tokens // int(rollout.total_lengths.max())))]


@torch.no_grad()
def reference_log_probs(reference: Any, rollout: Samples, tokens: int) -> Tensor:
    """Log-probs of the response tokens, (B, T), in micro-batches."""
    log_probs = (part.at_tokens(log_probs_of(reference, *part.sequences())) for part in micro_batches(rollout, tokens))
    return torch.cat(list(log_probs))


def add_gradients(policy: Any, rollout: Rollout, tokens: int) -> None:
    """The gradients of the ReMax loss, in micro-batches."""
    for part in micro_batches(rollout, tokens):
        mask = part.response_mask
        penalty = {"log_probs": part.log_probs, "ref_log_probs": part.ref_log_probs, "kl_coef": KL_COEF}
        advantages = remax_advantages(part.rewards, part.baselines, mask, **penalty)
        policy_gradient_of(policy, *part.sequences(), advantages[mask] / rollout.response_mask.sum()).loss.backward()


def take_step(policy: Any, optimizer: torch.optim.Optimizer) -> None:
    """Clip, step, and drop the gradients."""
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def reset_peak() -> float:
    """Let the peak memory start again from what is resident, MiB, without what was freed."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


@contextmanager
def measured(figures: dict[str, Any], phase: str, resident: float) -> Iterator[None]:
    """Note the CPU seconds of a phase and its peak memory, MiB."""
    reset_peak()
    start = time.process_time()
    yield
    figures[phase] = {"cpu_seconds": time.process_time() - start, "peak_mib": peak_mib() - resident}


def step(policy: Any, reference: Any, optimizer: Any, batch: dict[str, Tensor], length: int) -> dict[str, Any]:
    """One step on a batch of prompts: the figures of each phase."""
    figures, resident, stops = {}, reset_peak(), [policy.config.vocab_size]
    with measured(figures, "rollout", resident):
        samples, _ = TransformersEngine().sample_and_greedy(policy, batch, Sampling(length), stop_token_ids=stops)
    with measured(figures, "reference", resident):
        ref_log_probs = reference_log_probs(reference, samples, MICRO_BATCH_TOKENS)
    rewards, baselines = torch.randn(2, len(ref_log_probs))
    rollout = samples.scored(rewards, baselines, ref_log_probs)
    with measured(figures, "update", resident):
        add_gradients(policy, rollout, MICRO_BATCH_TOKENS)
        take_step(policy, optimizer)
    return figures


def work(point: dict[str, int]) -> dict[str, Any]:
    """The figures of a point; the warm-up makes the optimizer's state."""
    policy = build({**point, "mixed": False})[0].train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    ids = torch.randint(0, point["vocabulary"], (point["prompts"], PROMPT_LENGTH))
    batch = {"prompt_ids": ids, "prompt_mask": torch.ones_like(ids).bool(), "prompt_index": torch.arange(len(ids))}
    models = policy, frozen_copy(policy), optimizer
    step(*models, {name: column[:2] for name, column in batch.items()}, length=4)
    phases = step(*models, batch, point["length"])
    seconds, peaks = zip(*(each.values() for each in phases.values()), strict=True)
    return {**phases, "step": {"cpu_seconds": sum(seconds), "peak_mib": max(peaks)}}


def run(point: dict[str, int]) -> dict[str, Any]:
    """A point in a process of its own."""
    with ProcessPoolExecutor(1, get_context("fork"), initializer=one_thread) as pool:
        return {**point, **pool.submit(work, point).result()}


def line_of(cases: list[dict[str, Any]], *points: dict[str, int]) -> list[dict[str, Any]]:
    """The cases of points, in their order."""
    return [next(case for case in cases if point.items() <= case.items()) for point in points]


def exponents(cases: list[dict[str, Any]], axis: str) -> dict[str, list[float]]:
    """How seconds and memory grow along an axis: between its ends, and between its last two points."""
    growth, line = {}, line_of(cases, *POINTS[axis])
    for phase, figure in ((phase, figure) for phase in PHASES for figure in ("cpu_seconds", "peak_mib")):
        *logs, (x, y) = [(math.log(case[axis]), math.log(case[phase][figure])) for case in line]
        growth[f"{phase}, {figure}"] = [(y - logs[start][1]) / (x - logs[start][0]) for start in (0, -1)]
    return growth


def check_corner(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Memory of the corner against that of the two ends which it combines, apart and less the base they share, MiB."""
    corners = line_of(cases, CORNER, POINTS["vocabulary"][-1], POINTS["length"][-1], BASE)
    corner, *ends, base = (case["step"]["peak_mib"] for case in corners)
    parts = {"ends_mib": ends, "is_below_both_ends": corner < sum(ends), "additive_mib": sum(ends) - base}
    return {"peak_mib": corner, **parts, "all_logits_mib": math.prod(CORNER.values()) * 4 / 2**20}


def tables(cases: list[dict[str, Any]], growth: dict[str, Any]) -> list[Table]:
    """The points, and the exponents of each axis."""
    points = Table(*BASE, *PHASES, title="CPU seconds (peak MiB)")
    for case in cases:
        figures = (f"{case[phase]['cpu_seconds']:.2f} ({case[phase]['peak_mib']:.0f})" for phase in PHASES)
        points.add_row(*(str(case[axis]) for axis in BASE), *figures)
    slopes = Table("exponent in", *growth, title="between the ends (the last two points)")
    for name in growth["prompts"]:
        slopes.add_row(name, *("{:.2f} ({:.2f})".format(*growth[axis][name]) for axis in growth))
    return [points, slopes]


def plot(cases: list[dict[str, Any]], path: Path) -> None:
    """Seconds and peak memory of each phase along each axis."""
    figure, panels = pyplot.subplots(1, len(AXES), figsize=(13, 4), layout="constrained")
    for panel, axis in zip(panels, AXES, strict=True):
        memory, line = panel.twinx(), line_of(cases, *POINTS[axis])
        for phase in PHASES[:-1]:
            panel.loglog(AXES[axis], [each[phase]["cpu_seconds"] for each in line], "o-", label=phase)
            memory.loglog(AXES[axis], [each[phase]["peak_mib"] for each in line], "s--")
        memory.set(ylim=(5, 5000), ylabel="peak MiB (dashed)")
        panel.set(xlabel=axis, ylabel="CPU seconds (solid)", ylim=(0.02, 100))
        panel.set_xticks(AXES[axis], AXES[axis])
        panel.minorticks_off()
    panels[0].legend(loc="upper left")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run all points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON; the plot is written beside it")
    arguments = parser.parse_args()
    cases = [run(dict(point)) for point in sorted({tuple(each.items()) for each in sum(POINTS.values(), [CORNER])})]
    growth, corner = {axis: exponents(cases, axis) for axis in AXES}, check_corner(cases)
    Console().print(*tables(cases, growth), corner)
    result = {"name": "scaling", "command": " ".join(["python", *sys.argv]), **machine(), "threads": 1, "cases": cases}
    print(json.dumps(result := result | {"exponents": growth, "corner": corner}))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        plot(cases, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
