"""The report on a tested run: a table of the reference against the policy, samples, a summary file and a plot."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from remax_lightning.evaluation.win_rate import WinRate, win_rate
from remax_lightning.models.visible_text import visible

Row = dict[str, Any]

REQUIRED_KEYS = ("prompt", "response", "reference_response", "reward", "reference_reward", "win_rate")


@dataclass(frozen=True)
class Labels:
    """Names in the report, which also begin keys of the summary.

    Attributes:
        reference: The model that the policy started from.
        policy: The trained policy.
        judge: Whose reward the judge's is.
    """

    reference: str
    policy: str
    judge: str

    @property
    def judge_reward(self) -> str:
        """The judge's reward, in tables and plots."""
        return f"{self.judge} reward".capitalize()

    def judge_key(self, model: str) -> str:
        """Key of a model's mean reward by the judge: `reference_judge_reward`, or `sft_gold_reward`."""
        return f"{model}_{self.judge}_reward".lower().replace(" ", "_")


@dataclass(frozen=True)
class ModelScores:
    """Means over one model's responses; None where unknown.

    Attributes:
        reward: The reward that the policy was trained with.
        judge_reward: Reward by the judge.
        response_length: Tokens in a response.
    """

    reward: float | None
    judge_reward: float | None
    response_length: float | None


@dataclass(frozen=True)
class Comparison:
    """The policy against the reference.

    Attributes:
        reference: Means of the reference.
        policy: Means of the trained policy.
        win_rate: How often the policy's response wins, as the test run has decided.
        kl: Mean KL of the policy from the reference in nats per response; None where unknown.
        truncated: Fraction of the policy's responses cut at the token limit; None where unknown.
        has_judge: Whether there was a judge.
    """

    reference: ModelScores
    policy: ModelScores
    win_rate: WinRate
    kl: float | None
    truncated: float | None
    has_judge: bool


def report(
    run_dir: str,
    responses: str | None = None,
    output_dir: str | None = None,
    reward_model_dir: str | None = None,
    started_at: float | None = None,
    num_samples: int = 3,
    reference_label: str = "Reference",
    policy_label: str = "Policy",
    judge_label: str = "judge",
) -> None:
    """Compares a trained policy with its reference, after `python cli.py test`.

    Prints a table and samples, and writes OUTPUT_DIR/summary.json and OUTPUT_DIR/reward.png.

    Args:
        run_dir: Folder of the run (`trainer.default_root_dir`); its newest logs/version_*/metrics.csv is plotted, after
            those that it was resumed from.
        responses: JSON lines file of the test run: a row for each prompt with both models' responses and rewards. The
            default is RUN_DIR/responses.jsonl.
        output_dir: Folder to write; created if it does not exist. The default is RUN_DIR.
        reward_model_dir: Folder of the reward model's run, for its accuracy on held-out preferences.
        started_at: When the work began, in seconds since 1970 (`date +%s`); gives the seconds in the summary.
        num_samples: Prompts to print with both responses.
        reference_label: Name of the reference.
        policy_label: Name of the policy.
        judge_label: Name of the judge; with the labels SFT, ReMax and gold, the summary has the keys
            `sft_gold_reward` and `remax_gold_reward`.

    Raises:
        FileNotFoundError: If the responses or a run's metrics are missing.
        ValueError: If a file holds no rows or lacks what the report needs.
    """
    labels = Labels(reference_label, policy_label, judge_label)
    rows = read_responses(Path(run_dir, "responses.jsonl") if responses is None else Path(responses))
    metrics = read_metrics(Path(run_dir))
    accuracy = last_value(read_metrics(Path(reward_model_dir)), "val/accuracy") if reward_model_dir else None
    comparison = compare(rows)
    folder = Path(output_dir or run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    seconds = None if started_at is None else round(time.time() - started_at, 1)
    summary = summarise(comparison, labels, accuracy, seconds)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    plot_training(metrics, labels, folder / "reward.png")
    console = Console()
    console.print(make_table(comparison, labels, accuracy))
    for row in rows[: max(num_samples, 0)]:
        console.print(make_sample(row, labels))


def read_responses(path: Path) -> list[Row]:
    """Reads the rows of a responses file and checks that they have what the report needs."""
    if not path.is_file():
        partial = path.with_name(f"{path.name}.partial")
        hint = f", only {partial.name} of a test that did not end" if partial.is_file() else ""
        raise FileNotFoundError(f"there is no responses file {path}{hint}; write it first with `python cli.py test`")
    rows = []
    # not splitlines, which breaks lines within texts, too
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} must be a JSON object; it is {line[:80]!r}") from error
        missing = [key for key in REQUIRED_KEYS if key not in row]
        if missing:
            raise ValueError(
                f"line {number} of {path} lacks {', '.join(missing)}; run `python cli.py test` again, with a policy "
                "that has a reference (kl_coef above 0)"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} must hold at least one response; it is empty; run `python cli.py test` again")
    return rows


def read_metrics(run_dir: Path) -> pandas.DataFrame:
    """Reads the metrics of a run: of its newest version, and of the ones that it was resumed from what came before."""
    files = list(run_dir.glob("logs/version_[0-9]*/metrics.csv"))
    if not files:
        raise FileNotFoundError(
            f"there is no {run_dir}/logs/version_*/metrics.csv; give the folder of a run that was logged by a "
            "CSVLogger, which is the default (--trainer.logger)"
        )
    files.sort(key=lambda file: int(file.parent.name.removeprefix("version_")))
    metrics = read_version(files[-1])
    for file, older in zip(files[::-1], files[-2::-1], strict=False):
        if not is_resumed(file, metrics):
            break
        earlier = read_version(older)
        metrics = pandas.concat([earlier[earlier["step"] < metrics["step"].min()], metrics], ignore_index=True)
    metrics.attrs["path"] = str(files[-1])
    return metrics


def is_resumed(file: Path, metrics: pandas.DataFrame) -> bool:
    """Whether a version of a run goes on where an older one has stopped.

    Args:
        file: Its metrics.csv, with the configuration of the run beside it if it is one of the command line.
        metrics: What is known from it on.
    """
    config = file.with_name("config.yaml")
    if config.is_file() and yaml.safe_load(config.read_text(encoding="utf-8")).get("ckpt_path") is None:
        return False
    return not metrics["step"].min() <= 0  # no steps at all: it was resumed and ended at once


def read_version(file: Path) -> pandas.DataFrame:
    """Reads one metrics.csv."""
    try:
        metrics = pandas.read_csv(file)
    except pandas.errors.EmptyDataError as error:
        raise ValueError(f"{file} must hold the metrics of a run; it is empty; run the training again") from error
    if "step" not in metrics:
        raise ValueError(f"{file} must have a column `step`; it has {list(metrics)}")
    return metrics


def last_value(metrics: pandas.DataFrame, name: str) -> float | None:
    """The last value logged under a name, or None if there is none."""
    if name not in metrics or metrics[name].isna().all():
        return None
    return float(metrics[name].dropna().iloc[-1])


def compare(rows: Sequence[Row]) -> Comparison:
    """Averages both models' rewards and lengths and the policy's wins."""
    scores = {
        prefix: ModelScores(
            reward=_mean(rows, prefix + "reward"),
            judge_reward=_mean(rows, prefix + "judge_reward"),
            response_length=_mean(rows, prefix + "response_length"),
        )
        for prefix in ("reference_", "")
    }
    return Comparison(
        reference=scores["reference_"],
        policy=scores[""],
        win_rate=win_rate(_values(rows, "win_rate")),
        kl=_mean(rows, "kl"),
        truncated=_mean(rows, "truncated"),
        has_judge="judge_reward" in rows[0],
    )


def _values(rows: Sequence[Row], key: str) -> list[float]:
    """One number of each row; NaN where a row has none."""
    return [math.nan if row.get(key) is None else float(row[key]) for row in rows]


def _mean(rows: Sequence[Row], key: str) -> float | None:
    """Mean of the finite values, or None if there is none."""
    finite = [value for value in _values(rows, key) if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def summarise(
    comparison: Comparison, labels: Labels, accuracy: float | None, seconds: float | None
) -> dict[str, float | None]:
    """The numbers of summary.json; None where unknown."""
    reference, policy, wins = comparison.reference, comparison.policy, comparison.win_rate
    judged = {
        labels.judge_key(labels.reference): reference.judge_reward,
        labels.judge_key(labels.policy): policy.judge_reward,
    }
    return {
        "reference_reward": reference.reward,
        "policy_reward": policy.reward,
        **(judged if comparison.has_judge else {}),
        "win_rate": wins.rate,
        "win_rate_low": wins.low,
        "win_rate_high": wins.high,
        "kl": comparison.kl,
        "reward_model_accuracy": accuracy,
        "seconds": seconds,
    }


def make_table(comparison: Comparison, labels: Labels, accuracy: float | None) -> Table:
    """A table of the reference against the policy."""
    reference, policy, wins = comparison.reference, comparison.policy, comparison.win_rate
    caption = None if accuracy is None else f"Reward model accuracy on held-out preferences: {accuracy:.1%}"
    table = Table(title=f"{wins.num_comparisons} test prompts", caption=caption)
    table.add_column("")
    table.add_column(labels.reference, justify="right")
    table.add_column(labels.policy, justify="right")
    if comparison.has_judge:
        table.add_row(labels.judge_reward, _number(reference.judge_reward), _number(policy.judge_reward))
    table.add_row("Training reward", _number(reference.reward), _number(policy.reward))
    interval = f"{wins.rate:.1%} ({wins.low:.1%} to {wins.high:.1%})"
    table.add_row(f"Win rate over {labels.reference}, 95 % interval", "", interval)
    table.add_row(f"KL from {labels.reference}, nats per response", "", _number(comparison.kl))
    table.add_row("Response length, tokens", _number(reference.response_length), _number(policy.response_length))
    table.add_row("Truncated responses", "", _number(comparison.truncated, ".1%"))
    return table


def _number(value: float | None, form: str = ".2f") -> str:
    """A number for the table."""
    return "-" if value is None else format(value, form)


def make_sample(row: Row, labels: Labels) -> Text:
    """A prompt with the reference's and the policy's response, without markup; control characters are written out."""
    prompt = row["prompt"]
    if isinstance(prompt, list):
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    width = max(len(label) for label in ("Prompt", labels.reference, labels.policy)) + 2
    return Text.assemble(
        (f"\n{'Prompt':{width}}", "bold"),
        visible(str(prompt)),
        (f"\n{labels.reference:{width}}", "bold yellow"),
        visible(str(row["reference_response"])),
        (f"\n{labels.policy:{width}}", "bold green"),
        visible(str(row["response"])),
    )


def plot_training(metrics: pandas.DataFrame, labels: Labels, path: Path) -> None:
    """Plots rewards and KL by step: the raw values light, their moving average in full."""
    held_out = "val/judge_reward" if last_value(metrics, "val/judge_reward") is not None else "val/reward"
    judge = labels.judge_reward if held_out == "val/judge_reward" else "Training reward"
    curves = {
        "train/reward": "Training reward, sampled responses",
        "train/baseline_reward": "Training reward, baseline",
        held_out: f"{judge}, held-out prompts",
    }
    if all(last_value(metrics, name) is None for name in curves):
        raise ValueError(
            f"{metrics.attrs.get('path', 'the metrics')} must have one of the columns {list(curves)}; "
            f"it has {list(metrics)}; give the folder of a run that was trained with a reward"
        )
    figure = Figure(figsize=(7, 6), layout="constrained")
    reward_axes, kl_axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _draw_curves(reward_axes, metrics, curves)
    _draw_curves(kl_axes, metrics, {"train/kl": "Sampled responses"})
    reward_axes.set_ylabel("Reward (mean per response)")
    kl_axes.set_ylabel(f"KL from {labels.reference} (nats)")
    kl_axes.set_xlabel("Step (optimizer updates)")
    figure.savefig(path, dpi=150)


def _draw_curves(axes: Axes, metrics: pandas.DataFrame, curves: dict[str, str]) -> None:
    """Draws the curves that the metrics have; a short one with its points."""
    for index, (name, label) in enumerate(curves.items()):
        if last_value(metrics, name) is None:
            continue
        logged = metrics[["step", name]].dropna()
        smooth = logged[name].rolling(max(len(logged) // 20, 1), min_periods=1, center=True).mean()
        axes.plot(logged["step"], logged[name], color=f"C{index}", alpha=0.25, linewidth=1)
        axes.plot(logged["step"], smooth, color=f"C{index}", label=label, marker="o" if len(logged) <= 20 else "")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
