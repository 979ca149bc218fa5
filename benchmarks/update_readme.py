"""Write the README's result tables from benchmarks/results/*.json.

python benchmarks/update_readme.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


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
