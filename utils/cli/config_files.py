"""Flags from a TOML file (``--config_file``): checked as on the command line, which wins over the file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from utils.cli.arguments import hide_secrets, require_text
from utils.errors import UserError, shown
from utils.key_values import nearest_name
from utils.output import is_secret, keep_secret
from utils.toml_files import BACKSLASH_HINT, config_path, has_escaped_backslash_accident, read_toml

CONFIG_FLAG = "--config_file"
PATH_METAVARS = frozenset({"PATH", "FOLDER", "FILE", "TOML"})  # flags whose value is a path, by what their help calls it

Source = Callable[[str, Collection[str]], Mapping[str, Any]]
"""A path, and the names of flags that are given elsewhere -> flags with values as in TOML."""

_SWITCHES = (argparse._StoreTrueAction, argparse._StoreFalseAction)


class _WrongValue(ValueError):
    """What is wrong with a value, to complete "key = value ..."."""


def add_config_file_argument(group: argparse._ArgumentGroup) -> None:
    """--config_file, which ``parse_with_config`` reads."""
    group.add_argument(
        CONFIG_FLAG,
        metavar="TOML",
        help="read flags from this file, as key = value under any sections; the command line wins (default: none)",
    )


def parse_with_config(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, sources: Mapping[str, Source] = MappingProxyType({})
) -> argparse.Namespace:
    """``parser.parse_args(argv)``, with the flags that the command line leaves out taken from its ``--config_file``.

    Sections of the file have no meaning. A key is the name of a flag; its value goes through the flag's own type and choices.
    Flags that take several values want a list, switches want true or false. Required flags may stand in the file. A switch
    that the file turns on cannot be turned off by the command line, which has no word for that.

    Args:
        argv: words of the command line; those of this process by default.
        sources: other flags of the command line that name a file with flags, which count less than those of ``--config_file``.

    Raises:
        UserError: the file cannot be read, or names the key (with its section) that is unknown, given twice or wrong; or a value
            is no text that can be written to a file.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    hide_secrets(words)
    values: dict[str, Any] = {}
    if (path := _path_in(words, CONFIG_FLAG)) is not None:
        places = _entries(read_toml(path, CONFIG_FLAG))
        entries = ((f"{path}, [{section}]" if section else path, key, value) for section, key, value in places)
        values = _read(parser, entries, {CONFIG_FLAG, *sources})
    for flag, source in sources.items():
        if (path := _path_in(words, flag)) is not None:
            given = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")} | values.keys()
            entries = ((path, name, value) for name, value in source(path, given).items())
            values = {**_read(parser, entries, {CONFIG_FLAG, *sources}), **values}
    released = [action for action in parser._actions if action.required and action.dest in values]
    for action in released:
        action.required = False
    args = parser.parse_args(words, argparse.Namespace(**values))
    for action in released:
        action.required = True
    require_text(parser, args)
    return args


def _path_in(words: Sequence[str], flag: str) -> str | None:
    """What ``flag`` is given on the command line. None also for help, and where the parser itself will complain."""
    if "-h" in words or "--help" in words:
        return None
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    only.add_argument(flag, dest="path")
    try:
        return only.parse_known_args(words)[0].path
    except argparse.ArgumentError:
        return None


def _read(parser: argparse.ArgumentParser, entries: Iterable[tuple[str, str, Any]], others: Collection[str]) -> dict[str, Any]:
    """The values of a file by the names that ``parser`` gives them in its result, converted and checked.

    Args:
        entries: place, key and value.
        others: flags that may not stand in a file.
    """
    actions = {
        option.removeprefix("--"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and option not in others and isinstance(action, (argparse._StoreAction, *_SWITCHES))
    }
    values: dict[str, Any] = {}
    for where, key, value in entries:
        action = actions.get(key)
        if action is None:
            hint = nearest_name(key, actions) or f" {parser.prog} --help lists the flags."
            raise UserError(f"{where}: {parser.prog} has no flag for the key {shown(key)} that may stand in a file.{hint}")
        if action.dest in values:
            raise UserError(f"{where}: {key} is given twice; keep one of them.")
        if is_secret(key):
            keep_secret(str(value))
        try:
            values[action.dest] = _value(parser, action, value)
        except _WrongValue as error:
            written = "***" if is_secret(key) else str(value).lower() if isinstance(value, bool) else shown(value)
            raise UserError(f"{where}: {key} = {written} {error}.") from None
    return values


def _entries(table: Mapping[str, Any], sections: tuple[str, ...] = ()) -> Iterator[tuple[str, str, Any]]:
    """(dotted section, key, value) of everything in the file."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _entries(value, (*sections, key))
        else:
            yield ".".join(sections), key, value


def _value(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> Any:
    """A TOML value as ``action`` would have stored it from the command line."""
    if isinstance(action, _SWITCHES):
        if not isinstance(value, bool):
            raise _WrongValue("is for a switch: write true or false, without quotes")
        return not value if isinstance(action, argparse._StoreFalseAction) else value
    if action.nargs in (None, "?"):
        if isinstance(value, list):
            raise _WrongValue("must be one value, without brackets")
        return _one(parser, action, value)
    if not isinstance(value, list):
        raise _WrongValue(f"must be a list: write {action.option_strings[-1].removeprefix('--')} = [...]")
    if isinstance(action.nargs, int) and len(value) != action.nargs:
        raise _WrongValue(f"must be a list of {action.nargs} values, not of {len(value)}")
    if action.nargs == "+" and not value:
        raise _WrongValue("must be a list of at least one value")
    return [_one(parser, action, item) for item in value]


def _one(parser: argparse.ArgumentParser, action: argparse.Action, item: Any) -> Any:
    if isinstance(item, bool) or not isinstance(item, str | int | float):
        raise _WrongValue("must be text in quotes or a number")
    text = item if isinstance(item, str) else repr(item)
    if action.metavar in PATH_METAVARS:
        if has_escaped_backslash_accident(text):
            raise _WrongValue(f"holds control characters. {BACKSLASH_HINT.rstrip('.')}")
        text = str(config_path(text)) if text.startswith("~") else text  # on the command line the shell does this
    try:
        converted = parser._get_value(action, text)
        parser._check_value(action, converted)
    except argparse.ArgumentError as error:
        raise _WrongValue(f"is refused: {error.message.rstrip('.')}") from None
    return converted
