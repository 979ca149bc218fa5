"""Argument checks that several functions share."""

from torch import Tensor


def require_shape(shape: tuple[int, ...], meaning: str, **tensors: Tensor | None) -> None:
    """Refuse tensors that would broadcast silently; None stands for an optional tensor that was not given.

    Args:
        shape: Shape that every tensor must have.
        meaning: What the shape stands for, for the message, such as "one value per response, (B,)".
        tensors: The tensors by argument name.

    Raises:
        ValueError: If a tensor has another shape.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} must hold {meaning}, here {tuple(shape)}, got {tuple(tensor.shape)}; "
                "slice or reshape it to match before the call."
            )


def require_kl_coef(kl_coef: float) -> None:
    """Refuse a negative weight of a KL penalty.

    Raises:
        ValueError: If it is below 0 or NaN.
    """
    if not kl_coef >= 0:
        raise ValueError(
            f"kl_coef is the weight of a penalty and must be at least 0, got {kl_coef}; use 0 for no penalty."
        )


def require_gamma(gamma: float) -> None:
    """Refuse a discount that is none.

    Raises:
        ValueError: If it is not in (0, 1].
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma is a discount per token and must be in (0, 1], got {gamma}; use 1.0 for no discount.")


def require_clip_range(clip_range: float, meaning: str) -> None:
    """Refuse a clip that lets nothing through.

    Args:
        clip_range: The bound.
        meaning: What it bounds, for the message, such as "|ratio - 1|".

    Raises:
        ValueError: If it is not above 0.
    """
    if not clip_range > 0:
        raise ValueError(f"clip_range bounds {meaning} and must be above 0, got {clip_range}.")
