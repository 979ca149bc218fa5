import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from remax_lightning.evaluation.report import read_metrics, report

SUMMARY_KEYS = {
    *("reference_reward", "policy_reward", "win_rate", "win_rate_low", "win_rate_high"),
    *("kl", "reward_model_accuracy", "seconds"),
}
QUICKSTART = {"reference_label": "SFT", "policy_label": "ReMax", "judge_label": "gold"}


def make_row(index: int) -> dict[str, Any]:
    return {
        "prompt": f"Tell me about [bold]number {index}[/bold].",
        "response": "After.",
        "reference_response": "Before.",
        "reward": 10.0 + index,
        "reference_reward": 20.0,
        "judge_reward": 2.0 if index else -1.0,
        "reference_judge_reward": 0.0,
        "win_rate": float(index > 0),
        "kl": float(index),
        "response_length": 20,
        "reference_response_length": 10,
        "truncated": index == 0,
    }


def test_text_of_models_does_not_control_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harmful = "\x1b]0;title\x07\x1b[2J\x9b1m\r\u202eabc\ud83d"
    row = {**make_row(0), "response": harmful, "reference_response": f"a {harmful}"}
    chat = {**make_row(1), "prompt": [{"role": harmful, "content": harmful}]}
    write_rows(folder / "responses.jsonl", [row, chat])
    report(str(folder / "remax"), str(folder / "responses.jsonl"), str(folder))
    printed = capsys.readouterr().out
    assert printed.count(r"\x1b]0;title\x07\x1b[2J\x9b1m\r\u202eabc\ud83d") == 4
    assert not set(harmful) - set("abctile0;][2J1m") & set(printed)


def write_metrics(run_dir: Path, version: int, text: str) -> None:
    folder = run_dir / "logs" / f"version_{version}"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(text)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "responses.jsonl", [make_row(index) for index in range(4)])
    curve = "".join(f"{step},{step / 50},{step / 40},{step / 100},\n" for step in range(1, 100))
    write_metrics(
        tmp_path / "remax",
        10,
        "step,train/reward,train/baseline_reward,train/kl,val/judge_reward\n" + curve + "0,,,,0.5\n99,,,,2.5\n",
    )
    write_metrics(tmp_path / "remax", 9, "step,nothing\n1,2\n")  # older than version_10, though its name sorts last
    write_metrics(
        tmp_path / "reward_model", 0, "step,train/loss,val/accuracy\n1,0.5,\n2,,0.75\n3,0.4,\n4,,0.875\n5,0.4,\n"
    )
    return tmp_path


def run(folder: Path, **options: Any) -> dict[str, Any]:
    report(str(folder / "remax"), str(folder / "responses.jsonl"), str(folder / "out"), **options)
    return json.loads((folder / "out" / "summary.json").read_text())


def test_summary_holds_the_means(folder: Path) -> None:
    summary = run(folder, reward_model_dir=str(folder / "reward_model"), started_at=time.time() - 100)
    assert set(summary) == SUMMARY_KEYS | {"reference_judge_reward", "policy_judge_reward"}
    assert (summary["reference_reward"], summary["policy_reward"]) == (20.0, 11.5)
    assert summary["reference_judge_reward"] == 0.0
    assert summary["policy_judge_reward"] == pytest.approx((2.0 * 3 - 1.0) / 4)
    assert summary["win_rate"] == 0.75
    assert summary["win_rate_low"] < 0.75 < summary["win_rate_high"]
    assert summary["kl"] == 1.5
    assert summary["reward_model_accuracy"] == 0.875
    assert 100 <= summary["seconds"] < 160


def test_unknown_numbers_are_null(folder: Path) -> None:
    rows = [{key: value for key, value in make_row(index).items() if key != "kl"} for index in range(4)]
    write_rows(folder / "responses.jsonl", rows)
    summary = run(folder)
    assert summary["kl"] is summary["reward_model_accuracy"] is summary["seconds"] is None


def test_the_quickstart_s_labels_give_its_keys(folder: Path) -> None:
    summary = run(folder, **QUICKSTART)
    assert set(summary) == SUMMARY_KEYS | {"sft_gold_reward", "remax_gold_reward"}
    assert summary["sft_gold_reward"] == 0.0
    assert summary["remax_gold_reward"] == pytest.approx(1.25)


def test_without_a_judge_nothing_speaks_of_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{key: value for key, value in make_row(index).items() if "judge" not in key} for index in range(4)]
    write_rows(folder / "responses.jsonl", rows)
    summary = run(folder, **QUICKSTART)
    assert set(summary) == SUMMARY_KEYS
    assert (summary["reference_reward"], summary["policy_reward"]) == (20.0, 11.5)
    assert "gold" not in capsys.readouterr().out.lower()


def test_wins_are_those_that_the_test_run_has_decided(folder: Path) -> None:
    wins = [1.0, 0.5, float("nan"), None]  # whatever the scores say; NaN and null are no comparison
    write_rows(folder / "responses.jsonl", [{**make_row(index), "win_rate": win} for index, win in enumerate(wins)])
    assert run(folder)["win_rate"] == 0.75


def test_rows_without_a_win_rate_say_what_to_do(folder: Path) -> None:
    rows = [{key: value for key, value in make_row(index).items() if key != "win_rate"} for index in range(4)]
    write_rows(folder / "responses.jsonl", rows)
    with pytest.raises(ValueError, match=r"line 1 of .* lacks win_rate; run `python cli.py test` again.*kl_coef"):
        run(folder)


def test_the_run_s_folder_is_enough(folder: Path) -> None:
    (folder / "responses.jsonl").rename(folder / "remax" / "responses.jsonl")
    report(str(folder / "remax"))
    assert {"summary.json", "reward.png"} <= {path.name for path in (folder / "remax").iterdir()}


def test_table_and_samples_are_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, num_samples=2)
    printed = capsys.readouterr().out
    for text in ("Reference", "Policy", "Judge reward", "75.0%", "[bold]number 1[/bold]"):
        assert text in printed
    assert not any(word in printed for word in ("SFT", "ReMax", "old reward"))
    assert printed.count("Tell me about") == 2
    run(folder, num_samples=0, **QUICKSTART)
    printed = capsys.readouterr().out
    assert "Tell me about" not in printed
    for text in ("SFT", "ReMax", "Gold reward"):
        assert text in printed


def test_plot_is_an_image_with_ink(folder: Path) -> None:
    run(folder)
    with Image.open(folder / "out" / "reward.png") as image:
        image.verify()
    with Image.open(folder / "out" / "reward.png") as image:
        assert min(image.size) >= 600
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 10


VERSIONS = {
    0: {5: 0.0, 6: 0.0},  # another run
    1: dict.fromkeys(range(7), 1.0),
    2: dict.fromkeys(range(4, 9), 2.0),
    3: dict.fromkeys(range(8, 12), 3.0),
}


def logged(folder: Path, versions: dict[int, dict[int, float]], configs: dict[int, str]) -> dict[int, float]:
    for number, rows in versions.items():
        lines = "".join(f"{step},{value}\n" for step, value in rows.items())
        write_metrics(folder, number, "step,train/reward\n" + lines)
        if number in configs:
            (folder / "logs" / f"version_{number}" / "config.yaml").write_text(f"ckpt_path: {configs[number]}\n")
    metrics = read_metrics(folder)
    return dict(zip(metrics["step"], metrics["train/reward"], strict=True))


@pytest.mark.parametrize("configs", [{}, {0: "null", 1: "null", 2: "last", 3: "last"}])
def test_a_resumed_run_is_read_from_its_start(tmp_path: Path, configs: dict[int, str]) -> None:
    expected = dict.fromkeys(range(4), 1.0) | dict.fromkeys(range(4, 8), 2.0) | VERSIONS[3]
    assert logged(tmp_path, VERSIONS, configs) == expected


def test_a_new_run_is_read_alone(tmp_path: Path) -> None:
    fresh = {49: 4.0, 99: 4.0}  # logged every 50 steps
    assert logged(tmp_path, {**VERSIONS, 4: fresh}, {4: "null"}) == fresh


def test_rows_with_line_separators_in_a_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**make_row(index), "prompt": "one\u2028two\u0085three"} for index in range(4)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "responses.jsonl").write_text(text, encoding="utf-8")
    assert run(folder)["policy_reward"] == 11.5
    assert "three" in capsys.readouterr().out


def test_an_interrupted_test_is_named(folder: Path) -> None:
    (folder / "responses.jsonl").rename(folder / "responses.jsonl.partial")
    with pytest.raises(FileNotFoundError, match=r"only responses.jsonl.partial of a test that did not end"):
        run(folder)


@pytest.mark.parametrize("missing", ["responses.jsonl", "remax", "reward_model"])
def test_missing_files_are_named(folder: Path, missing: str) -> None:
    (folder / missing).rename(folder / "moved")
    with pytest.raises(FileNotFoundError, match=missing):
        run(folder, reward_model_dir=str(folder / "reward_model"))
    assert not (folder / "out").exists()


def test_broken_responses_are_located(folder: Path) -> None:
    path = folder / "responses.jsonl"
    write_rows(path, [make_row(0), {"prompt": "Who?"}])
    with pytest.raises(ValueError, match=r"line 2 of .*responses.jsonl lacks response, reference_response"):
        run(folder)
    path.write_text("not json\n")
    with pytest.raises(ValueError, match=r"line 1 of .*responses.jsonl must be a JSON object"):
        run(folder)
    path.write_text("")
    with pytest.raises(ValueError, match=r"responses.jsonl must hold at least one response"):
        run(folder)


def test_a_run_without_rewards_is_refused(folder: Path) -> None:
    write_metrics(folder / "remax", 11, "step,train/loss\n0,2\n")
    with pytest.raises(ValueError, match=r"version_11.*train/reward"):
        run(folder)


def test_a_run_without_a_csv_logger_is_named(folder: Path) -> None:
    for path in (folder / "remax").rglob("metrics.csv"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"remax/logs/version_\*/metrics.csv; .*logged by a CSVLogger"):
        run(folder)


def test_a_plot_without_a_judge_has_the_held_out_reward(folder: Path) -> None:
    write_metrics(folder / "remax", 11, "step,val/reward\n0,2\n1,3\n")
    run(folder)
    assert (folder / "out" / "reward.png").is_file()
