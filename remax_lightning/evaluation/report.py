"""The report a run ends with: a table of SFT against ReMax, samples, a summary file and a plot of the training."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from remax_lightning.evaluation.win_rate import WinRate, win_rate

Row = dict[str, Any]

REQUIRED_KEYS = ("prompt", "response", "reference_response", "reward", "reference_reward")
REWARD_CURVES = {
    "train/reward": "Sampled responses, learned reward",
    "train/baseline_reward": "Greedy responses, learned reward",
    "val/judge_reward": "Held-out prompts, gold reward",
}
KL_CURVES = {"train/kl": "Sampled responses"}


@dataclass(frozen=True)
class ModelScores:
    """Means over one model's responses; None where unknown.

    Attributes:
        judge_reward: Reward by the judge, or the learned reward when there is no judge.
        reward: Learned reward.
        response_length: Tokens in a response.
    """

    judge_reward: float | None
    reward: float | None
    response_length: float | None


@dataclass(frozen=True)
class Comparison:
    """The policy against the reference it started from.

    Attributes:
        reference: Means of the reference, the SFT model.
        policy: Means of the trained policy.
        win_rate: How often the policy's response has the higher judge reward.
        kl: Mean KL of the policy from the reference in nats per response; None where unknown.
        truncated: Share of the policy's responses cut at the token limit; None where unknown.
        has_judge: Whether the judge rewards come from a judge.
    """

    reference: ModelScores
    policy: ModelScores
    win_rate: WinRate
    kl: float | None
    truncated: float | None
    has_judge: bool


def report(
    responses: str,
    run_dir: str,
    output_dir: str,
    reward_model_dir: str | None = None,
    started_at: float | None = None,
    num_samples: int = 3,
) -> None:
    """Compares a trained policy with the model it started from.

    Prints a table and samples, and writes OUTPUT_DIR/summary.json and OUTPUT_DIR/reward.png.

    Args:
        responses: JSON lines file of the test run: a row for each prompt with both models' responses and rewards.
        run_dir: Folder of the ReMax run; its newest logs/version_*/metrics.csv is plotted.
        output_dir: Folder to write; made if it does not exist.
        reward_model_dir: Folder of the reward model's run, for its accuracy on held-out preferences.
        started_at: When the work began, in seconds since 1970 (`date +%s`); gives the seconds in the summary.
        num_samples: Prompts to print with the responses before and after.

    Raises:
        FileNotFoundError: If the responses or a run's metrics are missing.
        ValueError: If a file holds no rows or lacks what the report needs.
    """
    rows = read_responses(Path(responses))
    metrics = read_metrics(Path(run_dir))
    accuracy = last_value(read_metrics(Path(reward_model_dir)), "val/accuracy") if reward_model_dir else None
    comparison = compare(rows)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    seconds = None if started_at is None else round(time.time() - started_at, 1)
    summary = summarise(comparison, accuracy, seconds)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    plot_training(metrics, folder / "reward.png")
    console = Console()
    console.print(make_table(comparison, accuracy))
    for row in rows[: max(num_samples, 0)]:
        console.print(make_sample(row))


def read_responses(path: Path) -> list[Row]:
    """Reads the rows of a responses file and checks that they have what the report needs."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no responses file {path}. Write it first with `python cli.py test`.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {path} must be a JSON object; it is {line[:80]!r}.") from error
        missing = [key for key in REQUIRED_KEYS if key not in row]
        if missing:
            raise ValueError(f"Line {number} of {path} must have the keys {REQUIRED_KEYS}; it lacks {missing}.")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} must hold at least one response; it is empty. Run `python cli.py test` again.")
    return rows


def read_metrics(run_dir: Path) -> pandas.DataFrame:
    """Reads the metrics of a run's newest version."""
    files = list(run_dir.glob("logs/version_[0-9]*/metrics.csv"))
    if not files:
        raise FileNotFoundError(
            f"There is no {run_dir}/logs/version_*/metrics.csv. Give the folder of a finished run with a CSVLogger."
        )
    newest = max(files, key=lambda file: int(file.parent.name.removeprefix("version_")))
    try:
        metrics = pandas.read_csv(newest)
    except pandas.errors.EmptyDataError as error:
        raise ValueError(f"{newest} must hold the metrics of a run; it is empty. Run the training again.") from error
    if "step" not in metrics:
        raise ValueError(f"{newest} must have a column `step`; it has {list(metrics)}.")
    metrics.attrs["path"] = str(newest)
    return metrics


def last_value(metrics: pandas.DataFrame, name: str) -> float | None:
    """The last value logged under a name, or None if there is none."""
    if name not in metrics or metrics[name].isna().all():
        return None
    return float(metrics[name].dropna().iloc[-1])


def compare(rows: Sequence[Row]) -> Comparison:
    """Averages both models' rewards and lengths and counts the policy's wins."""
    judge_keys = ("judge_reward", "reference_judge_reward")
    has_judge = all(row.get(key) is not None for row in rows for key in judge_keys)
    judge = "judge_reward" if has_judge else "reward"
    scores = {
        prefix: ModelScores(
            judge_reward=_mean(_values(rows, prefix + judge)),
            reward=_mean(_values(rows, prefix + "reward")),
            response_length=_mean(_values(rows, prefix + "response_length")),
        )
        for prefix in ("reference_", "")
    }
    return Comparison(
        reference=scores["reference_"],
        policy=scores[""],
        win_rate=win_rate(_values(rows, judge), _values(rows, "reference_" + judge)),
        kl=_mean(_values(rows, "kl")),
        truncated=_mean(_values(rows, "truncated")),
        has_judge=has_judge,
    )


def _values(rows: Sequence[Row], key: str) -> list[float]:
    """One number of each row; NaN where a row has none."""
    return [math.nan if row.get(key) is None else float(row[key]) for row in rows]


def _mean(values: Sequence[float]) -> float | None:
    """Mean of the finite values, or None if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def summarise(comparison: Comparison, accuracy: float | None, seconds: float | None) -> dict[str, float | None]:
    """The numbers of summary.json; None where unknown."""
    return {
        "sft_gold_reward": comparison.reference.judge_reward,
        "remax_gold_reward": comparison.policy.judge_reward,
        "win_rate": comparison.win_rate.rate,
        "win_rate_low": comparison.win_rate.low,
        "win_rate_high": comparison.win_rate.high,
        "kl": comparison.kl,
        "reward_model_accuracy": accuracy,
        "seconds": seconds,
    }


def make_table(comparison: Comparison, accuracy: float | None) -> Table:
    """A table of the reference against the policy."""
    reference, policy, wins = comparison.reference, comparison.policy, comparison.win_rate
    caption = None if accuracy is None else f"Reward model accuracy on held-out preferences: {accuracy:.1%}"
    table = Table(title=f"{wins.num_comparisons} test prompts", caption=caption)
    table.add_column("")
    table.add_column("SFT (reference)", justify="right")
    table.add_column("ReMax (policy)", justify="right")
    if comparison.has_judge:
        table.add_row("Gold reward", _number(reference.judge_reward), _number(policy.judge_reward))
    table.add_row("Learned reward", _number(reference.reward), _number(policy.reward))
    interval = f"{wins.rate:.1%} ({wins.low:.1%} to {wins.high:.1%})"
    table.add_row("Win rate over SFT, 95 % interval", "", interval)
    table.add_row("KL from SFT, nats per response", "", _number(comparison.kl))
    table.add_row("Response length, tokens", _number(reference.response_length), _number(policy.response_length))
    table.add_row("Truncated responses", "", _number(comparison.truncated, ".1%"))
    return table


def _number(value: float | None, form: str = ".2f") -> str:
    """A number for the table."""
    return "-" if value is None else format(value, form)


def make_sample(row: Row) -> Text:
    """A prompt with the reference's and the policy's response; text is shown as it is, without markup."""
    prompt = row["prompt"]
    if isinstance(prompt, list):
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    return Text.assemble(
        ("\nPrompt  ", "bold"),
        str(prompt),
        ("\nSFT     ", "bold yellow"),
        str(row["reference_response"]),
        ("\nReMax   ", "bold green"),
        str(row["response"]),
    )


def plot_training(metrics: pandas.DataFrame, path: Path) -> None:
    """Plots rewards and KL by step: the raw values light, their moving average in full."""
    if not any(name in metrics and metrics[name].notna().any() for name in REWARD_CURVES):
        raise ValueError(
            f"{metrics.attrs.get('path', 'The metrics')} must have one of the columns {list(REWARD_CURVES)}; "
            f"it has {list(metrics)}. Give the folder of a ReMax run."
        )
    figure = Figure(figsize=(7, 6), layout="constrained")
    reward_axes, kl_axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _draw_curves(reward_axes, metrics, REWARD_CURVES)
    _draw_curves(kl_axes, metrics, KL_CURVES)
    reward_axes.set_ylabel("Reward (mean per response)")
    kl_axes.set_ylabel("KL from SFT (nats)")
    kl_axes.set_xlabel("Step (optimizer updates)")
    figure.savefig(path, dpi=150)


def _draw_curves(axes: Axes, metrics: pandas.DataFrame, curves: dict[str, str]) -> None:
    """Draws the curves that the metrics have; a short one with its points."""
    for index, (name, label) in enumerate(curves.items()):
        if name not in metrics or metrics[name].isna().all():
            continue
        logged = metrics[["step", name]].dropna()
        smooth = logged[name].rolling(max(len(logged) // 20, 1), min_periods=1, center=True).mean()
        axes.plot(logged["step"], logged[name], color=f"C{index}", alpha=0.25, linewidth=1)
        axes.plot(logged["step"], smooth, color=f"C{index}", label=label, marker="o" if len(logged) <= 20 else "")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
