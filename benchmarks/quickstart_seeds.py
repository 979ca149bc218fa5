"""The quickstart with several seeds: data, weights and samples all change. One row a seed.

python benchmarks/quickstart_seeds.py --seeds 0 1 2 --output benchmarks/results/quickstart.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "quickstart"
KEYS = ("sft_gold_reward", "remax_gold_reward", "win_rate", "kl", "reward_model_accuracy", "seconds")


def run_seed(seed: int, folder: Path) -> dict[str, Any]:
    """The quickstart's commands, in a folder of their own; what summary.json says."""
    started_at = time.time()

    def cli(*arguments: str) -> None:
        command = [sys.executable, str(ROOT / "cli.py"), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with open(folder / "log.txt", "a") as log:
            subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, check=True)

    cli("make-toy-data", "--seed", str(seed))
    seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
    cli("fit", "--config", str(CONFIGS / "sft.yaml"), *seeds)
    cli("fit", "--config", str(CONFIGS / "reward_model.yaml"), *seeds)
    cli("fit", "--config", str(CONFIGS / "remax.yaml"), *seeds, "--model.seed", str(seed))
    cli("test", "--config", str(CONFIGS / "remax.yaml"), "--ckpt_path", "last", "--model.seed", str(seed))
    run = "runs/quickstart"
    labels = ["--reference_label", "SFT", "--policy_label", "ReMax", "--judge_label", "gold"]
    folders = ["--run_dir", f"{run}/remax", "--reward_model_dir", f"{run}/reward_model", "--output_dir", run]
    cli("report", *folders, "--started_at", str(started_at), *labels)
    return json.loads((folder / run / "summary.json").read_text())


def main() -> None:
    """Run all seeds, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"seed": seed, **run_seed(seed, Path(folder))})
            print(json.dumps(rows[-1]), flush=True)
    table = Table("seed", *KEYS)
    for row in rows:
        table.add_row(str(row["seed"]), *(f"{row[key]:.3f}" for key in KEYS))
    Console().print(table)
    result = {"name": "quickstart", "command": " ".join(sys.argv), **machine(), "cases": rows}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
