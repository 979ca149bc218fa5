"""Who may import whom; see the arrows in the design: cli -> callbacks, modules, data -> rollout, rewards -> models."""

import ast
import sys
from pathlib import Path

import pytest

import remax_lightning

PACKAGE = Path(remax_lightning.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LOWER = {"functional", "models", "rollout", "rewards"}
# the packages of remax_lightning that each of them may import, itself apart
ALLOWED = {
    "functional": set(),
    "models": {"functional"},
    "rollout": {"models", "functional"},
    "rewards": {"models", "functional"},
    "data": LOWER,
    "modules": LOWER,
    "strategies": {"callbacks", "models", "modules"},
    "evaluation": LOWER,
    "callbacks": LOWER | {"modules"},
    "plan": {"models", "functional", "rollout"},
}
LIGHTNING = {"modules", "callbacks", "data", "strategies", "cli"}


def imports(path: Path) -> set[str]:
    """Full names of all modules and objects that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(path: Path) -> str:
    """The package of remax_lightning that a file belongs to, or its name at the top."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def parts_imported(path: Path) -> set[str]:
    """Packages of remax_lightning that a file imports."""
    own = [name.split(".") for name in imports(path) if name.split(".")[0] == "remax_lightning"]
    assert all(len(names) > 1 for names in own)
    return {names[1] for names in own}


def libraries(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)} - {"remax_lightning"}


def label(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_the_walk_finds_imports() -> None:
    assert {part(path) for path in FILES} >= {*ALLOWED, "cli"}
    assert parts_imported(PACKAGE / "modules" / "policy_gradient.py") >= LOWER | {"modules"}
    assert {"torch", "transformers", "lightning"} <= libraries(PACKAGE / "modules" / "base.py")


@pytest.mark.parametrize("path", FILES, ids=label)
def test_arrows(path: Path) -> None:
    if part(path) not in ("cli", "__init__"):
        assert part(path) in ALLOWED, f"{part(path)} is new: say what it may import"
        assert parts_imported(path) <= ALLOWED[part(path)] | {part(path)}


def test_functional_imports_torch_and_the_standard_library() -> None:
    for path in FILES:
        if part(path) == "functional":
            assert libraries(path) <= {"torch", *sys.stdlib_module_names}, path


@pytest.mark.parametrize("path", FILES, ids=label)
def test_who_knows_lightning(path: Path) -> None:
    known = libraries(path) & {"lightning", "pytorch_lightning", "lightning_utilities"}
    assert known <= ({"lightning"} if part(path) in LIGHTNING else set())


@pytest.mark.parametrize("path", FILES, ids=label)
def test_only_the_command_line_parses_arguments(path: Path) -> None:
    if part(path) != "cli":
        assert not libraries(path) & {"jsonargparse", "argparse", "click", "fire"}
        from_cli = {name for name in imports(path) if name.startswith("lightning.pytorch.cli")}
        allowed = {"lightning.pytorch.cli.OptimizerCallable", "lightning.pytorch.cli.LRSchedulerCallable"}
        assert from_cli <= (allowed if part(path) == "modules" else set())


def test_siblings_do_not_import_each_other() -> None:
    siblings = {"remax", "reinforce", "rloo", "ppo", "sft", "reward_model"}
    for path in FILES:
        if part(path) == "modules" and path.stem in siblings:
            others = {f"remax_lightning.modules.{name}" for name in siblings - {path.stem}}
            assert not {
                name for name in imports(path) if name.rpartition(".")[0] in others | {"remax_lightning.modules"}
            }
