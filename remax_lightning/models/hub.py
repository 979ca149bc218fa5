"""Names of models, tokenizers and data sets: an existing folder, or a repository of the Hugging Face hub."""

import os
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

Kind = Literal["model", "tokenizer", "dataset"]
TIMEOUT = 5.0
"""Seconds to wait for the hub's answer; transformers waits 10 and asks six times for each file."""


def looks_like_folder(path: str) -> bool:
    """Whether a name can only be a local path, not a hub name."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path


def check_reachable(name: str, kind: Kind = "model") -> None:
    """Refuse a name that can be neither read from a folder or the cache nor downloaded, within seconds.

    transformers and datasets retry for half a minute, per file, before they report a misspelt name or a missing
    network. Nothing is downloaded here, and the hub is asked once for each name.

    Args:
        name: Path of a folder, or hub name ``owner/name``.
        kind: What is expected there, for the message and the place on the hub.

    Raises:
        FileNotFoundError: If ``name`` can only be a local path and does not exist; or if it is neither a folder nor in
            the cache, and the hub has no such repository or cannot be reached.

    Example:
        >>> check_reachable("./no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: ./no/such/folder does not exist; give an existing folder, or the name of a model on the hub
    """
    if Path(name).expanduser().exists():
        return
    if looks_like_folder(name):
        raise FileNotFoundError(f"{name} does not exist; give an existing folder, or the name of a {kind} on the hub")
    try:
        _ask_hub(name, "dataset" if kind == "dataset" else "model")
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{name} is no existing folder, and {constants.ENDPOINT} has no {kind} of that name, or none that you may "
            "read; correct the name, or set HF_TOKEN for a private repository"
        ) from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        reason = "is switched off by HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else f"cannot be reached ({error})"
        if not _is_cached(name, kind):
            raise FileNotFoundError(
                f"{name} is neither an existing folder nor in the cache of the Hugging Face hub, and "
                f"{constants.ENDPOINT} {reason}; give the folder of a {kind}, or download {name} where there is a "
                "network"
            ) from error
        if not constants.HF_HUB_OFFLINE:
            warnings.warn(
                f"{constants.ENDPOINT} {reason}; {name} is read from the cache. Set HF_HUB_OFFLINE=1 to spare half a "
                "minute of retries for each of its files",
                stacklevel=2,
            )


@cache
def _ask_hub(name: str, repo_type: str) -> None:
    """Return if the hub has a repository, or answers with an error that says nothing about it.

    Tried twice, since a node that has just started may not resolve names yet.
    """
    for is_last in (False, True):
        try:
            HfApi().repo_info(name, repo_type=repo_type, timeout=TIMEOUT)
        except GatedRepoError:
            return  # transformers says where to ask for access
        except RepositoryNotFoundError:
            raise
        except HfHubHTTPError:
            return  # overloaded, say: the retries of the download are right
        except HTTPError:
            if is_last:
                raise
            time.sleep(1)
        else:
            return


def _is_cached(name: str, kind: Kind) -> bool:
    """Whether an earlier run has left a copy on this machine, of whatever revision."""
    repo_type = "dataset" if kind == "dataset" else "model"
    folders = [Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=repo_type), "snapshots")]
    if kind == "dataset":  # the tables that datasets has made of a repository are kept apart from its files
        tables = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")
        folders.append(Path(tables, name.replace("/", "___")))
    return any(folder.is_dir() for folder in folders)
