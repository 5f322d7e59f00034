"""Flags from a TOML file (``--config_file``): checked as on the command line, which wins over the file."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from utils.cli.arguments import require_text
from utils.errors import UserError, shown
from utils.key_values import nearest_name
from utils.toml_files import BACKSLASH_HINT, config_path, has_escaped_backslash_accident, read_toml

CONFIG_FLAG = "--config_file"
PATH_METAVARS = frozenset({"PATH", "FOLDER", "FILE", "TOML"})  # flags whose value is a path, by what their help calls it

_SWITCHES = (argparse._StoreTrueAction, argparse._StoreFalseAction)
_SECTION = re.compile(r"\s*\[([^\[\]]+)\]\s*(#.*)?$")


@dataclass(frozen=True)
class _Entry:
    """One ``key = value`` of the file; ``section`` is empty above the first one, and dotted where sections are nested."""

    section: str
    key: str
    value: Any


class _WrongValue(ValueError):
    """What is wrong with a value, to complete "key = value ..."."""


def add_config_file_argument(group: argparse._ArgumentGroup) -> None:
    """--config_file, which ``parse_with_config`` reads."""
    group.add_argument(
        CONFIG_FLAG,
        metavar="TOML",
        help="read flags from this file, as key = value under any sections; the command line wins (default: none)",
    )


def parse_with_config(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """``parser.parse_args(argv)``, with the flags that the command line leaves out taken from its ``--config_file``.

    Sections of the file have no meaning. A key is the name of a flag; its value goes through the flag's own type and choices.
    Flags that take several values want a list, switches want true or false. Required flags may stand in the file. A switch
    that the file turns on cannot be turned off by the command line, which has no word for that.

    Args:
        argv: words of the command line; those of this process by default.

    Raises:
        UserError: the file cannot be read, or names the key (with line and section) that is unknown, given twice or wrong; or
            a value is no text that can be written to a file.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    path = _config_file_in(words)
    values = {} if path is None else read_config_file(parser, path)
    with _not_required(parser, values):
        args = parser.parse_args(words, argparse.Namespace(**values))
    require_text(parser, args)
    return args


def read_config_file(parser: argparse.ArgumentParser, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of a config file by the names that ``parser`` gives them in its result, converted and checked.

    Raises:
        UserError: as ``parse_with_config``.
    """
    entries = list(_entries(read_toml(path, CONFIG_FLAG)))
    actions = _actions_by_key(parser)
    values: dict[str, Any] = {}
    seen: dict[str, _Entry] = {}
    for entry in entries:
        where = _where(path, entry)
        action = actions.get(entry.key)
        if action is None:
            raise UserError(f"{where}: {_what_to_do_about(entry, parser, actions)}")
        if action.dest in seen:
            raise UserError(f"{where}: {entry.key} is given twice, also at {_where(path, seen[action.dest])}; keep one of them.")
        seen[action.dest] = entry
        try:
            values[action.dest] = _value(parser, action, entry.value)
        except _WrongValue as error:
            raise UserError(f"{where}: {entry.key} = {_as_written(entry.value)} {error}.") from None
    return values


def _config_file_in(words: Sequence[str]) -> str | None:
    """What ``--config_file`` is given on the command line. None also for help, and where the parser itself will complain."""
    if "-h" in words or "--help" in words:
        return None
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    only.add_argument(CONFIG_FLAG)
    try:
        return only.parse_known_args(words)[0].config_file
    except argparse.ArgumentError:
        return None


@contextmanager
def _not_required(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> Iterator[None]:
    """Let the parser do without the flags that ``values`` holds."""
    released = [action for action in parser._actions if action.required and action.dest in values]
    for action in released:
        action.required = False
    try:
        yield
    finally:
        for action in released:
            action.required = True


def _actions_by_key(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The flags that may stand in a file, by their names there: without dashes in front."""
    return {
        option.removeprefix("--"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and option != CONFIG_FLAG and isinstance(action, (argparse._StoreAction, *_SWITCHES))
    }


def _entries(table: Mapping[str, Any], sections: tuple[str, ...] = ()) -> Iterator[_Entry]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _entries(value, (*sections, key))
        else:
            yield _Entry(".".join(sections), key, value)


def _what_to_do_about(entry: _Entry, parser: argparse.ArgumentParser, actions: Mapping[str, argparse.Action]) -> str:
    """The sentence for a key that no flag has."""
    if entry.key == CONFIG_FLAG.removeprefix("--"):
        return f"{entry.key} cannot stand in a config file; give {CONFIG_FLAG} on the command line, once."
    if isinstance(entry.value, list) and any(isinstance(item, dict) for item in entry.value):
        return f"[[{entry.key}]] cannot stand here: write the name of a section in single brackets, or leave sections out."
    flag = f"--{entry.key.lstrip('-')}"
    if entry.key.startswith("-") and flag.removeprefix("--") in actions:
        return f"write the key {entry.key!r} without dashes in front, {flag.removeprefix('--')}."
    hint = nearest_name(flag, [f"--{key}" for key in actions]) or f" {parser.prog} --help lists the flags."
    named = f" {flag}" if flag.isprintable() else ""
    return f"{parser.prog} has no flag{named} for the key {entry.key!r}.{hint}"


def _where(path: str | os.PathLike[str], entry: _Entry) -> str:
    """``file, line 3, [section]``, as far as known."""
    line = _line_of(path, entry)
    return ", ".join([os.fspath(path), *([f"line {line}"] if line else []), *([f"[{entry.section}]"] if entry.section else [])])


def _line_of(path: str | os.PathLike[str], entry: _Entry) -> int | None:
    """The line of a key, found by its text, as TOML parsers do not report it. None where a key is written in another way."""
    with open(path, encoding="utf-8-sig") as file:
        lines = file.read().splitlines()
    section = ""
    for number, line in enumerate(lines, start=1):
        if header := _SECTION.match(line):
            section = ".".join(part.strip(" \t\"'") for part in header[1].split("."))
        elif section == entry.section and re.match(rf"\s*[\"']?{re.escape(entry.key)}[\"']?\s*=", line):
            return number
    return None


def _as_written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else shown(value)


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
    if "\0" in text:
        raise _WrongValue("holds the character number 0; take it out")
    try:
        converted = parser._get_value(action, text)
        parser._check_value(action, converted)
    except argparse.ArgumentError as error:
        raise _WrongValue(f"is refused: {error.message.rstrip('.')}") from None
    return converted
