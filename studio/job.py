"""Submit a command as a job on Lightning's machines, with the files and the environment of a Studio.

python studio/job.py --machine A100_X_4 --command "python cli.py fit --config configs/remax.yaml" --dry_run

Needs lightning-sdk (pip install -e '.[studio]'; a Studio has it) and ``lightning login``; --dry_run needs neither.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jsonargparse import ArgumentParser

SDK_MISSING = "lightning-sdk is not installed: pip install -e '.[studio]' (Python 3.11 or newer)"


@dataclass(frozen=True)
class Request:
    """What to run, and where.

    Args:
        machine: Name of a machine in lightning_sdk.Machine; A100_X_4 is one with four A100.
        command: What to run, as in a terminal in the project's folder.
        num_machines: Machines to run it on. With several, the command has to say ``--trainer.num_nodes``.
        name: Name of the job, which no other of the teamspace has; the default is made of configuration and time.
        folder: Folder of the project in the Studio's home, where jobs start.
        studio: Studio to take files and environment from; the default is the one that this is run in.
        teamspace: ``owner/teamspace``; the default is that of the Studio.
        env: Variables of the job's environment. Keys and tokens belong into the teamspace's secrets.
        interruptible: Take machines that are cheaper and may be taken away.
        max_run_attempts: How often the job is started at most, if machines fail; the default is Lightning's.

    Raises:
        ValueError: If the command does not fit the number of machines.
    """

    machine: str
    command: str
    num_machines: int = 1
    name: str | None = None
    folder: str = "remax-lightning"
    studio: str | None = None
    teamspace: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    interruptible: bool = False
    max_run_attempts: int | None = None

    def __post_init__(self) -> None:
        if self.num_machines < 1:
            raise ValueError(f"num_machines must be at least 1, got {self.num_machines}")
        given = re.findall(r"--trainer\.num_nodes[ =]+(\S+)", self.command)
        if (given or ["1"])[-1] != str(self.num_machines):
            raise ValueError(
                f"with num_machines={self.num_machines} the command must say --trainer.num_nodes {self.num_machines}, "
                f"got {given[-1] if given else 'none'}; write it into the command, after fit"
            )

    def arguments(self, now: datetime) -> dict[str, Any]:
        """Arguments of lightning_sdk.Job.run, the machine by its name; what is left to Lightning is not among them.

        Args:
            now: When the job is submitted, for its name.
        """
        optional = {
            "studio": self.studio,
            "teamspace": self.teamspace,
            "interruptible": self.interruptible or None,
            "max_run_attempts": self.max_run_attempts,
        }
        return {
            "name": self.name or default_name(self.command, now),
            "machine": self.machine,
            "num_machines": self.num_machines,
            "command": f"cd {shlex.quote(self.folder)} && {self.command}",
            "env": {"PYTHONUNBUFFERED": "1", **self.env},  # lines of the log appear when they are printed
            **{name: value for name, value in optional.items() if value is not None},
        }


def default_name(command: str, now: datetime) -> str:
    """The first configuration's file name and the time, in letters, digits and hyphens.

    >>> default_name("python cli.py fit --config configs/paper/llama2_7b_remax.yaml", datetime(2026, 1, 31, 9, 5, 7))
    'llama2-7b-remax-0131-090507'
    """
    config = re.search(r"--config[ =]+\S*?([^/\s]+)\.ya?ml", command)
    stem = config.group(1) if config else "remax-lightning"
    return f"{re.sub(r'[^a-z0-9]+', '-', stem.lower()).strip('-')}-{now:%m%d-%H%M%S}"


def call(arguments: dict[str, Any]) -> str:
    """The call of the SDK as Python that can be run."""
    values = {name: f"Machine.{value}" if name == "machine" else repr(value) for name, value in arguments.items()}
    lines = "".join(f"    {name}={value},\n" for name, value in values.items())
    return f"from lightning_sdk import Job, Machine\n\nJob.run(\n{lines})"


def load_sdk() -> Any:
    """The SDK; None if it is not installed."""
    os.environ.setdefault("LIGHTNING_DISABLE_VERSION_CHECK", "1")  # the import would ask the package index
    try:
        import lightning_sdk
    except ModuleNotFoundError as error:
        if error.name != "lightning_sdk":
            raise
        return None
    return lightning_sdk


def find_machine(sdk: Any, name: str) -> Any:
    """The machine of a name; the SDK itself takes any name and fails after the job was submitted.

    Raises:
        ValueError: If the SDK has none of that name.
    """
    machines = {key: value for key, value in vars(sdk.Machine).items() if isinstance(value, sdk.Machine)}
    if name not in machines:
        raise ValueError(f"machine must be one of {', '.join(machines)}; got {name}")
    return machines[name]


def submit(request: Request, dry_run: bool, now: datetime) -> None:
    """Submit a job, or print what would be submitted.

    Args:
        request: The job.
        dry_run: Print the job and the call of the SDK; nothing is sent.
        now: When the job is submitted.

    Raises:
        ValueError: If there is no such machine.
        ModuleNotFoundError: If the SDK is not installed, in other than a dry run.
    """
    sdk = load_sdk()
    if sdk is None and not dry_run:
        raise ModuleNotFoundError(SDK_MISSING)
    arguments = request.arguments(now)
    machine = None if sdk is None else find_machine(sdk, request.machine)
    if dry_run:
        print(call(arguments))
        if sdk is None:
            print(f"the name of the machine is not checked: {SDK_MISSING}", file=sys.stderr)
        return
    job = sdk.Job.run(**{**arguments, "machine": machine})
    print(f"submitted {job.name}: {job.link}")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: The command line; the default is the process's own.
    """
    parser = ArgumentParser(description="Submit a command as a job on Lightning's machines.")
    parser.add_class_arguments(Request, as_group=False)
    parser.add_argument("--dry_run", action="store_true", help="Print the job and the call of the SDK; send nothing.")
    values = dict(parser.parse_args(args).as_dict())
    dry_run = values.pop("dry_run")
    try:
        submit(Request(**values), dry_run, datetime.now())
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
