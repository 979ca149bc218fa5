"""Which strategies and precisions a run may have: the one table, read by the command line, the modules and plan."""

STRATEGIES: dict[str, str | None] = {  # names of Lightning's trainer, and the layout that they stand for here
    "auto": "auto",
    "single_device": "auto",
    "SingleDeviceStrategy": "auto",
    "ddp": "ddp",
    "DDPStrategy": "ddp",
    "fsdp2": "fsdp2",
    "FSDP2Strategy": "fsdp2",
    "DeepSpeedStrategy": None,  # a subclass of DDPStrategy
}
PRECISIONS = ("32-true", "bf16-mixed")
ALIASES = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}  # Lightning's
REFUSED = {
    "16-mixed": "scales the loss, which this loop does not undo (and on a CPU Lightning computes in bfloat16 instead)",
    "16-true": "trains weights in float16, which overflow to NaN",
    "bf16-true": "stores Adam's moments and the weights in bfloat16, in which steps of an RLHF learning rate (1e-6) "
    "are rounded away",
    "64-true": "mixes with the float32 of sampling and rewards and fails",
    "transformer-engine": "replaces layers that are loaded and exported here",
    "transformer-engine-float16": "replaces layers that are loaded and exported here",
}


def check_supported(strategy: object, precision: object) -> tuple[str, str]:
    """Refuse a strategy or a precision that training is wrong or fails with.

    Args:
        strategy: A name, or a strategy of Lightning's or its class.
        precision: The trainer's precision, as it is given.

    Returns:
        The strategy as ``auto``, ``ddp`` or ``fsdp2`` and the precision as ``32-true`` or ``bf16-mixed``.

    Raises:
        ValueError: If one of them is refused.

    Example:
        >>> check_supported("ddp_find_unused_parameters_true", "bf16")
        ('ddp', 'bf16-mixed')
    """
    name = ALIASES.get(str(precision), str(precision))
    if name in REFUSED:
        raise ValueError(f"trainer.precision {name} {REFUSED[name]}; use bf16-mixed, or 32-true on a CPU")
    if name not in PRECISIONS:
        raise ValueError(f"trainer.precision must be {' or '.join(PRECISIONS)}, got {precision}")
    kind = _kind(strategy)
    if kind == "fsdp2" and name != "32-true":
        raise ValueError(
            f"under fsdp2 trainer.precision must be 32-true, the type of trained weights, got {precision}; the "
            "type of the computation is trainer.strategy.compute_dtype"
        )
    return kind, name


def _kind(strategy: object) -> str:
    if isinstance(strategy, str):
        names = ["ddp" if strategy.startswith("ddp_") else strategy]
    else:
        names = [each.__name__ for each in (strategy if isinstance(strategy, type) else type(strategy)).__mro__]
    kind = next((STRATEGIES[name] for name in names if name in STRATEGIES), None)
    if kind is None:
        raise ValueError(
            f"trainer.strategy must be auto, ddp or fsdp2, got {names[0]}; to shard a model over several devices use "
            "fsdp2 (FSDP1 and DeepSpeed do not work with manual optimization)"
        )
    return kind
