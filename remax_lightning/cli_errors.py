"""What the command line says of a mistake: one sentence, with the nearest name where one was misspelt."""

import difflib
import dis
import inspect
import logging
import os
import pkgutil
import re
import sys
import sysconfig
import traceback
import typing
import warnings
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, NoReturn

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from remax_lightning.models.visible_text import visible
from remax_lightning.supported import PRECISIONS

TRACEBACK = "REMAX_TRACEBACK"  # an environment variable; 1 shows where an error comes from
SETTINGS = "lightning.pytorch.trainer.connectors"  # where Lightning looks at the trainer's arguments
NO_GPU = " Set trainer.accelerator to auto or cpu."
LOST_RANK = re.compile(r"gloo/transport|Connection (?:closed|reset) by peer|remote process exited|Broken pipe")
"""What gloo and NCCL say when a rank is gone, in an error of whatever was waiting for it."""
PRIMITIVES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}


def shows_traceback() -> bool:
    """Whether the user asked for tracebacks."""
    return os.environ.get(TRACEBACK, "") not in ("", "0")


def refuse(message: str) -> NoReturn:
    """Leave with a sentence, as argparse does for a wrong command line."""
    sys.stderr.write(visible(f"error: {message}\n"))
    sys.exit(2)


def escape_output() -> None:
    """Write control characters out in everything that warnings, logs and tracebacks say, for the whole process.

    They quote rows, names of files and what a model or its chat template says, which may be anybody's.
    """
    if getattr(warnings.formatwarning, "__module__", None) == __name__:
        return
    format_warning, make_record = warnings.formatwarning, logging.getLogRecordFactory()

    def visible_warning(*args: Any, **kwargs: Any) -> str:
        return visible(format_warning(*args, **kwargs))

    def visible_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        record.msg, record.args = visible(record.getMessage()), None
        return record

    warnings.formatwarning = visible_warning
    logging.setLogRecordFactory(visible_record)
    sys.excepthook = lambda kind, error, tb: print(
        visible("".join(traceback.format_exception(kind, error, tb))), end="", file=sys.stderr
    )


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like another; None if none is like it."""
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[close[0]] if close else None


def nearest(name: str, known: Iterable[str]) -> str:
    """A question for the end of a sentence: whether the closest known name was meant."""
    close = closest(name, known)
    return "" if close is None else f"; did you mean {close}?"


def sentence(error: BaseException) -> str | None:
    """What an exception tells the user; None if it looks like a bug, whose traceback is needed.

    Sentences are the errors that this package raises itself, those of Lightning's about its settings, failing rewards,
    files and packages that are not there, and ranks that are gone.
    """
    chain = list(_chain(error))
    for each in chain:
        if _is_raised_here(each):
            return str(each)
    for each in chain:
        modules = _modules(each.__traceback__)
        is_setting = isinstance(each, (ValueError, TypeError)) and any(name.startswith(SETTINGS) for name in modules)
        if is_setting or isinstance(each, (OSError, ModuleNotFoundError, MisconfigurationException)):
            return str(each) + (NO_GPU if "supported gpu backend" in str(each) else "")
        if isinstance(each, RuntimeError) and LOST_RANK.search(str(each)):
            return "the connection to another rank is lost: it has ended or does not answer; its own message says why"
        if any(name.startswith("remax_lightning.rewards") for name in modules):
            return f"the reward raised {type(each).__name__}: {each}{_place(each)}"
    return None


def _place(error: BaseException) -> str:
    """Where the user's code raised an error: the last file that belongs to no package and not to Python."""
    paths = sysconfig.get_paths()
    installed = (*(paths[name] for name in ("stdlib", "purelib", "platlib")), os.path.dirname(__file__))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(installed)]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes; jsonargparse wraps errors without saying so."""
    current: BaseException | None = error
    while current is not None:
        yield current
        is_wrapper = any(name.startswith("jsonargparse") for name in _modules(current.__traceback__)[-1:])
        current = current.__cause__ or (current.__context__ if is_wrapper else None)


def _modules(tb: TracebackType | None) -> list[str]:
    """Modules of the frames that an error went through, where it was raised last."""
    return [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(tb)]


def _is_raised_here(error: BaseException) -> bool:
    """Whether a raise statement of this package raised it: an error of torch has the same last frame, without one."""
    tb = error.__traceback__
    if tb is None or isinstance(error, (AssertionError, NotImplementedError)):
        return False
    while tb.tb_next is not None:
        tb = tb.tb_next
    is_raise = dis.opname[tb.tb_frame.f_code.co_code[tb.tb_lasti]] == "RAISE_VARARGS"
    return is_raise and _modules(tb)[0].startswith("remax_lightning.")


def explain(message: str, parser: Any) -> str:
    """A message of jsonargparse's as one sentence.

    Args:
        message: Its message: keys, classes and reasons, nested by indentation.
        parser: The parser that the arguments were for.

    Returns:
        The sentence; the message itself if it is of an unknown kind.
    """
    for pattern, describe in REASONS.items():
        if match := re.search(pattern, message):
            before = message[: match.start()]
            keys = [key for key in re.findall(r'Parser key "([^"]+)"', before) if key != "config"]
            classes = re.findall(r"Problem with given class_path '([^']+)'", before)
            return describe(match, ".".join(keys), classes, parser)
    return message


def _unknown_option(match: re.Match[str], key: str, classes: list[str], parser: Any) -> str:
    """An argument that a class does not have, or one of its groups of arguments."""
    name = ".".join(each.strip("-") for each in match.groups() if each)
    name, _, value = name.partition("=")
    in_line = re.search(r"class_path='([^']+)'", match.string[match.end() :].partition("\n")[0])  # of an optimizer
    classes = [*classes, in_line[1]] if in_line else classes
    if not classes:
        return _unknown_argument(match, key, classes, parser)
    if name.endswith(".help"):
        option = f"--{key}.{name}"
        return f"{option} needs the class that has it first, such as --model ReMax {option} {value}"
    owner = pkgutil.resolve_name(classes[-1])
    *groups, last = name.split(".")
    for group in groups:
        owner = next(_classes_in(arguments_of(owner).get(group)), owner)
    if last in arguments_of(owner):
        return f"{key}.{name}: only Python code can give {owner.__name__} a {last}; leave it out"
    return f"{key}.{name}: {owner.__name__} has no argument {last}{nearest(last, arguments_of(owner))}"


def _unknown_argument(match: re.Match[str], key: str, classes: list[str], parser: Any) -> str:
    """An option or a key of a file that the sub-command does not have."""
    name = ".".join(each for each in match.groups() if each).partition("=")[0]
    options = [option for option in parser._option_string_actions if option.startswith("--")]
    known = options if name.startswith("-") else [option[2:] for option in options]
    head, dot, rest = name.partition(".")
    heads = {option.partition(".")[0] for option in known}
    if dot and head not in heads and (close := closest(head, heads)):
        return f"there is no {name}; did you mean {close}.{rest}?"
    return f"there is no {name}{nearest(name, known)}"


def _required(match: re.Match[str], key: str, classes: list[str], parser: Any) -> str:
    """Arguments without a default that were not given."""
    names = [name.strip() for name in match[1].splitlines()[0].split(",")]
    if classes:
        options = " ".join(f"--{key}.{name} ..." for name in names)
        return f"{classes[-1].rpartition('.')[2]} needs {' and '.join(names)}: give {options}, or set them in a file"
    names = [name.partition(".")[2] or name for name in names]  # behind the sub-command
    hint = ", in a file such as --config configs/remax.yaml" if {"model", "data"} & set(names) else ""
    return f"{' and '.join(f'--{name}' for name in names)} must be given{hint}"


def _unknown_class(match: re.Match[str], key: str, classes: list[str], parser: Any) -> str:
    """A name that is no class; or text where a number was expected, as every text could be a class of some type."""
    name = match[1].strip()
    if described := _not_primitive(match, key, name):
        return described
    known = sorted({each.__name__ for each in known_classes(key, classes, parser)})
    listed = f" Known are {', '.join(known)}; give a class of your own by its path, such as my_package.{name}"
    return f"{key}: there is no class {name}{nearest(name, known) or '.'}{listed if known else ''}"


def _not_primitive(match: re.Match[str], key: str, value: str) -> str | None:
    expected = set(re.findall(r"Expected a <class '(\w+)'>", match.string)) & set(PRIMITIVES)
    if not expected:
        return None
    accepted = " or ".join(sorted(PRIMITIVES[each] for each in expected))
    if "only Python code can give" in match.string and value.startswith("{"):
        return f"{key}: only Python code can give an object, got {value}; on the command line it must be {accepted}"
    return f"{key} must be {accepted}, got {value}"


def _value(match: re.Match[str]) -> str:
    """The value that a reason is about."""
    value = next(iter(re.findall(r"(?:Got value:|Given value:) (.*)", match.string)), "")
    nested = re.fullmatch(r"NestedArg\(key='[^']*', val=(.*)\)", value)
    return nested[1].strip("'") if nested else value


def _wrong_type(match: re.Match[str], key: str, classes: list[str], parser: Any) -> str:
    """A value of another type."""
    return _not_primitive(match, key, _value(match)) or match.string


def _only_python(match: re.Match[str], key: str, classes: list[str], parser: Any) -> str:
    """A value of a type that the command line cannot give."""
    return f"{key}: {match[1]}"


def _wrong_choice(match: re.Match[str], key: str, classes: list[str], parser: Any) -> str:
    """A value that is none of those allowed."""
    choices = [each for group in re.findall(r"Literal\[([^\]]*)\]", match.string) for each in group.split(", ")]
    value = _value(match)
    names = PRECISIONS if key == "trainer.precision" else dict.fromkeys(each.strip("'") for each in choices)
    return f"{key} must be one of {', '.join(names)}, got {value}{nearest(value, names)}"


def _abstract(match: re.Match[str], key: str, classes: list[str], parser: Any) -> str:
    """Arguments without the class that they are for."""
    known = sorted({each.__name__ for each in known_classes(key, classes, parser)})
    return f"{key} needs its class before its arguments: --{key} CLASS, one of {', '.join(known)}"


def _not_one(match: re.Match[str], key: str, classes: list[str], parser: Any) -> str:
    """Something else where a class path was expected."""
    known = sorted({each.__name__ for each in known_classes(key, classes, parser)})
    value = _value(match)
    return f"{key} takes one {match[1]}, as class_path and init_args, got {value}; known are {', '.join(known)}"


def _not_imported(match: re.Match[str], key: str, classes: list[str], parser: Any) -> str:
    """A class path that leads to nothing, or to something else."""
    value = re.findall(r"Given value: (?:NestedArg\(key='[^']*', val=')?([\w.]*)", match.string)[-1]
    return f"{key} cannot be {value}: {match[1]}"


def _denied(match: re.Match[str], key: str, classes: list[str], parser: Any) -> str:
    """A name that a configuration may not have, whatever the slot."""
    return (
        f"{key} cannot be {match[1]}: a configuration may not name what runs code, changes files or uses the network; "
        "name a class that is meant to be there"
    )


def _function(match: re.Match[str], key: str, classes: list[str], parser: Any) -> str:
    """A function where a class was expected, which would be called."""
    return f"{key} cannot be {match[1]}, which is a function: class_path takes a class"


def _url(match: re.Match[str], key: str, classes: list[str], parser: Any) -> str:
    """A URL where a class or settings were expected, which may stand in a file of their own."""
    return f"{key} cannot be {match[1]}: a configuration is a local file, not a URL; download it and read it first"


def _unreadable(match: re.Match[str], key: str, classes: list[str], parser: Any) -> str:
    """Settings in a file that another one names, or in the text itself, that are too large or have tags of Python's."""
    return f"{key or '--config'}: {match[1]}" if "Parser key" in match.string else match.string


def _not_settings(match: re.Match[str], key: str, classes: list[str], parser: Any) -> str:
    """A plain value for a group of arguments."""
    hint = arguments_of(pkgutil.resolve_name(classes[-1])).get(key.rpartition(".")[2]) if classes else None
    names = [name for each in _classes_in(hint) for name in arguments_of(each)]
    return f"{key} has settings of its own, {', '.join(f'{key}.{name}' for name in names)}; got {match[1]}"


def _extra(match: re.Match[str], key: str, classes: list[str], parser: Any) -> str:
    """A package that is not installed."""
    package, option = (
        ("shtab", "--print_completion") if "shtab" in match[0] else ("ruamel.yaml", "--print_config=comments")
    )
    return f"{option} needs the package {package}, which is not installed: pip install {package}"


REASONS = {
    r"--print_completion: invalid choice: 'shtab-\w+' \(choose from 'jsonschema'\)": _extra,
    r'Invalid option "comments"': _extra,
    r"Importing '([^']+)' is not allowed": _denied,
    r"(\S+) is a function, and a class_path is a class": _function,
    r"(a configuration must (?:have at most|be nested)[^\n]*)": _unreadable,
    r"(could not determine a constructor for the tag '[^']*')": _unreadable,
    r"(?:Unable to load config '|Given value: )(\w[\w:+.-]*://[^\s']*)": _url,
    r"unrecognized arguments: (\S+)": _unknown_option,
    r"Option '([^']+)' is not accepted": _unknown_option,
    r"Subcommand '\w+' does not accept option '([^']+)'": _unknown_argument,
    r"Group '([^']+)' does not accept option '([^']+)'": _unknown_option,
    r"arguments are required: (.*)": _required,
    r"instantiatable class, but (\S+) is abstract": _abstract,
    r"Not a valid subclass of (\w+)": _not_one,
    r"Unable to load config '(.*)'": _not_settings,
    r"(Import path does not correspond to a subclass of \w+)": _not_imported,
    r"(No module named '[^']+')": _not_imported,
    r"(module '[^']+' has no attribute '[^']+')": _not_imported,
    r"Expected a dot import path string: (.*)": _unknown_class,
    r"Not of type \w*Dataset: ([^\n]*)": _only_python,
    r"Expected a typing.Literal\[": _wrong_choice,
    r"Expected a <class '(?!NoneType)": _wrong_type,
}
"""What each kind of reason looks like in jsonargparse's messages, most telling first."""


def arguments_of(owner: Any) -> dict[str, Any]:
    """Arguments of a class's constructor and their types; where it passes on keywords, those of its parents too."""
    arguments: dict[str, Any] = {}
    for each in inspect.getmro(owner):
        if "__init__" in vars(each):
            init = vars(each)["__init__"]
            names = list(inspect.signature(init).parameters.values())[1:]
            hints = typing.get_type_hints(init)
            named = [name for name in names if name.kind not in (name.VAR_KEYWORD, name.VAR_POSITIONAL)]
            arguments = {**{name.name: hints.get(name.name) for name in named}, **arguments}
            if not any(name.kind is name.VAR_KEYWORD for name in names):
                break
    return arguments


def known_classes(key: str, classes: list[str], parser: Any) -> Iterator[type]:
    """Classes that an argument may be, of those that are imported."""
    if classes:
        hint = arguments_of(pkgutil.resolve_name(classes[-1])).get(key.rpartition(".")[2])
    else:
        hint = getattr(parser._option_string_actions.get(f"--{key}"), "_typehint", None)
    for base in set(_classes_in(hint)):
        yield from [each for each in _concrete(base) if each is not base] or ([] if _is_protocol(base) else [base])


def _classes_in(hint: Any) -> Iterator[type]:
    """The classes that a type is made of."""
    if isinstance(hint, type) and not typing.get_args(hint):
        if hint.__module__ not in ("builtins", "collections.abc"):
            yield hint
        return
    for each in hint if isinstance(hint, list) else typing.get_args(hint):
        yield from _classes_in(each)


def _is_protocol(base: type) -> bool:
    return typing.Protocol in base.__bases__


def _concrete(base: type) -> Iterator[type]:
    """A class and its subclasses that can be built, and that are public: their package exports them."""
    package = sys.modules.get(base.__module__.rpartition(".")[0] or base.__module__)
    members = (inspect.getattr_static(base, name) for name in dir(base))
    is_abstract = any(getattr(member, "__isabstractmethod__", False) for member in members) or _is_protocol(base)
    if not is_abstract and package is not None and vars(package).get(base.__name__) is base:
        yield base
    subclasses: list[type] = type.__subclasses__(base)
    for subclass in subclasses:
        yield from _concrete(subclass)
