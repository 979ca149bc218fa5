"""What code from outside may set for the whole process, and must not keep."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def preserved_process_state() -> Iterator[None]:
    """After the context the working directory and torch's gradient mode, default type and device are as before it."""
    folder, dtype, device = working_directory(), torch.get_default_dtype(), torch.get_default_device()
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            if torch.get_default_device() != device:
                torch.set_default_device(None if device.type == "cpu" else device)
            if folder is not None:
                os.chdir(folder)


def working_directory() -> str | None:
    """The working directory; None if it was deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None
