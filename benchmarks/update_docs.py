"""Write the documents' result tables from benchmarks/results/*.json, and move the plots to docs/figures.

python benchmarks/update_docs.py
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
PLANNED = ("states_mib", "peak_mib")


def quickstart_table(result: dict[str, Any]) -> str:
    """One row for each seed of the quickstart."""
    lines = [
        "| seed | gold reward, SFT | gold reward, ReMax | win rate against SFT (95 % interval) | KL (nats) "
        "| reward model accuracy | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['seed']} | {row['sft_gold_reward']:.2f} | {row['remax_gold_reward']:.2f} | {row['win_rate']:.1%} "
        f"({row['win_rate_low']:.1%} to {row['win_rate_high']:.1%}) | {row['kl']:.2f} "
        f"| {row['reward_model_accuracy']:.1%} | {row['seconds']:.0f} |"
        for row in result["cases"]
    ]
    return "\n".join([*lines, "", measured_on(result)])


def step_table(result: dict[str, Any]) -> str:
    """One row for each case of the step benchmark, with the factors of its speedup and a row for each phase."""
    lines = [
        "| case | TRL, CPU s | remax-lightning, CPU s | speedup | from algorithm x LM head x rest "
        "| peak memory, relative to TRL |",
        "|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        factors = " x ".join(f"{case[f'{name}_ratio']:.2f}" for name in ("algorithm", "head", "rest"))
        lines.append(
            f"| **{case['name']}** | {case['peer']['cpu_seconds']:.2f} | {case['ours']['cpu_seconds']:.2f} "
            f"| **{case['time_ratio']:.2f}** | {factors} | **{case['memory_ratio']:.2f}** |"
        )
        lines += [
            f"| {name} ({phase['peer_rows']} / {phase['ours_rows']} rows) | {phase['peer']:.2f} "
            f"| {phase['ours']:.2f} | | | |"
            for name, phase in case["phases"].items()
        ]
    return "\n".join([*lines, "", measured_on(result)])


def headline_table(result: dict[str, Any]) -> str:
    """The two ReMax rows of the step benchmark, without their phases."""
    lines = [
        "| one training step, CPU | speedup over TRL's RLOO | peak memory, relative to TRL |",
        "|---|---|---|",
    ]
    lines += [
        f"| vocabulary {case['name'].removeprefix('remax ')} | **{case['time_ratio']:.2f}** "
        f"| **{case['memory_ratio']:.2f}** |"
        for case in result["cases"]
        if case["name"].startswith("remax ")
    ]
    return "\n".join(lines)


def contest_table(result: dict[str, Any]) -> str:
    """One row for each case: the speedup over the peer and the memory relative to it."""
    lines = ["| case | speedup | peak memory, relative to the peer |", "|---|---|---|"]
    lines += [f"| {row['name']} | {row['time_ratio']:.2f} | {row['memory_ratio']:.2f} |" for row in result["cases"]]
    return "\n".join([*lines, "", measured_on(result)])


def paper_table(result: dict[str, Any]) -> str:
    """What each method learned, what it cost, and what the paper published."""
    figures = {"gold": 2, "proxy": 2, "kl": 2, "win_rate": 2, "grad_norm": 2, "grad_norm_variance": 3}
    start = " | ".join(mean_and_spread(result["sft"][key]) for key in ("gold", "proxy"))
    learned = [
        "| mean ± standard deviation over seeds | gold reward | proxy reward | KL (nats) | win rate against SFT "
        "| gradient norm | variance of the gradient norm over steps | hyperparameters |",
        "|---|---|---|---|---|---|---|---|",
        f"| SFT (start) | {start} | | | | | |",
    ]
    for case in result["cases"]:
        cells = [mean_and_spread(case[key], digits) for key, digits in figures.items()]
        learned.append(f"| {' | '.join([case['name'], *cells, str(len(case['hyper_parameters']))])} |")
    phases = list(result["cases"][0]["cpu_seconds_of_phases"])
    costs = [
        f"| {result['steps']} steps | CPU s | {' | '.join(phases)} | peak memory, MiB "
        "| planned weights and states, MiB | planned peak, MiB |",
        "|---" * (len(phases) + 5) + "|",
    ]
    for case in result["cases"]:
        cells = [case["name"], mean_and_spread(case["cpu_seconds"], 1)]
        cells += [f"{seconds:.1f}" if seconds else "" for seconds in case["cpu_seconds_of_phases"].values()]
        cells += [mean_and_spread(case["peak_mib"], 0), *(f"{case['plan'][key]:.1f}" for key in PLANNED)]
        costs.append(f"| {' | '.join(cells)} |")
    published = ["| published by Li et al. 2024, not measured here | figure | source |", "|---|---|---|"]
    published += [f"| {row['what']} | {row['figure']} | {row['where']} |" for row in result["published"]]
    return "\n".join([*learned, "", *costs, "", measured_on(result), "", *published])


def mean_and_spread(figure: dict[str, float], digits: int = 2) -> str:
    """Mean over the seeds and, of several, their standard deviation."""
    return f"{figure['mean']:.{digits}f}" + (f" ± {figure['std']:.{digits}f}" if "std" in figure else "")


def measured_on(result: dict[str, Any]) -> str:
    """Where the figures come from, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"`{result['command']}`, {result['date']}, {result['processor']}, {result['threads']} thread(s), {versions}."


# (document, name of the markers, name of the results, what writes the table)
TABLES: tuple[tuple[str, str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("README.md", "headline", "step", headline_table),
    ("docs/guide.md", "quickstart", "quickstart", quickstart_table),
    ("docs/performance.md", "step", "step", step_table),
    ("docs/performance.md", "rollout", "rollout", contest_table),
    ("docs/performance.md", "head", "head", contest_table),
    ("docs/performance.md", "overhead", "overhead", contest_table),
    ("docs/comparison.md", "paper", "paper", paper_table),
)


def with_tables(name: str, text: str) -> str:
    """A document with its tables as the results are.

    Args:
        name: Path of the document from the repository's root.
        text: What it says now.

    Raises:
        ValueError: If the markers of a table are not there exactly once.
    """
    for document, marker, results, table in TABLES:
        if document != name:
            continue
        result = json.loads((RESULTS / f"{results}.json").read_text(encoding="utf-8"))
        pattern = rf"(<!-- results: {marker} -->\n).*?(<!-- end of results -->)"
        text, count = re.subn(pattern, lambda m, new=table(result): f"{m[1]}{new}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{name} must have the markers of the results {marker} once, got {count} of them")
    return text


def main() -> None:
    """Replace what stands between the markers in every document; move the plots beside the documents."""
    for name in dict.fromkeys(document for document, *_ in TABLES):
        path = ROOT / name
        path.write_text(with_tables(name, path.read_text(encoding="utf-8")), encoding="utf-8")
    for plot in RESULTS.glob("*.png"):
        plot.replace(FIGURES / plot.name)


if __name__ == "__main__":
    main()
