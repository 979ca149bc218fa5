"""Folders that hold adapters alone and name the model that they belong to, in the format of peft."""

from pathlib import Path

from remax_lightning.models.hub import looks_like_folder
from remax_lightning.models.model_folder import read_json

CONFIG = "adapter_config.json"


def adapter_base(path: str) -> str | None:
    """Folder or hub name of the model that an adapter folder belongs to; None if ``path`` is no adapter folder.

    Raises:
        FileNotFoundError: If that model can only be a folder and is not there.
        ValueError: If the adapter folder names none or another adapter folder, or its file cannot be read.
    """
    file = Path(path).expanduser() / CONFIG
    if not file.exists():
        return None
    base = read_json(file).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(f"{file} names no base model; set base_model_name_or_path to the one that it was trained on")
    if looks_like_folder(base) and not Path(base).expanduser().exists():
        raise FileNotFoundError(
            f"{base} does not exist; {file} names it as its base model: correct base_model_name_or_path there"
        )
    if (Path(base).expanduser() / CONFIG).exists():
        raise ValueError(f"{file} names {base} as its base model, which is an adapter folder too; merge that one first")
    return absolute(base)


def tokenizer_folder(path: str) -> str:
    """The folder with a model's tokenizer: the model's, or that of the base if an adapter folder has none."""
    if (Path(path).expanduser() / "tokenizer_config.json").exists():
        return path
    return adapter_base(path) or path


def absolute(path: str) -> str:
    """The absolute path of a folder; a hub name unchanged."""
    folder = Path(path).expanduser()
    return str(folder.absolute()) if path and folder.exists() else path
