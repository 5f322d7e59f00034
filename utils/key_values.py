"""``key=value`` words of a command line (``--network_args``, ``--optimizer_args``, ``--lr_scheduler_args``)."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from utils.errors import UserError, shown


def parse_key_values(words: Sequence[str] | None, flag: str) -> dict[str, str]:
    """``["a=1", "b=x=y"]`` -> ``{"a": "1", "b": "x=y"}``; values stay text.

    Raises:
        UserError: a word without ``=`` or without a key, or a key given twice; names ``flag``.
    """
    values: dict[str, str] = {}
    for word in words or ():
        key, equals, value = word.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"{flag} takes words of the form key=value, but got {shown(word)}.")
        if key in values:
            raise UserError(f"{flag} has the key {key!r} twice; keep one of them.")
        values[key] = value.strip()
    return values


def literal_key_values(words: Sequence[str] | None, flag: str) -> dict[str, Any]:
    """As ``parse_key_values``, with every value read as a Python literal: ``betas=0.9,0.99`` gives a tuple.

    Raises:
        UserError: a value that is not a literal; a bare word is refused because ``true`` would count as a text.
    """
    values: dict[str, Any] = {}
    for key, text in parse_key_values(words, flag).items():
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise UserError(
                f"{flag}: the value of {key} must be a Python literal such as 0.1, True, 'text' or (0.9, 0.99), "
                f"but it is {shown(text)}."
            ) from None
    return values


def nearest_name(name: object, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with a leading blank for the known name most like ``name``, or an empty text."""
    found = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {found[0]!r}?" if found else ""
