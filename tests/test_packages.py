"""Every package that is imported is declared."""

import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(folder: Path) -> set[str]:
    """Packages that the files of a folder import, at the top of a file or within a function."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"remax_lightning"}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: str) -> set[str]:
    """Names of the packages in a list of setup.cfg's, comments apart."""
    lines = [line.strip() for line in requirements.splitlines()]
    return {normalized(re.split(r"[\[<>=!~ ;]", line)[0]) for line in lines if line and not line.startswith("#")}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def undeclared(folder: str, requirements: str) -> set[str]:
    distributions = packages_distributions()
    names = declared(requirements)
    return {
        name
        for name in imported(ROOT / folder)
        if name in distributions and not names & {normalized(each) for each in distributions[name]}
    }


def test_the_package_imports_what_it_requires(setup: configparser.ConfigParser) -> None:
    assert undeclared("remax_lightning", setup["options"]["install_requires"]) == set()


def test_an_import_that_is_not_declared_would_be_noticed() -> None:
    assert "yaml" in undeclared("remax_lightning", "torch\n")


def test_private_names_of_other_packages_have_an_upper_bound(setup: configparser.ConfigParser) -> None:
    lines = setup["options"]["install_requires"].splitlines()
    for name in ("torch", "lightning", "jsonargparse", "transformers", "peft"):
        (line,) = (line for line in lines if re.match(rf"{name}(\[\w+\])?[<>]", line))
        assert "<" in line
