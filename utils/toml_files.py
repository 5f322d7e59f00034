"""Reading TOML files that users wrote by hand."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import read_text
from utils.output import is_secret

# Python's parser takes the square of the number of parts.
_KEY_WITHOUT_END = re.compile(
    r"""(?:^|[\[{,])[ \t]*(?:(?:[\w-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')[ \t]*\.[ \t]*){99}""", re.ASCII | re.MULTILINE
)
BACKSLASH_HINT = "In double quotes a backslash starts an escape: write C:/folder, or 'C:\\folder' in single quotes."


def _parse(text: str) -> dict[str, Any]:
    """With the standard library where it can (Python 3.11 on), else with the ``toml`` package; a ValueError names the line."""
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib.loads(text)
    import toml

    try:
        return toml.loads(text)
    except (IndexError, TypeError, KeyError, AttributeError) as error:  # how that parser fails on some malformed files
        raise ValueError("the file is not well-formed TOML") from error


def read_toml(path: str | os.PathLike[str], what: str = "TOML file") -> dict[str, Any]:
    """The content of a TOML file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: missing, not UTF-8, or not TOML; the line is named, and so is the remedy for Windows paths.
    """
    text = read_text(path, what)
    if _KEY_WITHOUT_END.search(text):
        raise UserError(f"{path} is not valid TOML: it has a key of more than 99 parts. Mend the file.")
    try:
        return _parse(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {str(error).rstrip('.')}. {_syntax_hint(text, str(error))}") from error


def _syntax_hint(text: str, message: str) -> str:
    """The line that the parser names, and what to do about backslashes in it."""
    match = re.search(r"line (\d+)", message)
    line = dict(enumerate(text.splitlines(), start=1)).get(int(match[1]) if match else 0, "").strip(" \t")
    name = line.partition("=")[0]
    if is_secret(name):
        line = f"{name}= ***"
    hint = f" - {BACKSLASH_HINT}" if '"' in line and "\\" in line else ""
    return f"The line is: {line}{hint}" if line else "Mend the file."


def has_escaped_backslash_accident(value: str) -> bool:
    """Whether a path holds control characters, as ``"C:\\train"`` does once TOML has read ``\\t`` as a tab."""
    return any(ord(character) < 32 for character in value)


def config_path(value: str) -> Path:
    """A path as written in a TOML file, with ``~`` expanded; relative ones start at the current folder."""
    try:
        return Path(value).expanduser()
    except RuntimeError:  # ~name, and there is no such user
        return Path(value)
