"""The parser, and what is done before anything is loaded: to the command line, and to what was parsed."""

import argparse
import os
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from remax_lightning.cli_errors import explain, shows_traceback
from remax_lightning.cli_limits import check_yaml, only_python
from remax_lightning.models.visible_text import visible
from remax_lightning.supported import check_supported

reading: ContextVar[str | None] = ContextVar("reading", default=None)
"""The configuration file that is being read, for errors."""

STRATEGY = "--trainer.strategy"
STRATEGY_CLASSES = {"fsdp2": "FSDP2Strategy", "ddp": "DDPStrategy"}
"""Short names of strategies, and the classes that take arguments of their own."""

PYTHON_COMPLETION = """
# python SCRIPT ...: as SCRIPT ..., without the first word; files for any other script
FUNCTION_of_python() {
  if [[ "${COMP_WORDS[1]}" == *SCRIPT && $COMP_CWORD -gt 1 ]]; then
    COMP_WORDS=("${COMP_WORDS[@]:1}")
    COMP_CWORD=$((COMP_CWORD - 1))
    FUNCTION
  else
    COMPREPLY=($(compgen -f -- "${COMP_WORDS[COMP_CWORD]}"))
  fi
}
complete -o bashdefault -F FUNCTION_of_python python python3
"""

SPLITS = {"fit": "train", "validate": "validation", "test": "test", "predict": "predict"}
"""The rows that a sub-command cannot do without."""


class Parser(LightningArgumentParser):
    """A parser whose errors are one sentence, and that takes no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def add_class_arguments(self, class_type: type, *args: Any, **kwargs: Any) -> list[str]:
        """Arguments of a class, without those that only Python code can give."""
        skip = {*(kwargs.pop("skip", None) or ()), *only_python(class_type)}
        added: list[str] = super().add_class_arguments(class_type, *args, skip=skip, **kwargs)
        return added

    def add_function_arguments(self, function: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Arguments of a function that is a sub-command; a ``class_path`` may not name one, since that would call it.

        Raises:
            ImportError: If it does.
        """
        if not self.exit_on_error:  # as the parsers of a class_path are made
            name = f"{function.__module__}.{function.__qualname__}"
            raise ImportError(f"{name} is a function, and a class_path is a class")
        added: list[str] = super().add_function_arguments(function, *args, **kwargs)
        return added

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Parse a file, whose name errors then give."""
        token = reading.set(str(path))
        try:
            return super().parse_path(path, *args, **kwargs)
        finally:
            reading.reset(token)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and leave with exit status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        if shows_traceback():
            raise argparse.ArgumentError(None, message) from ex
        file = "" if reading.get() is None else f"{reading.get()}: "
        told = explain(message, getattr(ex, "subcommand_parser", None) or self)
        sys.stderr.write(visible(f"error: {file}{told}\n"))
        self.exit(2)

    def get_completion_script(self, completion_type: str, **kwargs: Any) -> str:
        """The script that completes options in a shell; that for bash completes ``python cli.py``, too."""
        script = super().get_completion_script(completion_type, **kwargs)
        if completion_type != "shtab-bash" or not self.prog.endswith(".py"):
            return script
        function = "_shtab_" + re.sub(r"\W", "_", self.prog)
        return script + PYTHON_COMPLETION.replace("SCRIPT", self.prog).replace("FUNCTION", function)


def prepare(args: Sequence[str], foreign: set[str]) -> list[str]:
    """A command line that jsonargparse takes as it is meant.

    A file that cannot be read as YAML is refused by its name and line. A run's saved configuration has settings of the
    sub-command that saved it, which are left out for another one. ``--trainer.strategy fsdp2`` stands for its class
    where that has arguments.

    Args:
        args: The sub-command and what follows it.
        foreign: Settings of other sub-commands.

    Raises:
        ValueError: If a file is not YAML, not a mapping or a URL.
        FileNotFoundError: If a file is not there.
    """
    prepared: list[str] = []
    strategy: object = None  # as it was given last
    for option, value in _options(args):
        if option in ("--config", "-c") and value is not None and not any(mark in value for mark in ("\n", "{")):
            config, value = read_config(value, foreign)
            trainer = config.get("trainer")
            strategy = trainer.get("strategy", strategy) if isinstance(trainer, dict) else strategy
        elif option == STRATEGY:
            strategy = value
        elif option.startswith(f"{STRATEGY}.") and isinstance(strategy, str) and strategy in STRATEGY_CLASSES:
            prepared += [STRATEGY, STRATEGY_CLASSES[strategy]]
            strategy = None
        prepared += [option] if value is None else [option, value]
    return prepared


def _options(args: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Arguments with the values of the two options that are looked into."""
    rest = iter(args)
    for each in rest:
        option, is_given, value = each.partition("=")
        if option in ("--config", "-c", STRATEGY):
            yield option, value if is_given else next(rest, None)
        else:
            yield each, None


def read_config(path: str, foreign: set[str]) -> tuple[dict[str, Any], str]:
    """A configuration, and the argument that stands for it: the file's name, or its text without foreign settings."""
    if "://" in path:
        raise ValueError(f"--config {path}: a configuration is a local file, not a URL; download it and read it first")
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--config {path}: there is no such file in {os.getcwd()}")
    text = file.read_text(encoding="utf-8")
    try:
        check_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        config = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{path}{place}: not valid YAML: {error.problem}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a configuration must be a mapping such as model: ..., got {type(config).__name__}")
    if not foreign & set(config):
        return config, path
    # one line each, since they are plain values at the top level; the rest is left as the user wrote it
    lines = [line for line in text.splitlines(keepends=True) if line.partition(":")[0] not in foreign]
    return config, "".join(lines)


def check_trainer(config: Namespace) -> None:
    """Refuse settings of the trainer that this loop does not follow.

    Raises:
        ValueError: If there is one; it says what to set in its place.
    """
    trainer, strategy = config.trainer, config.trainer.strategy
    is_class = isinstance(strategy, Namespace)
    check_supported(pkgutil.resolve_name(strategy.class_path) if is_class else strategy, trainer.precision)
    if trainer.accumulate_grad_batches not in (None, 1):
        raise ValueError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} is not used here: set data.batch_size "
            "to the rows of an optimizer step, on each rank, and model.micro_batch_size to those of one pass"
        )
    max_grad_norm = config.model.get("init_args", Namespace()).get("max_grad_norm")
    if trainer.gradient_clip_val not in (None, max_grad_norm):
        raise ValueError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val} is not used here: set model.max_grad_norm (now "
            f"{max_grad_norm})"
        )
    trainer.gradient_clip_val = trainer.gradient_clip_algorithm = None  # Lightning refuses what is true already


def check_data(config: Namespace, subcommand: str) -> None:
    """Refuse a run without rows or without a model.

    Raises:
        ValueError: If there are none; it says what to set.
    """
    model, rows = (config[key].get("init_args", Namespace()) for key in ("model", "data"))
    for name in ("policy", "model"):
        source = model.get(name)
        if isinstance(source, Namespace) and source.get("path", "") is None and source.get("config", "") is None:
            raise ValueError(f"model.{name}.path is not set; give a folder or a hub name: --model.{name}.path MODEL")
    split = SPLITS.get(subcommand)
    if split in rows and rows[split] is None and not (split == "predict" and rows.get("test") is not None):
        raise ValueError(f"data.{split} is not set; give a file, a folder or a hub data set: --data.{split} FILE")
