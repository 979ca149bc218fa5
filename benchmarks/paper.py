"""ReMax against REINFORCE, RLOO and PPO: the paper's comparison on the quickstart's data, in one run on a CPU.

World, SFT policy and reward model are those of ``configs/quickstart``, made once with seed 0. From them each method
trains with each seed (of the samples and of the order of the prompts) on the same 32 prompts a step, for the same
number of optimizer steps, with the same learning rate, 3e-4 with a cosine, weight of the KL penalty, 0.05, and bound of
the gradient's norm, 1. None of them was tuned for this comparison: 3e-4 is the quickstart's, which was chosen for
ReMax. What differs:

* ReMax decodes a greedy response beside each sampled one. The fast variant cuts it at half the length: at 16 tokens,
  since responses to this data grow to about 30 and half of their limit, 64, would cut none.
* REINFORCE's baseline is a moving average of the rewards.
* RLOO samples two responses a prompt, and learns from both.
* PPO makes one epoch of one minibatch, so that its optimizer steps are as many as the others'. Its ratio is then 1 and
  its clip idle: it is an advantage actor-critic with GAE (lambda 0.95) and normalised advantages, less than what the
  paper compares with. Its value model starts from the reward model and has a learning rate of its own, 1e-3.

Gold reward is the data's hidden judge, proxy reward the learned reward model, both of one sampled response to each of
256 held-out prompts; the same prompt gets the same random numbers in each evaluation of a seed. KL is that of a whole
response, in nats. The gradient's norm is that of the policy before it is clipped; PPO's is that of normalised
advantages, so it has another unit. CPU seconds are those of the training steps, without evaluation, logs and
checkpoints. Peak memory is that of a run's process before its first evaluation, beyond that of the imports; a model of
0.5 million parameters is a small part of it. ``plan`` is what ``python cli.py plan`` computes for this size.
Hyper-parameters are the constructor's arguments that a method has beyond those of ``PolicyGradientModule``.

``--world long`` has the lengths of the paper's GPT-2 task instead, up to 64 tokens of prompt and 48 new ones: sentences
of the toy data's answers stand before each question. It is not the paper's task: no GPT-2, no IMDB.

The last table repeats figures that the paper published, or that are reported of it (Li et al. 2024, arXiv 2310.10505).
They are its authors', measured with their code on their machines; none was measured here, and what is measured here has
another size and another kind of machine.

    python benchmarks/paper.py --output benchmarks/results/paper.json --plot benchmarks/results/paper.png
"""

import argparse
import contextlib
import inspect
import io
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas
import yaml
from harness import one_thread, peak_mib
from lightning.pytorch.profilers import Profiler
from machine import machine
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from remax_lightning import modules
from remax_lightning.cli import main as command_line
from remax_lightning.data import toy
from remax_lightning.evaluation.report import read_metrics
from remax_lightning.plan.cache import DryRunCache
from remax_lightning.plan.phases import plan
from remax_lightning.plan.recipe import read

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "quickstart"
RUN = "runs/quickstart"
LENGTHS = {"quickstart": (32, 64, 16), "long": (64, 48, 24)}
"""Longest prompt, longest response and longest greedy response of the fast variant by data set, tokens."""
VALUE_LEARNING_RATE = 1e-3
PHASES = ("rollout", "reward", "reference", "values", "update")
STATES = ("master weights", "optimizer states", "reference", "reward model", "value model")
METHODS: dict[str, dict[str, Any]] = {
    "ReMax": {"class_path": "ReMax"},
    "ReMax, fast": {"class_path": "ReMax"},
    "REINFORCE": {"class_path": "Reinforce", "init_args": {"baseline": "moving_average"}},
    "RLOO, 2 samples": {"class_path": "RLOO"},
    "PPO": {
        "class_path": "PPO",
        "init_args": {"num_epochs": 1, "num_minibatches": 1, "value_learning_rate": VALUE_LEARNING_RATE},
    },
}
PUBLISHED = (
    ("GPU memory against PPO, 7B", "46 % less", "abstract"),
    ("a model of 7B, trained or frozen, estimate", "147.02 or 12.55 GB", "reported"),
    ("PPO or ReMax of 7B, estimate", "319.14 or 172.12 GB", "reported"),
    ("time against PPO with offload, 7B", "1.6 times faster", "abstract"),
    (
        "Llama-2-7B on 4 A800-80GB, 33k samples",
        "ReMax 1.8 h, PPO with offload 2.9 h, without: out of memory",
        "reported",
    ),
    (
        "fast variant (greedy response of half the length)",
        "2.1 times faster than PPO, reward about the same",
        "reported",
    ),
    ("GPT-2 on IMDB, 64 + 48 tokens, PPO with 4 epochs", "2.2 times faster, 15 against 37 GB", "reported"),
)
"""Theirs, not ours: what, figure, and where in Li et al. 2024, arXiv 2310.10505; reported: by others, of the paper."""


class Clock(Profiler):
    """CPU seconds of the phases and steps of a Lightning trainer, and the peak memory after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: dict[str, float] = defaultdict(float)
        self.steps: list[float] = []
        self.peaks: list[float] = []
        self.started: dict[str, float] = {}
        CLOCKS.append(self)

    def start(self, action_name: str) -> None:
        """Enter a phase or a step; Lightning has many actions that are neither."""
        if action_name in (*PHASES, "run_training_batch"):
            self.started[action_name] = time.process_time()

    def stop(self, action_name: str) -> None:
        """Leave it."""
        if action_name not in self.started:
            return
        seconds = time.process_time() - self.started.pop(action_name)
        if action_name == "run_training_batch":
            self.steps.append(seconds)
            self.peaks.append(peak_mib())
        elif "run_training_batch" in self.started:  # evaluation has such phases, too
            self.phases[action_name] += seconds


CLOCKS: list[Clock] = []
"""Those that a trainer has made in this process."""


def gold_reward(prompts: list[str], responses: list[str], **columns: object) -> list[float]:
    """The gold reward of the toy data; a question is the last line of its prompt."""
    return toy.gold_reward([prompt.splitlines()[-1] for prompt in prompts], responses)


def lengthen(data: Path) -> None:
    """Put sentences of earlier answers before each question, as many as fit into the longest prompt."""
    tokenizer, rng = AutoTokenizer.from_pretrained(data / "tokenizer"), random.Random(0)
    longest = LENGTHS["long"][0] - 2  # what stands around a prompt
    answers = [row["response"] for row in read_rows(data / "demonstrations.jsonl")]
    sentences = [sentence for answer in answers for sentence in re.findall(r"[^.?!]+[.?!]", answer)]
    for path in sorted(data.glob("*.jsonl")):
        rows = read_rows(path)
        for row in rows:
            longer = prompt = row["prompt"]
            while len(tokenizer(longer).input_ids) <= longest:
                prompt, separator = longer, " " if "\n" in longer else "\n"
                longer = f"{rng.choice(sentences).strip()}{separator}{prompt}"
            row["prompt"] = prompt
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file."""
    return [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]


def prepare(folder: Path, world: str) -> None:
    """Toy data, SFT policy and reward model, in a folder."""

    def cli(*arguments: str) -> None:
        run_python(folder, str(ROOT / "cli.py"), *arguments)

    cli("make-toy-data")
    lengths: dict[str, list[str]] = {"sft": [], "reward_model": []}
    if world == "long":
        lengthen(folder / RUN / "data")
        prompt_length, response_length, _ = LENGTHS[world]
        lengths["reward_model"] = ["--data.max_prompt_length", str(prompt_length)]
        lengths["sft"] = [*lengths["reward_model"], "--model.sampling.max_new_tokens", str(response_length)]
    for stage, arguments in lengths.items():
        cli("fit", "--config", str(CONFIGS / f"{stage}.yaml"), *arguments)


def run_python(folder: Path, *arguments: str) -> str:
    """Run Python with one thread in a folder; what it printed. What it said beside that is in log.txt."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with open(folder / "log.txt", "a") as log:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, check=True
        ).stdout


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    """The quickstart's ReMax with another method."""
    config = yaml.safe_load((CONFIGS / "remax.yaml").read_text(encoding="utf-8"))
    method, (prompt_length, response_length, cut) = METHODS[case["method"]], LENGTHS[case["world"]]
    arguments = config["model"]["init_args"] | method.get("init_args", {})
    arguments["sampling"] = {"max_new_tokens": response_length}
    arguments["seed"] = config["data"]["init_args"]["seed"] = config["seed_everything"] = case["seed"]
    arguments["optimizer"]["init_args"]["lr"] = case["lr"]
    arguments["judge"]["init_args"]["function"] = "__main__.gold_reward"
    if case["method"] == "ReMax, fast":
        arguments["greedy_max_new_tokens"] = cut
    if case["method"] == "RLOO, 2 samples":
        arguments["sampling"]["num_samples"] = 2
    if case["method"] == "PPO":
        del arguments["kl_form"]  # in the rewards of the tokens: the same objective
    config["model"] = {"class_path": method["class_path"], "init_args": arguments}
    config["data"]["init_args"]["max_prompt_length"] = prompt_length
    config["trainer"] |= {
        "default_root_dir": case["run"],
        "max_steps": case["steps"],
        "val_check_interval": case["interval"],
        "profiler": {"class_path": "__main__.Clock"},
    }
    return config | {"hf_export": {"enabled": False}, "progress_lines": {"every_n_steps": 0}}


def work(case: dict[str, Any]) -> dict[str, Any]:
    """One run of a method, what the policy is worth without one, or the method's plan."""
    imports, path = peak_mib(), Path(f"{case['run']}.yaml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(config_of(case)), encoding="utf-8")
    if case["kind"] == "plan":
        return planned(path)
    command_line([case["kind"], "--config", str(path)])
    if case["kind"] == "validate":
        metrics = pandas.read_csv(Path(case["run"]) / "validate" / "version_0" / "metrics.csv")
        return evaluations(metrics)[0]
    metrics, clock = read_metrics(Path(case["run"])), CLOCKS[-1]
    return {
        "cpu_seconds": sum(clock.steps),
        "peak_mib": clock.peaks[case["interval"] - 1] - imports,
        "cpu_seconds_of_phases": dict(clock.phases),
        **gradients(metrics["train/grad_norm"].dropna().tolist()),
        "curve": curve(metrics, clock, case["interval"]),
    }


def planned(path: Path) -> dict[str, Any]:
    """Memory of a run as its plan has it, MiB: at its worst moment, and what is there all the time."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        command_line(["fit", "--config", str(path), "--print_config"])
    made = plan(read(yaml.safe_load(output.getvalue()), 1), DryRunCache())
    points = [point.terms for phase in made.phases.values() for point in phase]
    states = {term: min(terms[term] for terms in points) / 2**20 for term in STATES}
    return {"peak_mib": made.peak / 2**20, "states_mib": sum(states.values()), **states}


def gradients(norms: list[float]) -> dict[str, float]:
    """Mean of the gradient's norm over the steps, and its variance."""
    return {"grad_norm": statistics.fmean(norms), "grad_norm_variance": statistics.pvariance(norms)}


def evaluations(metrics: pandas.DataFrame) -> list[dict[str, float]]:
    """What each evaluation on held-out prompts found."""
    names = {"judge_reward": "gold", "reward": "proxy", "kl": "kl", "win_rate": "win_rate", "response_length": "tokens"}
    rows = metrics[metrics["val/judge_reward"].notna()]
    return [{short: float(row[f"val/{name}"]) for name, short in names.items()} for _, row in rows.iterrows()]


def curve(metrics: pandas.DataFrame, clock: Clock, interval: int) -> list[dict[str, float]]:
    """The evaluations with steps and CPU seconds before them, and the mean norm of the gradient since the last one."""
    norms, points = metrics["train/grad_norm"].dropna().tolist(), []
    for number, found in enumerate(evaluations(metrics), start=1):
        steps = number * interval
        norm = statistics.fmean(norms[steps - interval : steps])
        points.append({"step": steps, "cpu_seconds": sum(clock.steps[:steps]), "grad_norm": norm, **found})
    return points


def hyper_parameters(class_name: str) -> list[str]:
    """Arguments of a method's constructor that ``PolicyGradientModule`` and what it is built on do not have."""
    base = modules.PolicyGradientModule
    known = {name for each in base.__mro__ for name in arguments_of(each)}
    own = [each for each in getattr(modules, class_name).__mro__ if each not in base.__mro__]
    return [name for each in own for name in arguments_of(each) if name not in known]


def arguments_of(each: type) -> list[str]:
    """Names of the arguments of a class's own constructor."""
    parameters = inspect.signature(each.__init__).parameters.values() if "__init__" in vars(each) else ()
    return [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean over the seeds and, of several, standard deviation."""
    values = list(values)
    return {"mean": statistics.fmean(values)} | ({"std": statistics.stdev(values)} if len(values) > 1 else {})


def summarise(name: str, runs: list[dict[str, Any]], plan_of_method: dict[str, Any]) -> dict[str, Any]:
    """All runs of a method."""
    lasts = [run["curve"][-1] for run in runs]
    final = {key: spread(last[key] for last in lasts) for key in ("gold", "proxy", "kl", "win_rate", "tokens")}
    costs = ("cpu_seconds", "peak_mib", "grad_norm", "grad_norm_variance")
    phases = {phase: statistics.fmean(run["cpu_seconds_of_phases"].get(phase, 0.0) for run in runs) for phase in PHASES}
    return {
        "name": name,
        **final,
        **{key: spread(run[key] for run in runs) for key in costs},
        "cpu_seconds_of_phases": phases,
        "hyper_parameters": hyper_parameters(METHODS[name]["class_path"]),
        "plan": plan_of_method,
        "runs": runs,
    }


def written(figure: dict[str, float], digits: int = 2) -> str:
    """Mean and spread."""
    return f"{figure['mean']:.{digits}f}" + (f" ± {figure['std']:.{digits}f}" if "std" in figure else "")


def tables(cases: list[dict[str, Any]], sft: dict[str, Any]) -> list[Table]:
    """What was learned, what it cost, and what the paper published."""
    learned = Table(
        "", "gold reward", "proxy reward", "KL (nats)", "win rate", "gradient norm", "its variance", "own arguments"
    )
    learned.add_row("SFT", *(written(sft[key]) for key in ("gold", "proxy", "kl")), "", "", "", "", end_section=True)
    costs = Table("", "CPU s", *PHASES, "peak, MiB", "plan: states, MiB", "plan: peak, MiB")
    for case in cases:
        found = [written(case[key]) for key in ("gold", "proxy", "kl", "win_rate")]
        found += [written(case[key], 3) for key in ("grad_norm", "grad_norm_variance")]
        learned.add_row(case["name"], *found, str(len(case["hyper_parameters"])))
        phases = (f"{case['cpu_seconds_of_phases'][phase]:.1f}" for phase in PHASES)
        planned_mib = (f"{case['plan'][key]:.1f}" for key in ("states_mib", "peak_mib"))
        costs.add_row(
            case["name"], written(case["cpu_seconds"], 1), *phases, written(case["peak_mib"], 0), *planned_mib
        )
    published = Table("published by Li et al. 2024, not measured here", "figure", "where")
    for row in PUBLISHED:
        published.add_row(*row)
    return [learned, costs, published]


def draw(cases: list[dict[str, Any]], sft: dict[str, Any], path: Path) -> None:
    """Rewards, KL and gradient norm against steps, rewards against CPU time; the band is that of the seeds."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = (
        ("step", "gold", "gold reward"),
        ("step", "proxy", "proxy reward"),
        ("step", "kl", "KL to the SFT policy, nats"),
        ("cpu_seconds", "gold", "gold reward"),
        ("cpu_seconds", "proxy", "proxy reward"),
        ("step", "grad_norm", "norm of the policy's gradient"),
    )
    for axes, (x, y, label) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        start = sft[y]["mean"] if y in sft else None
        for case in cases:
            draw_lines(axes, case, x, y, start)
        axes.set_xlabel("optimizer steps" if x == "step" else "CPU seconds of training")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def draw_lines(axes: Axes, case: dict[str, Any], x: str, y: str, start: float | None) -> None:
    """A method's mean over its seeds, with the band from the lowest to the highest."""
    points = list(zip(*(run["curve"] for run in case["runs"]), strict=True))
    across = [statistics.fmean(point[x] for point in each) for each in points]
    mean, low, high = (
        [choose(point[y] for point in each) for each in points] for choose in (statistics.fmean, min, max)
    )
    if start is not None:
        across, mean, low, high = [0.0, *across], [start, *mean], [start, *low], [start, *high]
    (line,) = axes.plot(across, mean, label=case["name"], marker=".")
    axes.fill_between(across, low, high, color=line.get_color(), alpha=0.15)


def run_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare the data and models, and run all methods with all seeds in turn, each run in a process of its own."""
    if not (folder / RUN / "reward_model" / "hf").is_dir():
        prepare(folder, arguments.world)
    steps = arguments.steps
    interval = max(each for each in range(1, 21) if steps % each == 0)
    shared = {"world": arguments.world, "steps": steps, "interval": interval, "lr": arguments.lr}

    def run(kind: str, method: str, seed: int) -> dict[str, Any]:
        name = f"runs/paper/{method.replace(', ', '_').replace(' ', '_')}_{kind}_{seed}"
        shutil.rmtree(folder / name, ignore_errors=True)
        case = {**shared, "kind": kind, "method": method, "seed": seed, "run": name}
        made = json.loads(run_python(folder, __file__, "--worker", json.dumps(case)).splitlines()[-1])
        last = made.get("curve", [{}])[-1]
        print(f"{kind} {method} {seed}: {json.dumps(last)}", flush=True)
        return {"seed": seed, **made}

    plans = {name: run("plan", name, 0) for name in METHODS}
    starts = [run("validate", "ReMax", seed) for seed in arguments.seeds]
    runs = {(name, seed): run("fit", name, seed) for seed in arguments.seeds for name in METHODS}
    for made in plans.values():
        del made["seed"]
    return {
        **shared,
        "sft": {key: spread(start[key] for start in starts) for key in starts[0] if key != "seed"},
        "cases": [summarise(name, [runs[name, seed] for seed in arguments.seeds], plans[name]) for name in METHODS],
        "published": [dict(zip(("what", "figure", "where"), row, strict=True)) for row in PUBLISHED],
    }


def main() -> None:
    """Run everything, print the tables and the JSON object, draw the plot; or run one case as a worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=list(LENGTHS), default="quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each run")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of every policy")
    parser.add_argument("--folder", type=Path, help="keep the runs here; data and models are created if missing")
    parser.add_argument("--output", type=Path, help="file for the JSON object")
    parser.add_argument("--plot", type=Path, help="file for the plot, PNG")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    one_thread()
    if arguments.worker is not None:
        print(f"\n{json.dumps(work(arguments.worker))}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if arguments.folder is None else arguments.folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        found = run_all(arguments, folder)
    result = {"name": "paper", "command": " ".join(["python", *sys.argv]), **machine(), **found}
    if arguments.plot is not None:
        draw(result["cases"], result["sft"], arguments.plot)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for table in tables(result["cases"], result["sft"]):
        Console(width=max(Console().width, 140)).print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
