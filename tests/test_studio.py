"""The job launcher submits what it prints, and the SDK takes it; the start-up script installs once."""

import inspect
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from studio import job

ROOT = Path(__file__).parents[1]
COMMAND = "python cli.py fit --config configs/paper/llama2_7b_remax.yaml --trainer.strategy fsdp2"
TWO = f"{COMMAND} --trainer.num_nodes 2"
NOW = datetime(2026, 1, 31, 9, 5, 7)


class Machine:
    """A machine as the SDK has it: its kinds are attributes of the class."""


Machine.CPU, Machine.A100_X_4 = Machine(), Machine()  # type: ignore[attr-defined]


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was handed to an SDK that sends nothing."""
    calls: list[dict[str, Any]] = []

    def run(**values: Any) -> Any:
        calls.append(values)
        return SimpleNamespace(name=values["name"], link="somewhere")

    sdk = SimpleNamespace(Machine=Machine, Job=SimpleNamespace(run=run))
    monkeypatch.setattr(job, "load_sdk", lambda: sdk)
    return calls


@pytest.fixture
def sdk() -> Any:
    """The installed SDK; it asks the package index for news unless told not to."""
    os.environ["LIGHTNING_DISABLE_VERSION_CHECK"] = "1"
    reason = "lightning-sdk is not installed: pip install -e '.[studio]'"
    return pytest.importorskip("lightning_sdk", reason=reason, exc_type=ModuleNotFoundError)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        job.main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_dry_run_sends_nothing(submitted: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--studio", "mine", "--teamspace", "me/lab", "--env.WANDB_MODE", "offline"]
    job.main(["--machine", "A100_X_4", "--num_machines", "2", "--command", TWO, "--name", "first", *where, "--dry_run"])
    assert submitted == []
    called: list[dict[str, Any]] = []
    module = SimpleNamespace(Machine=Machine, Job=SimpleNamespace(run=lambda **values: called.append(values)))
    printed = capsys.readouterr().out.replace("from lightning_sdk import Job, Machine\n", "")
    exec(printed, {"Job": module.Job, "Machine": module.Machine})
    assert called == [
        {
            "name": "first",
            "machine": Machine.A100_X_4,  # type: ignore[attr-defined]
            "num_machines": 2,
            "command": f"cd remax-lightning && {TWO}",
            "env": {"PYTHONUNBUFFERED": "1", "WANDB_MODE": "offline"},
            "studio": "mine",
            "teamspace": "me/lab",
        }
    ]


def test_what_is_printed_is_what_is_submitted(
    submitted: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    request = job.Request(machine="A100_X_4", command=COMMAND, interruptible=True, max_run_attempts=3)
    job.submit(request, dry_run=True, now=NOW)
    printed = capsys.readouterr().out
    job.submit(request, dry_run=False, now=NOW)
    (values,) = submitted
    assert values["machine"] is Machine.A100_X_4  # type: ignore[attr-defined]
    assert printed.strip() == job.call({**values, "machine": "A100_X_4"})
    assert values["name"] == "llama2-7b-remax-0131-090507"
    assert (values["interruptible"], values["max_run_attempts"]) == (True, 3)
    assert "submitted llama2-7b-remax-0131-090507: somewhere" in capsys.readouterr().out


def test_an_unknown_machine_is_refused(submitted: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    for further in ([], ["--dry_run"]):
        message = refused(capsys, "--machine", "A800_X_4", "--command", COMMAND, *further)
        assert "machine must be one of CPU, A100_X_4; got A800_X_4" in message
    assert submitted == []


@pytest.mark.parametrize(
    ("command", "num_machines", "message"),
    [
        (COMMAND, 2, "must say --trainer.num_nodes 2, got none"),
        (TWO, 1, "must say --trainer.num_nodes 1, got 2"),
        (f"{COMMAND} --trainer.num_nodes=3", 2, "must say --trainer.num_nodes 2, got 3"),
        (COMMAND, 0, "num_machines must be at least 1, got 0"),
    ],
)
def test_a_command_for_another_number_of_machines_is_refused(
    submitted: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    command: str,
    num_machines: int,
    message: str,
) -> None:
    arguments = ["--machine", "CPU", "--command", command, "--num_machines", str(num_machines)]
    assert message in refused(capsys, *arguments, "--dry_run")
    assert submitted == []


def test_without_the_sdk_only_a_dry_run_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "load_sdk", lambda: None)
    arguments = ["--machine", "A100_X_4", "--command", COMMAND]
    job.main([*arguments, "--dry_run"])
    captured = capsys.readouterr()
    assert "machine=Machine.A100_X_4" in captured.out
    assert "is not checked" in captured.err
    assert "pip install" in refused(capsys, *arguments)


def test_the_sdk_takes_the_call(sdk: Any) -> None:
    full = job.Request(
        machine="A100_X_4",
        command=TWO,
        num_machines=2,
        studio="mine",
        teamspace="me/lab",
        env={"WANDB_MODE": "offline"},
        interruptible=True,
        max_run_attempts=3,
    )
    for request in (full, job.Request(machine="CPU", command=COMMAND)):
        arguments = {**request.arguments(NOW), "machine": job.find_machine(sdk, request.machine)}
        bound = inspect.signature(sdk.Job.run).bind(**arguments)
        assert bound.arguments == arguments
        assert isinstance(bound.arguments["machine"], sdk.Machine)


def test_the_sdk_knows_the_machines_of_the_readme(sdk: Any) -> None:
    for name in ("A100_X_4", "A100_80GB_X_8", "H100_X_8", "H200"):
        assert job.find_machine(sdk, name).name == name
    with pytest.raises(ValueError, match=r"H200_X_8.*got A800"):
        job.find_machine(sdk, "A800")


class Studio:
    """A home folder with the project's files of requirements, and a python that notes what it is asked to install."""

    def __init__(self, folder: Path, torch: str | None) -> None:
        self.home, self.torch = folder / "home", torch
        self.project = self.home / "remax-lightning"
        self.calls = folder / "calls"
        self.project.mkdir(parents=True)
        for name in ("setup.cfg", "pyproject.toml"):
            (self.project / name).write_text((ROOT / name).read_text())
        self.python = folder / "bin" / "python"
        self.python.parent.mkdir()
        self.set_torch(torch)

    def set_torch(self, version: str | None) -> None:
        """Let the Studio have a version of torch, or none."""
        says = "exit 1" if version is None else f"echo {version}"
        script = f"""#!/bin/bash
if [[ "$2" == *'"torch"'* ]]; then {says}
elif [ "$1" = -c ]; then [ -e {self.calls} ]
else
    echo "$*" >> {self.calls}
    while [ "$1" != --constraint ]; do shift; done
    cat "$2" >> {self.calls}
fi
"""
        self.python.write_text(script)
        self.python.chmod(0o755)

    def start(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(ROOT / "studio" / "on_start.sh")],
            env={"HOME": str(self.home), "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"},
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def installed(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


needs_bash = pytest.mark.skipif(sys.platform == "win32", reason="a script for bash")


@needs_bash
def test_the_start_up_script_installs_once(tmp_path: Path) -> None:
    studio = Studio(tmp_path, torch="2.8.0+cu128")
    for _ in range(3):
        assert studio.start().returncode == 0
    install, constraint = studio.installed()
    assert install.startswith("-m pip install")
    assert install.endswith(f"--editable {studio.project}")
    assert constraint == "torch==2.8.0+cu128"

    (studio.project / "setup.cfg").write_text("[metadata]\n")
    assert studio.start().returncode == 0
    assert len(studio.installed()) == 4
    studio.set_torch("2.9.0+cu128")
    assert studio.start().returncode == 0
    assert studio.installed()[-1] == "torch==2.9.0+cu128"


@needs_bash
def test_the_start_up_script_without_torch_or_project(tmp_path: Path) -> None:
    studio = Studio(tmp_path, torch=None)
    assert studio.start().returncode == 0
    assert len(studio.installed()) == 1  # no constraint
    (studio.project / "setup.cfg").unlink()
    end = studio.start()
    assert end.returncode == 1
    assert "set REMAX_LIGHTNING_DIR" in end.stderr
