"""``kill -9`` at random moments of a small run, resumed each time with ``--ckpt_path last``, on several file systems.

ReMax or PPO (four optimizer steps a batch) on the quickstart's data, a tiny Llama with random weights, a reward for the
letter e; a checkpoint after every step. Half of the kills are aimed at a save, a quarter come while the run starts, a
quarter at any moment. Of two processes (ddp), the one, the other or both are killed, and a survivor must end by itself.
The final weights must be bitwise those of a run that was never killed. The command line is imported once, by a process
that forks for each start, so that a start takes one second and not ten.

    python benchmarks/kill_nine.py --kills 20 --folders /tmp /dev/shm --output benchmarks/results/kill_nine.json
    python benchmarks/kill_nine.py --kills 200 --processes 1,2 --method remax,ppo --folders /tmp
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from machine import machine
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from remax_lightning import cli
from remax_lightning.checkpoints.manifest import PARTIAL_SUFFIX, SUFFIX, integrity_error, manifests, read_manifest
from remax_lightning.data.toy import make_toy_data

LIMIT = 300  # seconds for one start; far more than any takes, so that a hang is an error
SECONDS_TO_END = 60  # for a rank that has lost another one
SAVE_SECONDS = 0.05  # about the duration of a save of this model


def share_of_e(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    """A reward that random responses differ in."""
    return [10 * response.count("e") / max(len(response), 1) for response in responses]


def write_config(folder: Path, method: str, processes: int, steps: int, hidden_size: int) -> Path:
    """The toy data and the configuration of a run of some batches in a folder."""
    make_toy_data(str(folder / "data"), num_demonstrations=8, num_preferences=8, num_prompts=64, num_held_out=8)
    llama = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": 2}
    model = {
        "policy": {
            "tokenizer": str(folder / "data" / "tokenizer"),
            "config": {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2, **llama},
        },
        "reward": {"class_path": "FunctionReward", "init_args": {"function": "kill_nine.share_of_e"}},
        "sampling": {"max_new_tokens": 16},
        "kl_coef": 0.05,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
    }
    updates = {"num_epochs": 2, "num_minibatches": 2} if method == "ppo" else {}
    prompts = {name: str(folder / "data" / f"{file}.jsonl") for name, file in FILES.items()}
    config = {
        "trainer": {
            "accelerator": "cpu",
            "devices": processes,
            "strategy": "ddp" if processes > 1 else "auto",
            "max_steps": 4 * steps if updates else steps,
            "default_root_dir": str(folder),
            "val_check_interval": 5,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "checkpoint": {"every_n_train_steps": 1},
        "model": {"class_path": METHODS[method], "init_args": {**model, **updates}},
        "data": {"class_path": "PromptDataModule", "init_args": {**prompts, "batch_size": 8 // processes}},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


METHODS = {"remax": "ReMax", "ppo": "PPO"}
FILES = {"train": "prompts", "validation": "prompts_held_out"}


def start(config: Path, processes: int, *arguments: str) -> list[int]:
    """Fork the processes of a ``fit``; their numbers."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": port}
    return [
        fork(config, arguments, {**together, "RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {})
        for rank in range(processes)
    ]


def fork(config: Path, arguments: Sequence[str], variables: Mapping[str, object]) -> int:
    """Fork a process that runs ``fit`` with some environment variables; its number."""
    process = os.fork()
    if process:
        return process
    status = 1
    with contextlib.suppress(BaseException), open(config.parent / "log.txt", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        os.setsid()
        os.environ.update({name: str(value) for name, value in variables.items()})
        try:
            cli.main(["fit", "--config", str(config), *arguments])
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
    os._exit(status)


def wait(processes: list[int], seconds: float, *, until: Callable[[], bool] = lambda: False) -> int | None:
    """Exit status of processes, 0 if all have 0; None if one still runs when time is up or something has happened.

    Those that have ended are taken off the list.
    """
    end, worst = time.monotonic() + seconds, 0
    while time.monotonic() < end and not until():
        for process in list(processes):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                processes.remove(process)
                worst = worst or os.waitstatus_to_exitcode(status)
        if not processes:
            return worst
        time.sleep(0.001)
    return None


def kill(processes: list[int], victims: list[int], log: Path) -> float:
    """Kill some of the processes of a run; the seconds until the others have ended, too."""
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    begin = time.monotonic()
    if wait(processes, SECONDS_TO_END) is None:
        raise RuntimeError(f"{len(processes)} ranks have not ended {SECONDS_TO_END} s after the others; see {log}")
    return time.monotonic() - begin


def run_whole(config: Path, processes: int) -> float:
    """Run without a kill; its seconds."""
    begin = time.monotonic()
    status = wait(start(config, processes), LIMIT)
    if status != 0:
        raise RuntimeError(f"the run without kills ended with {status}; see {config.parent / 'log.txt'}")
    return time.monotonic() - begin


def run_killed(config: Path, world_size: int, kills: int, per_step: float, rng: random.Random) -> dict[str, Any]:
    """Kill and resume a run, most times some steps after it was resumed; counts of what was seen."""
    folder, log = config.parent / "checkpoints", config.parent / "log.txt"
    seen = {"kills": 0, "while_saving": 0, "newest_incomplete": 0, "starts": 0}
    slowest = 0.0  # seconds until the others have ended
    begin = time.monotonic()
    while True:
        processes = start(config, world_size, "--ckpt_path", "last")
        seen["starts"] += 1
        before = newest_number(folder)
        moment = rng.random()
        if seen["kills"] == kills:
            status = wait(processes, LIMIT)
        elif moment < 0.25:
            status = wait(processes, rng.uniform(0, 2))
        else:
            status = wait(processes, LIMIT, until=partial(is_newer, folder, before))
            if status is None and moment > 0.5:
                status = wait(processes, LIMIT, until=partial(is_saving, folder))
            if status is None:
                status = wait(processes, rng.uniform(0, SAVE_SECONDS if moment > 0.5 else 1.5 * per_step))
        if status is not None:
            if status != 0:
                raise RuntimeError(f"the resumed run ended with {status}; see {log}")
            return {**seen, "others_ended_seconds": slowest, "seconds": time.monotonic() - begin}
        # a rank that is killed before the others can know of it leaves them waiting
        victims = processes if moment < 0.25 else rng.sample(processes, rng.randint(1, len(processes)))
        slowest = max(slowest, kill(processes, list(victims), log))
        seen["kills"] += 1
        look(folder, seen)


def is_newer(folder: Path, before: int) -> bool:
    """True when the run has saved again."""
    return newest_number(folder) > before


def is_saving(folder: Path) -> bool:
    """True while a checkpoint is being written."""
    return any(folder.glob(f"*{PARTIAL_SUFFIX}"))


def newest_number(folder: Path) -> int:
    """Number of the newest checkpoint; 0 if there is none."""
    return max((manifest.number for _, manifest in manifests(folder)), default=0)


def look(folder: Path, seen: dict[str, int]) -> None:
    """Count what a kill left behind."""
    names = [path.name for path in folder.glob(f"*{PARTIAL_SUFFIX}")]
    lonely = [path for path in folder.glob("*.json") if not path.with_suffix("").exists()]
    seen["while_saving"] += bool(names or lonely)
    newest = max(folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is not None:
        manifest = read_manifest(newest)
        seen["newest_incomplete"] += manifest is None or integrity_error(newest, manifest) is not None


def digest(folder: Path) -> str:
    """SHA-256 of the exported weights."""
    sha = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "hf" / "model.safetensors").items()):
        sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


def run_case(place: Path, method: str, processes: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """A run without kills and one that is killed, both on one file system."""
    folder = Path(tempfile.mkdtemp(prefix="kill_nine_", dir=place))
    sizes = (arguments.steps, arguments.hidden_size)
    try:
        configs = []
        for name in ("whole", "killed"):
            (folder / name).mkdir()
            configs.append(write_config(folder / name, method, processes, *sizes))
        whole = run_whole(configs[0], processes)
        rng = random.Random(arguments.seed)
        seen = run_killed(configs[1], processes, arguments.kills, whole / arguments.steps, rng)
        size = max(path.stat().st_size for path in (folder / "killed" / "checkpoints").glob(f"*{SUFFIX}"))
        is_equal = digest(folder / "whole") == digest(folder / "killed")
    except BaseException:
        print(f"left for inspection: {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder)
    return {
        "name": f"{METHODS[method]}, {processes} process{'es' * (processes > 1)}, {place}",
        "method": method,
        "processes": processes,
        "file_system": file_system(place),
        "steps": arguments.steps,
        "checkpoint_mib": size / 2**20,
        "whole_seconds": whole,
        **seen,
        "is_equal": is_equal,
    }


def file_system(place: Path) -> str:
    """Type of the file system of a folder."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(len(mount[1]), mount[2]) for mount in mounts if place.resolve().is_relative_to(mount[1])]
    return max(inside)[1]


def numbers(text: str) -> list[int]:
    """Numbers with commas between them."""
    return [int(each) for each in text.split(",")]


def names(text: str) -> list[str]:
    """Methods with commas between them."""
    methods = text.split(",")
    if unknown := set(methods) - set(METHODS):
        raise argparse.ArgumentTypeError(f"methods are {', '.join(METHODS)}, got {', '.join(unknown)}")
    return methods


def main() -> None:
    """Run all cases, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, help="default: three for each kill, and five")
    parser.add_argument("--hidden_size", type=int, default=128, help="width of the policy")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folders", type=Path, nargs="+", default=[Path.cwd(), Path("/dev/shm")])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--processes", type=numbers, default=[1], help="of each run, such as 1,2")
    parser.add_argument("--method", type=names, default=["remax"], help="remax, ppo or remax,ppo")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or 5 + 3 * arguments.kills
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = [
        run_case(place, method, processes, arguments)
        for place in arguments.folders
        for method in arguments.method
        for processes in arguments.processes
    ]
    table = Table("run", "kills", "while saving", "newest incomplete", "bitwise equal", "seconds, never killed")
    for case in cases:
        counts = (str(case[name]) for name in ("kills", "while_saving", "newest_incomplete", "is_equal"))
        table.add_row(
            f"{case['name']} ({case['file_system']})", *counts, f"{case['seconds']:.0f}, {case['whole_seconds']:.0f}"
        )
    Console().print(table)
    result = {"name": "kill_nine", "command": " ".join(["python", *sys.argv]), **machine(), "cases": cases}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
