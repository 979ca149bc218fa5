"""Runs of the command line in processes of their own, forked from one that has imported it, and what they leave."""

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import tiny
import torch
import yaml
from safetensors.torch import load_file

from remax_lightning.checkpoints.manifest import manifests
from remax_lightning.checkpoints.safe_checkpoint_io import read_checkpoint

SECONDS = 60  # far more than any run takes, so that a hang is an error
STEPS = 8
ROWS = [{"prompt": f"{a} {b}", "note": a} for a in ("Tell me", "Go", "What is it", "a") for b in "abcdef"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["remax_lightning.cli", "torch.distributed.checkpoint", "peft", "chaos.injections"])


def run_forked(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """What a forked process does."""
    os.environ.update(environment)
    os.chdir(Path(log).parent)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable(all_threads=True)
    torch.set_num_threads(1)
    sys.argv = ["cli.py", *arguments]
    cli = importlib.import_module("remax_lightning.cli")
    cli.main()


@dataclass
class Outcome:
    """How a run ended.

    Args:
        exits: Exit status of each process; None if it was killed after the time limit.
        output: What they printed.
        folder: The run's folder.
    """

    exits: list[int | None]
    output: str
    folder: Path

    @property
    def exit(self) -> int | None:
        """Of the first process."""
        return self.exits[0]

    @cached_property
    def steps(self) -> int:
        """Optimizer steps that were finished."""
        log = self.folder / "steps0.log"
        return int(log.read_text().split()[-1]) if log.exists() else 0

    @cached_property
    def saved(self) -> list[tuple[str, int]]:
        """Names and steps of the checkpoints, the newest first."""
        return [(path.name, manifest.step) for path, manifest in manifests(self.folder / "checkpoints")]

    @property
    def lost(self) -> int:
        """Finished steps that no checkpoint holds."""
        return self.steps - max((step for _, step in self.saved), default=0)

    @property
    def is_finite(self) -> bool:
        """Whether all weights that were kept are."""
        kept = [read_checkpoint(self.folder / "checkpoints" / name)["state_dict"] for name, _ in self.saved]
        exported = self.folder / "hf" / "model.safetensors"
        kept += [load_file(exported)] if exported.exists() else []
        return all(bool(tensor.isfinite().all()) for weights in kept for tensor in weights.values())

    def weights(self) -> dict[str, torch.Tensor]:
        """The exported ones."""
        return load_file(self.folder / "hf" / "model.safetensors")


class World:
    """Files that runs read, and the runs.

    Args:
        folder: Where all of it goes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policy = tiny.save_model(folder / "policy")
        self.prompts = tiny.write_rows(folder / "prompts.jsonl", ROWS)

    def configuration(self, name: str, changes: dict[str, Any], file: str | None = None) -> Path:
        """Write the configuration of a ReMax run with some values changed, by their full names."""
        source = {"path": self.policy}
        model = {
            "policy": source,
            "reward": {"class_path": "FunctionReward", "init_args": {"function": "chaos.injections.length"}},
            "sampling": {"max_new_tokens": 8},
            "kl_coef": 0.05,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
            "lr_schedule": "constant",
        }
        prompts = dict.fromkeys(("train", "validation", "test"), self.prompts)
        config: dict[str, Any] = {
            "seed_everything": 1,
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "max_steps": STEPS,
                "val_check_interval": 5,
                "check_val_every_n_epoch": None,
                "limit_val_batches": 1,
                "log_every_n_steps": 1,
                "default_root_dir": str(self.folder / name),
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "callbacks": [{"class_path": "chaos.injections.Inject", "init_args": {}}],
            },
            "model": {"class_path": "ReMax", "init_args": model},
            "data": {"class_path": "PromptDataModule", "init_args": {**prompts, "batch_size": 4}},
        }
        for key, value in changes.items():
            *groups, last = key.split(".")
            place = config
            for group in groups:
                place = place.setdefault(group, {})
                if "class_path" in place and last != "class_path":
                    place = place.setdefault("init_args", {})
            place[last] = value
        path = self.folder / f"{file or name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def start(
        self,
        name: str,
        changes: dict[str, Any],
        *arguments: str,
        command: str = "fit",
        processes: int = 1,
        environment: dict[str, str] | None = None,
        of_rank_1: dict[str, Any] | None = None,
    ) -> list[ForkServerProcess]:
        """Start a run; ``arguments`` follow the configuration."""
        changes = {**changes, "trainer.devices": processes}
        configs = [self.configuration(name, changes)] * processes
        if of_rank_1 is not None:
            configs[1] = self.configuration(name, {**changes, **of_rank_1}, f"{name}_rank_1")
        (self.folder / name).mkdir(exist_ok=True)
        started = []
        port = free_port()
        for rank in range(processes):
            log = str(self.folder / name / f"log{rank}.txt")
            own = torchrun_environment(rank, processes, port) if processes > 1 else {}
            given = [command, "--config", str(configs[rank]), *arguments]
            started.append(CONTEXT.Process(target=run_forked, args=(given, log, {**(environment or {}), **own})))
            started[-1].start()
        return started

    def finish(self, name: str, started: Sequence[ForkServerProcess], seconds: float = SECONDS) -> Outcome:
        """Wait for a run's end, at most for so long."""
        end = time.monotonic() + seconds
        exits = []
        for process in started:
            process.join(max(end - time.monotonic(), 0.1))
            exits.append(process.exitcode)
        for process in started:
            if process.exitcode is None:
                process.kill()
                process.join()
        logs = [(self.folder / name / f"log{rank}.txt") for rank in range(len(started))]
        output = "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in logs if log.exists())
        return Outcome(exits, output, self.folder / name)

    def run(self, name: str, changes: dict[str, Any], *arguments: str, **options: Any) -> Outcome:
        """A run from its start to its end."""
        return self.finish(name, self.start(name, changes, *arguments, **options))


def injected(**options: Any) -> dict[str, Any]:
    """The change of a configuration that makes something go wrong."""
    return {"trainer.callbacks": [{"class_path": "chaos.injections.Inject", "init_args": options}]}


def rewarded(function: str) -> dict[str, Any]:
    """The change of a configuration to another reward."""
    reward = {"class_path": "FunctionReward", "init_args": {"function": f"chaos.injections.{function}"}}
    return {"model.reward": reward}


def torchrun_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "TORCHELASTIC_RUN_ID": "chaos",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }


def free_port() -> int:
    """A port that nothing listens at."""
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(happened: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Wait until something is so.

    Raises:
        TimeoutError: If it is not after so long.
    """
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError("it did not happen")
        time.sleep(0.01)
