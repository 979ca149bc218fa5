"""Before the first step: do all ranks run the same code with the same configuration on the same rows?"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

T = TypeVar("T")
OWN = {"config", "trainer.default_root_dir", "checkpoint.dirpath"}
OWN |= {f"data.init_args.{split}" for split in ("train", "validation", "test", "predict")}
"""Settings that may differ: where a machine has its files. Rows are compared by what they say."""
ROWS, CODE = "the rows of the data", "the code of remax_lightning"
LIBRARIES = ("torch", "transformers", "lightning")


class Rows(Protocol):
    """What is asked of a data module."""

    @property
    def digest(self) -> str:
        """A digest of its rows."""


class RankAgreement(Callback):
    """Refuses a run whose ranks have different rows, settings or code, before they wait for each other in vain.

    A machine with an old copy of a file would take part until the ranks come to a different number of steps, and then
    all of them would hang; or it would train another loss without a word.

    Args:
        configuration: Settings by full names, as values that are text, numbers or lists of them.
        rows: The data module, whose rows are compared; None compares none.
    """

    def __init__(self, configuration: Mapping[str, Any], rows: Rows | None = None) -> None:
        self.configuration = {name: str(value) for name, value in configuration.items() if name not in OWN}
        self.rows = rows

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare all ranks; collective.

        Raises:
            ValueError: If they differ, on all of them; it says in what and which ranks.
        """
        facts = {**self.configuration, CODE: code_digest()}
        facts |= {f"the version of {name}": version(name) for name in LIBRARIES}
        if self.rows is not None:
            facts[ROWS] = self.rows.digest
        check_agreement(facts)


def check_agreement(facts: Mapping[str, str]) -> None:
    """Refuse on all ranks that they differ in something; collective.

    Args:
        facts: What has to be the same, by its name.

    Raises:
        ValueError: If something differs.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    digest = hashlib.sha256(json.dumps(sorted(facts.items())).encode()).hexdigest()
    if len(set(_gathered(digest))) == 1:  # nearly always, and then little is sent
        return
    raise ValueError(f"{disagreement(_gathered(dict(facts)))}; give all ranks the same files and settings")


def disagreement(facts: Sequence[Mapping[str, str]]) -> str:
    """What differs, and on which ranks; at most three names.

    Args:
        facts: Those of each rank.
    """
    names = sorted(set().union(*facts), key=lambda name: (name not in (CODE, ROWS), name))
    different = [name for name in names if len({each.get(name) for each in facts}) > 1]
    more = f" and {len(different) - 3} more" if len(different) > 3 else ""
    return f"the ranks differ in {'; '.join(_difference(name, facts) for name in different[:3])}{more}"


def _difference(name: str, facts: Sequence[Mapping[str, str]]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, each in enumerate(facts):
        ranks.setdefault(each.get(name, "absent"), []).append(rank)
    values = (f"{value[:60]} on {_named(those)}" for value, those in ranks.items())
    return f"{name} ({', '.join(values)})"


def _named(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"


def _gathered(value: T) -> list[T]:
    """A value of each rank; collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@cache
def code_digest() -> str:
    """A digest of all source files of this package."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
