"""The state of an optimizer with its parameters by name, as sharded models have it, and by number, as torch has it."""

from typing import Any


def keyed_by_index(state: dict[str, Any]) -> dict[str, Any]:
    """A state by names as one by numbers: the parameters of all groups are counted through.

    Args:
        state: ``state`` by name, and ``param_groups`` whose ``params`` are names.
    """
    groups: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    for group in state["param_groups"]:
        first = len(numbers)
        numbers.update({name: first + place for place, name in enumerate(group["params"])})
        groups.append({**group, "params": [numbers[name] for name in group["params"]]})
    return {"state": {numbers[name]: value for name, value in state.get("state", {}).items()}, "param_groups": groups}


def keyed_by_name(state: dict[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """A state by numbers as one by names.

    Args:
        state: ``state`` by number, and ``param_groups`` whose ``params`` are numbers.
        names: Names of the parameters of each group.

    Raises:
        ValueError: If the groups do not have as many parameters.
    """
    saved = [group["params"] for group in state["param_groups"]]
    if [len(group) for group in saved] != [len(group) for group in names]:
        raise ValueError(
            f"the optimizer's groups have {[len(group) for group in names]} parameters, but the saved ones "
            f"{[len(group) for group in saved]}: it is the state of another model"
        )
    by_number = {
        number: name
        for numbers, group in zip(saved, names, strict=True)
        for number, name in zip(numbers, group, strict=True)
    }
    groups = [
        {**group, "params": list(group_names)} for group, group_names in zip(state["param_groups"], names, strict=True)
    ]
    return {"state": {by_number[number]: value for number, value in state["state"].items()}, "param_groups": groups}
