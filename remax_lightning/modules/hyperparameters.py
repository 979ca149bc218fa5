"""A module's arguments as plain values, for loggers and checkpoints, and back.

A checkpoint may come from a stranger, so nothing that its hyper-parameters name is imported but classes of this
package; what cannot be restored from plain values has to be passed again.
"""

import functools
import importlib
import inspect
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import FrameType
from typing import Any

from lightning.pytorch.core.mixins import HyperparametersMixin
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import nn


def constructor_arguments(frame: FrameType | None) -> dict[str, Any]:
    """Arguments of the outermost constructor that led to a frame.

    Args:
        frame: Frame inside of ``__init__`` of a module or of one of its bases.
    """
    assert frame is not None
    return collect_init_args(frame, [], classes=(HyperparametersMixin,))[-1]


def as_plain(value: Any) -> Any:
    """A value as numbers, text, lists and dicts: dataclasses by their fields, other objects by their names."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [as_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(name): as_plain(each) for name, each in value.items()}
    if isinstance(value, functools.partial):
        return {"class_path": _path(value.func), "init_args": as_plain(value.keywords)}
    if inspect.isroutine(value):
        return _path(value)
    if not is_dataclass(value):
        return {"class_path": _path(type(value))}
    values = {each.name: as_plain(getattr(value, each.name)) for each in fields(value) if each.init}
    # a class with a base stands in a slot that takes several classes
    return values if type(value).__base__ is object else {"class_path": _path(type(value)), "init_args": values}


def restored(cls: type[nn.Module], values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a constructor from their plain values.

    The optimizer is left at its default: a resumed run names it again.

    Args:
        cls: The module's class.
        values: From :func:`as_plain`.
        given: Arguments that replace them.

    Raises:
        ValueError: If one cannot be restored and is not given.
    """
    hints = typing.get_type_hints(cls.__init__)
    arguments = {}
    for name in (values.keys() & hints.keys()) - given.keys() - {"optimizer"}:
        try:
            arguments[name] = _restored(hints[name], values[name])
        except (TypeError, ValueError, ImportError, AttributeError) as error:
            raise ValueError(
                f"{name} was {values[name]!r}, which a checkpoint does not restore ({error}); pass {name}=... to "
                f"{cls.__name__}.load_from_checkpoint"
            ) from error
    return {**arguments, **given}


def _restored(hint: Any, value: Any) -> Any:
    """A plain value as one of the types of a hint."""
    options = (hint, *typing.get_args(hint))
    if isinstance(value, str) and not any(each is str or typing.get_origin(each) is typing.Literal for each in options):
        raise ValueError("it was an object")
    if not isinstance(value, dict):
        return value
    if "class_path" not in value:
        (dataclass,) = (each for each in options if inspect.isclass(each) and is_dataclass(each))
        return dataclass(**value)
    module, _, name = value["class_path"].rpartition(".")
    if module.partition(".")[0] != "remax_lightning":
        raise ValueError("it is no class of this package")
    cls = getattr(importlib.import_module(module), name)
    if not inspect.isclass(cls) or not issubclass(cls, tuple(each for each in options if inspect.isclass(each))):
        raise ValueError(f"{name} does not fit")
    return cls(**value.get("init_args", {}))


def _path(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
