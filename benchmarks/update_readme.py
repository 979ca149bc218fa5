"""Write the README's result tables from benchmarks/results/*.json.

python benchmarks/update_readme.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PLANNED = ("states_mib", "peak_mib")


def quickstart_table(result: dict[str, Any]) -> str:
    """One row a seed of the quickstart."""
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
    """One row a case of the step benchmark with the factors of its ratio, and one for each of its phases."""
    lines = [
        "| one step | TRL, CPU s | ours, CPU s | time, theirs / ours | algorithm x head x rest | memory, ours / TRL |",
        "|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        factors = " x ".join(f"{case[f'{name}_ratio']:.2f}" for name in ("algorithm", "head", "rest"))
        lines.append(
            f"| **{case['name']}** | {case['peer']['cpu_seconds']:.2f} | {case['ours']['cpu_seconds']:.2f} "
            f"| **{case['time_ratio']:.2f}** | {factors} | **{case['memory_ratio']:.2f}** |"
        )
        lines += [
            f"| {name}, {phase['peer_rows']} and {phase['ours_rows']} rows | {phase['peer']:.2f} | {phase['ours']:.2f} "
            "| | | |"
            for name, phase in case["phases"].items()
        ]
    return "\n".join([*lines, "", measured_on(result)])


def contest_table(result: dict[str, Any]) -> str:
    """One row a case: how often the peer's time and which part of its memory."""
    lines = ["| case | time, theirs / ours | peak memory, ours / theirs |", "|---|---|---|"]
    lines += [f"| {row['name']} | {row['time_ratio']:.2f} | {row['memory_ratio']:.2f} |" for row in result["cases"]]
    return "\n".join([*lines, "", measured_on(result)])


def paper_table(result: dict[str, Any]) -> str:
    """What each method learned, what it cost, and what the paper published."""
    figures = {"gold": 2, "proxy": 2, "kl": 2, "win_rate": 2, "grad_norm": 2, "grad_norm_variance": 3}
    start = " | ".join(mean_and_spread(result["sft"][key]) for key in ("gold", "proxy"))
    learned = [
        "| mean ± standard deviation of the seeds | gold reward | proxy reward | KL (nats) | win rate against SFT "
        "| gradient norm | its variance over steps | arguments of its own |",
        "|---|---|---|---|---|---|---|---|",
        f"| SFT, the start | {start} | | | | | |",
    ]
    for case in result["cases"]:
        cells = [mean_and_spread(case[key], digits) for key, digits in figures.items()]
        learned.append(f"| {' | '.join([case['name'], *cells, str(len(case['hyper_parameters']))])} |")
    phases = list(result["cases"][0]["cpu_seconds_of_phases"])
    costs = [
        f"| seconds of {result['steps']} steps | CPU s | {' | '.join(phases)} | peak memory, MiB "
        "| plan: weights and states, MiB | plan: peak, MiB |",
        "|---" * (len(phases) + 5) + "|",
    ]
    for case in result["cases"]:
        cells = [case["name"], mean_and_spread(case["cpu_seconds"], 1)]
        cells += [f"{seconds:.1f}" if seconds else "" for seconds in case["cpu_seconds_of_phases"].values()]
        cells += [mean_and_spread(case["peak_mib"], 0), *(f"{case['plan'][key]:.1f}" for key in PLANNED)]
        costs.append(f"| {' | '.join(cells)} |")
    published = ["| published by Li et al. 2024, not measured here | theirs | where |", "|---|---|---|"]
    published += [f"| {row['what']} | {row['figure']} | {row['where']} |" for row in result["published"]]
    return "\n".join([*learned, "", *costs, "", measured_on(result), "", *published])


def mean_and_spread(figure: dict[str, float], digits: int = 2) -> str:
    """Mean over the seeds and, of several, their standard deviation."""
    return f"{figure['mean']:.{digits}f}" + (f" ± {figure['std']:.{digits}f}" if "std" in figure else "")


def measured_on(result: dict[str, Any]) -> str:
    """Where the figures come from, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"`{result['command']}`, {result['date']}, {result['processor']}, {result['threads']} thread(s), {versions}."


TABLES = {
    "quickstart": quickstart_table,
    "rollout": contest_table,
    "head": contest_table,
    "step": step_table,
    "overhead": contest_table,
    "paper": paper_table,
}


def main() -> None:
    """Replace what stands between the markers of each result that there is."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        pattern = rf"(<!-- results: {name} -->\n).*?(<!-- end of results -->)"
        text, count = re.subn(pattern, lambda m, new=table(result): f"{m[1]}{new}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README.md must have the markers of the results {name} once, got {count} of them")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
