"""Fixtures that several files share.

The models are saved once for the whole run: a test that writes into such a folder saves its own with ``tiny``.
"""

import os
import sys

os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # datasets tells the hub of each local file that it reads, and waits

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from jitter import Jitter

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "REMAX_LIGHTNING_LAUNCHER")
"""Environment variables of one of several processes, which a run inside of a test leaves behind."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=2, help="random kills of each case of tests/chaos")
    parser.addoption("--jitter", action="store_true", help="last bits of matrix products depend on row and shape")


@pytest.fixture(scope="session", autouse=True)
def jittered(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that lean on bits that another machine would not give fail with ``--jitter``."""
    with Jitter() if request.config.getoption("jitter") else nullcontext():
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts with the same random state, whatever ran before; ``seed_everything`` leaves its seed behind."""
    torch.manual_seed(0)
    for name in ("PL_GLOBAL_SEED", *RANKS):
        os.environ.pop(name, None)
    sys.modules.pop("my_rewards", None)  # the documents' name for a module of the reader's own


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random policy."""
    return tiny.save_model(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a policy with other weights."""
    return tiny.save_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as a JSON-lines file into the test's folder, and returns its path."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        return tiny.write_rows(tmp_path / name, rows)

    return write
