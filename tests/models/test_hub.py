"""Names that lead nowhere fail at once, with what to do; nothing here needs a network."""

import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from huggingface_hub import constants

from remax_lightning.models import hub
from remax_lightning.models.hub import check_reachable
from remax_lightning.models.language_model import load_language_model
from remax_lightning.models.source import ModelSource
from remax_lightning.models.tokenizer import load_tokenizer


class Answers(BaseHTTPRequestHandler):
    """A hub that has ``owner/model`` and nothing else, and is overloaded when asked for ``owner/busy``."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        if self.path.startswith(("/api/models", "/api/datasets")):
            self.asked.append(self.path)
        status = 200 if "owner/model" in self.path else 503 if "busy" in self.path else 404
        body = b'{"id": "owner/model", "sha": "0", "tags": [], "siblings": []}' if status == 200 else b"{}"
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A reachable hub; what it was asked."""
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    Answers.asked = []
    hub._ask_hub.cache_clear()
    yield Answers.asked
    server.shutdown()
    server.server_close()
    hub._ask_hub.cache_clear()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """A hub that nobody answers at and an empty cache; for how long was waited."""
    seconds: list[float] = []
    monkeypatch.setattr(hub.time, "sleep", seconds.append)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    hub._ask_hub.cache_clear()
    return seconds


def test_a_name_that_is_not_on_the_hub(online: list[str]) -> None:
    for name, kind in (("nope/model", "model"), ("nope", "tokenizer"), ("nope/rows", "dataset")):
        with pytest.raises(FileNotFoundError, match=f"^{name} is no existing folder, and .* has no {kind} "):
            check_reachable(name, kind)  # type: ignore[arg-type]
    assert ["datasets" in path for path in online] == [False, False, True]
    with pytest.raises(FileNotFoundError, match="correct the name"):
        check_reachable("no spaces allowed")


def test_a_name_that_is_on_the_hub_is_asked_for_once(online: list[str], tmp_path: Path) -> None:
    check_reachable("owner/model")
    check_reachable("owner/model", "tokenizer")
    check_reachable(str(tmp_path))
    assert len(online) == 1


def test_an_overloaded_hub_is_left_to_the_retries_of_the_download(online: list[str]) -> None:
    check_reachable("owner/busy")
    assert online


def test_without_a_network(slept: list[float]) -> None:
    message = r"^nope/model is neither an existing folder nor in the cache .* cannot be reached .*; give the folder of"
    with pytest.raises(FileNotFoundError, match=message):
        check_reachable("nope/model")
    assert sum(slept) <= 1


@pytest.mark.parametrize(
    ("kind", "folder"),
    [
        ("model", "hub/models--owner--name/snapshots"),
        ("tokenizer", "hub/models--owner--name/snapshots"),
        ("dataset", "hub/datasets--owner--name/snapshots"),
        ("dataset", "datasets/owner___name"),
    ],
)
def test_a_cached_copy_is_enough(kind: hub.Kind, folder: str, slept: list[float], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_reachable("owner/name", kind)
    (tmp_path / folder).mkdir(parents=True)
    with pytest.warns(UserWarning, match="owner/name is read from the cache. Set HF_HUB_OFFLINE=1"):
        check_reachable("owner/name", kind)


def test_in_offline_mode_nobody_is_asked(slept: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="is switched off by HF_HUB_OFFLINE"):
        check_reachable("owner/name")
    (tmp_path / "hub/models--owner--name/snapshots").mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_reachable("owner/name")
    assert slept == []


def test_whatever_is_loaded_by_name_is_checked(slept: list[float], tmp_path: Path) -> None:
    source = ModelSource(path="nope/model")
    for load in (source.load_config, source.load_tokenizer, lambda: load_language_model(source)):
        with pytest.raises(FileNotFoundError, match=r"^nope/model is neither"):
            load()
    with pytest.raises(FileNotFoundError, match="folder of a tokenizer"):
        load_tokenizer("nope/model")
