"""Settings that have changed since a checkpoint was saved: refused or warned of."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from remax_lightning.models.parallelize import Sharding
from remax_lightning.modules.fingerprint import misfit

OPTIMIZER = ".optimizer."
ROUNDING = "numbers are rounded otherwise from here on, so the weights are not bitwise those of an uninterrupted run"
CONSEQUENCES = {
    "trainer.precision": ROUNDING,
    "trainer.strategy": ROUNDING,
    "trainer.strategy.compute_dtype": ROUNDING,
    "device": ROUNDING,
    "number of ranks": "each takes data.batch_size rows, so a step has more or fewer rows than before",
    "trainer.limit_train_batches": "epochs end after another number of rows than before",
    "trainer.overfit_batches": "epochs end after another number of rows than before",
    "trainer.limit_val_batches": "scores of earlier checkpoints do not compare with those to come",
}
"""What follows from a change of a trainer's setting."""


def check_resumed(checkpoint: dict[str, Any], configuration: dict[str, Any], settings: dict[str, Any]) -> None:
    """Warn of what was different when a checkpoint was saved; of what it does not say, nothing is.

    Args:
        checkpoint: What was read.
        configuration: That of this run, by full names; empty if it was not started by the command line.
        settings: Those of this run's trainer.

    Raises:
        UnusableCheckpoint: If the class of the optimizer differs.
    """
    if configuration and (old := checkpoint.get("configuration")):
        check_configuration(old, configuration)
    check_trainer_settings(checkpoint.get("trainer_settings", {}), settings)


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


def trainer_settings(trainer: Trainer, sharding: Sharding | None) -> dict[str, Any]:
    """What of a trainer the numbers of a run depend on, as plain values.

    The number of steps is not among them: the learning rate's schedule tells what follows from another one.

    Args:
        trainer: The trainer.
        sharding: How the module is sharded; None if it is not.
    """
    values = (
        str(trainer.precision),
        type(trainer.strategy).__name__,
        None if sharding is None else str(sharding.compute_dtype),
        trainer.strategy.root_device.type,
        trainer.world_size,
        str(trainer.limit_train_batches),  # 1 is a batch, and 1.0 all of them
        str(trainer.overfit_batches),  # type: ignore[attr-defined]
        str(trainer.limit_val_batches),
    )
    return dict(zip(CONSEQUENCES, values, strict=True))


def check_trainer_settings(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Warn of each setting of the trainer that was different when the checkpoint was saved, and what follows from it.

    Args:
        old: The settings in the checkpoint; none in one of an earlier version.
        new: Those of this run.
    """
    for name, consequence in CONSEQUENCES.items():
        if name in old and old[name] != new[name]:
            rank_zero_warn(f"changed since the checkpoint: {name}: {old[name]} -> {new[name]}; {consequence}")


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as a flat one: names with dots, plain values."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values
