"""What a configuration may do: name classes for its slots and give plain values, in local files of a bounded size.

A configuration may come from somebody else. It must not call a function, fetch a file over a network, or fill the
memory by YAML that refers to itself.
"""

import re
from contextlib import suppress
from functools import cache

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

MAX_VALUES = 100_000
"""Values of a configuration, those that aliases repeat counted each time; the longest of this project has 60."""

MAX_DEPTH = 100
"""Levels of nesting; libyaml's loader crashes at some ten thousand."""

CALLED_OR_BUILT = re.compile(r"\bCallable\b|\bmodules\.module\.Module\b")
"""Types of Lightning's arguments that would let a configuration have any function called or any module built."""

load_yaml = get_loader("yaml")


def limit_parsing() -> None:
    """Restrict what jsonargparse does with a configuration, for the whole process.

    A dict that looks like a class (``class_path``, ``init_args``) stays a dict where a slot takes any value. Names that
    run code, delete or write files, or reach for a network are refused, by jsonargparse's own list of them. URLs are
    no configuration files.
    """
    set_parsing_settings(
        instantiate_subclass_spec_in_any=False,
        validate_subclass_spec_in_any=True,
        config_read_mode_fsspec_enabled=False,  # Lightning enables it
        config_read_mode_urls_enabled=False,
        import_path_denylist=[],  # beside the default one, which is enforced only if this is given
    )
    set_loader("yaml", load_bounded_yaml, (yaml.YAMLError,))


def load_bounded_yaml(text: str) -> object:
    """A YAML text as jsonargparse reads it, after :func:`check_yaml`."""
    check_yaml(text)
    return load_yaml(text)


def check_yaml(text: str) -> None:
    """Refuse a YAML text that is huge once its aliases are replaced by what they stand for, or nested too deeply.

    The text is read as a stream, so neither can harm the check itself. Text inside of it is looked at, too, since
    jsonargparse reads that as YAML where a slot takes something else than text.

    Raises:
        ValueError: If it is.
    """
    texts = [text]
    while texts:
        current = texts.pop()
        with suppress(yaml.YAMLError):  # which the loader reports
            texts += [each for each in _checked_scalars(current) if MAX_DEPTH < len(each) < len(current)]


def _checked_scalars(text: str) -> list[str]:
    scalars: list[str] = []
    sizes: dict[str, int] = {}  # of what has an anchor
    opened: list[tuple[str | None, int]] = []  # anchors of the collections around, and their sizes so far
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        anchor, size = getattr(event, "anchor", None), 1
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((anchor, total))
            if len(opened) > MAX_DEPTH:
                raise ValueError(f"a configuration must be nested at most {MAX_DEPTH} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            sizes |= {} if anchor is None else {anchor: total - before + 1}
        elif isinstance(event, yaml.AliasEvent):
            size = sizes.get(str(anchor), MAX_VALUES + 1)  # within what it stands for, or of nothing
        elif isinstance(event, yaml.ScalarEvent):
            scalars.append(event.value)
            sizes |= {} if anchor is None else {anchor: 1}
        else:
            continue
        total += size
        if total > MAX_VALUES:
            raise ValueError(
                f"a configuration must have at most {MAX_VALUES} values, those that aliases (*name) repeat counted "
                "each time, and no alias of what is around it"
            )
    return scalars


@cache
def only_python(owner: type) -> set[str]:
    """Arguments of a class of Lightning's that only Python code can give: functions and torch modules.

    A configuration that names a function for a hook, or a module for a callback, would choose what is run. Classes of
    anybody else decide for themselves what their arguments may be.
    """
    if not owner.__module__.startswith("lightning."):
        return set()
    parser = ArgumentParser(exit_on_error=False)  # resolves the types, which some classes only name
    parser.add_class_arguments(owner, fail_untyped=False)
    hints = {action.dest: str(getattr(action, "_typehint", "")) for action in parser._actions}
    return {name for name, hint in hints.items() if CALLED_OR_BUILT.search(hint)}
