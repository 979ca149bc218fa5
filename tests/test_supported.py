"""Strategies and precisions: accepted under each of their names, or refused with what to use."""

import pytest
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from remax_lightning.strategies import FSDP2Strategy
from remax_lightning.supported import check_supported


class OwnDDP(DDPStrategy):
    """A user's own."""


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("auto", "auto"),
        (SingleDeviceStrategy("cpu"), "auto"),
        ("ddp", "ddp"),
        ("ddp_find_unused_parameters_true", "ddp"),
        (DDPStrategy(), "ddp"),
        (OwnDDP, "ddp"),
        ("fsdp2", "fsdp2"),
        ("FSDP2Strategy", "fsdp2"),
        (FSDP2Strategy(), "fsdp2"),
    ],
)
def test_strategies(strategy: object, kind: str) -> None:
    assert check_supported(strategy, None) == (kind, "32-true")


@pytest.mark.parametrize(
    "strategy", ["fsdp", "deepspeed", "ddpp", DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy]
)
def test_other_strategies(strategy: object) -> None:
    name = strategy if isinstance(strategy, str) else strategy.__name__  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=f"trainer.strategy must be auto, ddp or fsdp2, got {name}; to shard"):
        check_supported(strategy, "32-true")


@pytest.mark.parametrize(
    ("precision", "name"),
    [(None, "32-true"), (32, "32-true"), ("32", "32-true"), ("bf16", "bf16-mixed"), ("bf16-mixed", "bf16-mixed")],
)
def test_precisions(precision: object, name: str) -> None:
    assert check_supported("auto", precision) == ("auto", name)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", 16, "16-mixed", 64, "64-true", "transformer-engine"])
def test_other_precisions(precision: object) -> None:
    with pytest.raises(ValueError, match=r"trainer.precision .*; use bf16-mixed, or 32-true on a CPU"):
        check_supported("auto", precision)


def test_that_lightning_computes_otherwise_on_a_cpu_is_said() -> None:
    with pytest.raises(ValueError, match="on a CPU Lightning computes in bfloat16 instead"):
        check_supported("auto", "16-mixed")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16"])
def test_fsdp2_has_a_type_of_its_own(precision: str) -> None:
    with pytest.raises(
        ValueError, match=r"must be 32-true, .*; the type of the computation is trainer.strategy.compute"
    ):
        check_supported("fsdp2", precision)
