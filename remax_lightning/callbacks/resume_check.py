"""Settings that have changed since a checkpoint was saved: refused or warned of."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from remax_lightning.modules.fingerprint import misfit

OPTIMIZER = ".optimizer."


def check_configuration(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Warn of each value that was different when the checkpoint was saved.

    Args:
        old: The configuration in the checkpoint, by full names.
        new: That of this run, by full names.

    Raises:
        UnusableCheckpoint: If the class of the optimizer differs, since its saved state would be meaningless.
    """
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    for name in changed:
        values = f"{name}: {old.get(name)} -> {new.get(name)}"
        if name.endswith(f"{OPTIMIZER}class_path"):
            raise misfit(name, old.get(name), new.get(name))
        if OPTIMIZER in name:
            rank_zero_warn(f"changed since the checkpoint, but the optimizer keeps its saved values: {values}")
        else:
            rank_zero_warn(f"changed since the checkpoint: {values}")


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as a flat one: names with dots, plain values."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values
