"""Fixtures that several files share.

The models are saved once for the whole run: a test that writes into such a folder saves its own with ``tiny``.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts with the same random state, whatever ran before; ``seed_everything`` leaves its seed behind."""
    torch.manual_seed(0)
    os.environ.pop("PL_GLOBAL_SEED", None)


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
