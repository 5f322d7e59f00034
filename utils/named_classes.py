"""Classes that users name by a dotted path, and their construction from ``key=value`` arguments."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from utils.errors import UserError, first_line
from utils.key_values import nearest_name


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
    if inspect.isclass(found) and not issubclass(found, base):
        raise UserError(f"{flag} {path} is a class, but not a {base.__module__}.{base.__qualname__}.")
    if not inspect.isclass(found):
        raise UserError(f"{flag} {path}: {module_name} has no class {name}.{nearest_name(name, vars(module))}")
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
