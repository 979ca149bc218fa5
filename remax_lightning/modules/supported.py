"""Which of the trainer's settings manual optimization is right with."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy


def check_trainer(trainer: Trainer, *, is_sharded: bool) -> None:
    """Refuse a precision or a strategy that training is wrong with.

    Args:
        trainer: The trainer.
        is_sharded: Whether its strategy splits models over processes as this project does.

    Raises:
        ValueError: If one of them is.
    """
    strategy, precision = trainer.strategy, trainer.precision
    if precision == "16-mixed":
        raise ValueError("precision 16-mixed scales the loss, which this loop does not undo; use bf16-mixed")
    if not is_sharded and not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise unsupported_strategy(type(strategy).__name__)
    if is_sharded and precision != "32-true":
        raise ValueError(
            f"under fsdp2 trainer.precision must be 32-true, the type of what is kept, got {precision}; the type "
            "of the computation is trainer.strategy.compute_dtype"
        )


def unsupported_strategy(name: str) -> ValueError:
    """The refusal of a strategy that manual optimization is wrong or fails with."""
    return ValueError(
        f"trainer.strategy must be auto, ddp or fsdp2, got {name}; to split a model over several devices use fsdp2 "
        "(FSDP1 and DeepSpeed do not work with manual optimization)"
    )
