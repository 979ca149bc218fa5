"""What a figure was measured on."""

import datetime
import importlib.metadata
import os
import platform
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Date, processor, threads, load and versions."""
    packages = ("torch", "lightning", "transformers", "datasets", "jsonargparse")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": f"{os.cpu_count()} x {platform.machine()}",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
    }
