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
