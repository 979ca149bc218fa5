"""What a resumed run says of settings that have changed."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny

from remax_lightning.callbacks import Checkpoint


def fit(policy: str, folder: Path, steps: int, ckpt_path: str | None = None, **options: Any) -> list[str]:
    """Train; the warnings that speak of a checkpoint."""
    module = tiny.remax(policy, lr_schedule=options.pop("lr_schedule", "constant"))
    data = tiny.prompt_data(folder, batch_size=2, validation=tiny.write_rows(folder / "v.jsonl", [{"prompt": "a"}]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saver = Checkpoint(dirpath=str(folder / "checkpoints"))
        trainer = tiny.trainer(folder, steps, [saver], enable_checkpointing=True, **options)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return [str(warning.message) for warning in caught if "checkpoint" in str(warning.message).partition(";")[0]]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("precision", "bf16-mixed", "trainer.precision: 32-true -> bf16-mixed; numbers are rounded otherwise"),
        ("limit_train_batches", 1, "trainer.limit_train_batches: 1.0 -> 1; epochs end after another number of rows"),
        ("limit_val_batches", 0, "trainer.limit_val_batches: 1.0 -> 0; scores of earlier checkpoints do not compare"),
        ("strategy", "ddp", "trainer.strategy: SingleDeviceStrategy -> DDPStrategy; numbers are rounded otherwise"),
    ],
)
def test_a_setting_of_the_trainer(name: str, value: object, told: str, policy: str, tmp_path: Path) -> None:
    assert fit(policy, tmp_path, 1) == []
    (message,) = fit(policy, tmp_path, 2, "last", **{name: value})
    assert message.startswith(f"changed since the checkpoint: {told}")
    assert fit(policy, tmp_path, 3, "last", **{name: value}) == []


def test_more_steps(policy: str, tmp_path: Path) -> None:
    """A rate that does not depend on their number needs no word."""
    fit(policy, tmp_path, 1)
    assert fit(policy, tmp_path, 2, "last") == []
    (message,) = fit(policy, tmp_path, 4, "last", lr_schedule="linear")
    assert message.startswith("the learning rate of step 2 is 0.5, where the checkpoint has 1: ")
