"""Conversion of an optimizer's state: keyed by parameter name, as for sharded models, or by index, as torch has it."""

from typing import Any


def keyed_by_index(state: dict[str, Any]) -> dict[str, Any]:
    """Convert from names to indices: parameters are numbered through all groups.

    Args:
        state: ``state`` by name, and ``param_groups`` whose ``params`` are names.
    """
    indices = {name: index for index, name in enumerate(_names(state["param_groups"]))}
    groups = [{**group, "params": [indices[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {indices[name]: value for name, value in state.get("state", {}).items()}, "param_groups": groups}


def keyed_by_name(state: dict[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """Convert from indices to names.

    Args:
        state: ``state`` by index, and ``param_groups`` whose ``params`` are indices.
        names: Names of the parameters of each group.

    Raises:
        ValueError: If the groups do not have as many parameters.
    """
    saved, sizes = [len(group["params"]) for group in state["param_groups"]], [len(group) for group in names]
    if saved != sizes:
        raise ValueError(
            f"the optimizer's groups have {sizes} parameters, but those in the checkpoint {saved}: it is the state of "
            "another model; restore the model that the checkpoint was saved with"
        )
    groups = [{**group, "params": list(each)} for group, each in zip(state["param_groups"], names, strict=True)]
    by_index = dict(zip(_names(state["param_groups"]), _names(groups), strict=True))
    return {"state": {by_index[index]: value for index, value in state["state"].items()}, "param_groups": groups}


def _names(groups: list[dict[str, Any]]) -> list[Any]:
    return [name for group in groups for name in group["params"]]
