"""Every benchmark runs at toy size and ends with the JSON object that its results have."""

import json
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, run_python

BENCHMARKS = ROOT / "benchmarks"
CONTESTS = {"head", "rollout", "step", "overhead"}
ARGUMENTS: dict[str, list[str]] = {
    **{name: ["--toy", "--repeats", "1"] for name in CONTESTS},
    "scaling": ["--toy"],
    "gpu": ["--size", "toy", "--method", "ReMax", "PPO"],
    "paper": ["--toy", "--steps", "2", "--seeds", "0", "--methods", "ReMax", "PPO"],
    "quickstart_seeds": ["--toy", "--seeds", "0"],
    "kill_nine": ["--kills", "1", "--steps", "4", "--hidden_size", "16"],
}
KEYS = {"name", "command", "date", "processor", "threads", "load_average", "versions", "cases"}
SECONDS = 280.0


def test_every_script_is_here() -> None:
    scripts = {path.stem for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert scripts == {*ARGUMENTS, "update_docs"}  # tests/test_documents.py runs that one


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_it_runs(name: str, tmp_path: Path) -> None:
    if name == "step":
        pytest.importorskip("trl", reason="trl is not installed: pip install -e '.[bench]'")
    folders = ["--folders", str(tmp_path)] if name == "kill_nine" else []
    plot = ["--plot", str(tmp_path / "plot.png")] if name == "paper" else []
    output = ["--output", str(tmp_path / "result.json")]
    printed = run_python([str(BENCHMARKS / f"{name}.py"), *ARGUMENTS[name], *folders, *plot, *output], SECONDS)
    result = json.loads(printed.splitlines()[-1])
    assert result == json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result.keys() >= KEYS
    assert not [case for case in result["cases"] if "failure" in case]
    if name in CONTESTS:
        for case in result["cases"]:
            assert case.keys() >= {"name", "time_ratio", "memory_ratio", "peer", "ours"}
            assert case["time_ratio"] > 0
    committed = BENCHMARKS / "results" / f"{result['name']}.json"
    if committed.exists():
        expected: dict[str, Any] = json.loads(committed.read_text(encoding="utf-8"))
        assert result.keys() == expected.keys()
        assert result["cases"][0].keys() >= expected["cases"][0].keys()
