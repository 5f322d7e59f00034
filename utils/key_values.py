"""``key=value`` words of a command line (``--optimizer_args`` and its like), and the classes users name to take them."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

from utils.errors import UserError, first_line, shown


class TextEnum(str, Enum):
    """Members are texts: what ``enum.StrEnum`` is from Python 3.11 on."""

    __str__ = str.__str__
    __format__ = str.__format__


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


def import_class(path: str, flag: str, base: type) -> type:
    """The subclass of ``base`` with the dotted ``path``. A UserError names ``flag`` where there is none."""
    module_name, _, name = path.rpartition(".")
    if not module_name or module_name.startswith(".") or not name:
        raise UserError(f"{flag} {path} is no dotted path of a class, such as package.module.Class.")
    package = module_name.partition(".")[0]
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a build that does not fit the machine raises many things besides ImportError
        raise UserError(
            f"{flag} {path} cannot be imported ({first_line(error)}). If it is a package, install it: pip install {package}"
        ) from error
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        raise UserError(f"{flag} {path}: {module_name} has no class {name}.{nearest_name(name, vars(module))}")
    if not issubclass(found, base):
        raise UserError(f"{flag} {path} is a class, but not a {base.__module__}.{base.__qualname__}.")
    return found


def construct(factory: Callable[..., Any], first: object, options: Mapping[str, Any], what: str, flag: str) -> Any:
    """``factory(first, **options)``; ``what`` and ``flag`` say in messages who is called and where options come from.

    Raises:
        UserError: an option that ``factory`` does not take, or a value that it refuses.
    """
    known = inspect.signature(factory).parameters
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    for option in options:
        if option not in known and not open_ended:
            raise UserError(
                f"{flag}: {what} has no argument {option!r}.{nearest_name(option, known)} Known: {', '.join(list(known)[1:])}."
            )
    try:
        return factory(first, **options)
    except Exception as error:  # whatever a class that the user named does with what the user gave
        given = ", ".join(f"{option}={value!r}" for option, value in options.items()) or "none"
        raise UserError(f"{what} refuses its arguments ({given}): {first_line(error)}.") from error
