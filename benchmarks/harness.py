"""Runs two contenders in turn, each in its own process, and compares CPU seconds and peak memory."""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine
from rich.console import Console
from rich.table import Table


def peak_mib() -> float:
    """Peak memory of this process so far, MiB; unlike ``ru_maxrss`` not that of the process it was started by."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


TOY = {"vocabulary": 512, "max_new_tokens": 4, "steps": 2}
"""The sizes of a case with ``--toy``."""
TOY_DATA = ("--num_demonstrations", "64", "--num_preferences", "64", "--num_prompts", "64", "--num_held_out", "16")
"""Arguments of ``cli.py make-toy-data`` with ``--toy``."""
TOY_HELP = "sizes that take seconds, to see that the script runs; the figures mean nothing"


def measure(build: Callable[[], Callable[[int], Any]], size: int) -> dict[str, Any]:
    """CPU seconds of one piece of work, and the process's peak memory beyond that of its imports, MiB.

    Args:
        build: Makes the work: a function of its size.
        size: Size to measure; a small one goes before as a warm-up.
    """
    imports = peak_mib()
    work = build()
    work(2)
    start = time.process_time()
    answer = work(size)
    seconds = time.process_time() - start
    return {"cpu_seconds": seconds, "peak_mib": peak_mib() - imports, "answer": answer}


def contend(script: str, case: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Run a case with the peer and with ours in turn; of each the fastest run and the least peak memory."""
    runs: dict[str, list[dict[str, Any]]] = {"peer": [], "ours": []}
    for _ in range(repeats):
        for contender in runs:
            command = [sys.executable, script, "--worker", contender, "--case", json.dumps(case)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
            runs[contender].append(json.loads(output.splitlines()[-1]))
    best = {name: fastest(each) for name, each in runs.items()}
    return {
        "name": case["name"],
        "time_ratio": best["peer"]["cpu_seconds"] / best["ours"]["cpu_seconds"],
        "memory_ratio": best["ours"]["peak_mib"] / best["peer"]["peak_mib"],
        "is_equal": runs["peer"][0]["answer"] == runs["ours"][0]["answer"],
        **best,
    }


def fastest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of the least CPU seconds without its answer, with the least peak memory of all runs."""
    best = min(runs, key=lambda run: run["cpu_seconds"])
    figures = {name: value for name, value in best.items() if name != "answer"}
    return {**figures, "peak_mib": min(run["peak_mib"] for run in runs)}


def conclude(name: str, cases: list[dict[str, Any]], output: Path | None, packages: tuple[str, ...] = ()) -> None:
    """Print the table and, as the last line, the JSON object, with versions of further packages; write it if asked."""
    table = Table("case", "peer, CPU s", "ours, CPU s", "time, peer / ours", "memory, ours / peer", "same answer")
    for case in cases:
        seconds = (f"{case[contender]['cpu_seconds']:.2f}" for contender in ("peer", "ours"))
        ratios = (f"{case['time_ratio']:.2f}", f"{case['memory_ratio']:.2f}")
        table.add_row(case["name"], *seconds, *ratios, str(case["is_equal"]))
    Console().print(table)
    result = {"name": name, "command": " ".join(["python", *sys.argv]), **machine(), "threads": 1, "cases": cases}
    result["versions"] |= {package: importlib.metadata.version(package) for package in packages}
    print(json.dumps(result))
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


def argument_parser(description: str | None, repeats: int = 3) -> argparse.ArgumentParser:
    """The arguments of every contest; ``--worker`` and ``--case`` are those that :func:`contend` gives."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--output", type=Path, help="file for the JSON object")
    parser.add_argument("--toy", action="store_true", help=f"first and last case, {TOY_HELP}")
    parser.add_argument("--worker", choices=["peer", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    return parser


def chosen(cases: list[dict[str, Any]], arguments: argparse.Namespace, **settings: Any) -> list[dict[str, Any]]:
    """The cases to run, with settings that all of them share."""
    sized = [{**each, **TOY} for each in (cases[0], cases[-1])] if arguments.toy else cases
    return [{**settings, **each} for each in sized]


def one_thread() -> None:
    """One thread, whatever the machine has."""
    torch.set_num_threads(1)
