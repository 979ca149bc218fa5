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


def rollout_table(result: dict[str, Any]) -> str:
    """One row a case of the rollout benchmark."""
    lines = ["| rollout | time of two `generate` calls / ours | peak memory, ours / theirs |", "|---|---|---|"]
    lines += [f"| {row['name']} | {row['time_ratio']:.2f} | {row['memory_ratio']:.2f} |" for row in result["cases"]]
    return "\n".join([*lines, "", measured_on(result)])


def measured_on(result: dict[str, Any]) -> str:
    """Where the figures come from, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"`{result['command']}`, {result['date']}, {result['processor']}, {result['threads']} thread(s), {versions}."


TABLES = {"quickstart": quickstart_table, "rollout": rollout_table}


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
