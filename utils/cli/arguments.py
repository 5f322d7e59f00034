"""Flags that several scripts share, in groups, and the parser they hang on."""

from __future__ import annotations

import argparse
import logging
import os
import random
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, TypeVar

from utils.errors import STATUS_USER_ERROR, UserError, shown
from utils.key_values import nearest_name
from utils.output import is_secret, keep_secret, visible
from utils.processes.command_line import hide_on_command_line
from utils.processes.launcher import let_first_process_speak

logger = logging.getLogger(__name__)

AUTO = "auto"  # in place of a number that a script finds out
MAX_SEED = 2**32 - 1
# Where secrets can come from in place of the command line.
SECRET_VARIABLES = {
    "wandb_api_key": ("WANDB_API_KEY", "wandb login"),
    "huggingface_token": ("HF_TOKEN", "hf auth login"),
}
MAX_COUNT = 2**31 - 1  # no flag means anything beyond, and some libraries count no further
MAX_FLOAT = 1e30  # float32, which torch computes in, still holds its products

N = TypeVar("N", int, float)


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=116)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage, which is longer than a screen, and names the nearest flag."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            name = unknown[0].partition("=")[0]
            hint = nearest_name(name, flags)
            words = name if is_secret(hint.strip("'?")) else " ".join(unknown)
            self.error(f"unrecognized arguments: {words}" + (f" ({hint.strip()})" if hint else ""))
        return parsed

    def error(self, message: str) -> NoReturn:
        let_first_process_speak()
        self.exit(STATUS_USER_ERROR, f"{self.prog}: error: {visible(message)}; see --help\n")


class StoreOnce(argparse._StoreAction):
    """Refuses a flag that stands twice on one command line, where the first value would be lost.

    Args:
        instead: what takes several values.
    """

    def __init__(self, *arguments: Any, instead: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._filled, self._instead = None, instead

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        if self._filled is namespace:
            parser.error(f"{option_string} is given twice, and only one would count: keep one of them, or use {self._instead}")
        self._filled = namespace
        super().__call__(parser, namespace, values, option_string)


def script_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help is laid out in groups. Abbreviated flags are refused: a typo must not become another flag."""
    return _Parser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)


def _number(what: str, convert: Callable[[str], N], fits: Callable[[N], bool]) -> Callable[[str], N]:
    """An argparse type for ``what``."""

    def parse(text: str) -> N:
        try:
            number = convert(text)
        except ValueError:
            number = None
        if number is None or not fits(number):
            too_large = number is not None and number > MAX_COUNT
            raise argparse.ArgumentTypeError(f"{shown(text)} is {'too large for' if too_large else 'not'} {what}")
        return number

    parse.__doc__ = f"argparse type: {what}."
    return parse


def int_up_to(limit: int) -> Callable[[str], int]:
    """An argparse type: a whole number from 1 to ``limit``."""
    return _number(f"a whole number from 1 to {limit}", int, lambda number: 1 <= number <= limit)


whole_number = _number("a whole number", int, lambda number: abs(number) <= MAX_COUNT)
positive_int = _number("a whole number of at least 1", int, lambda number: 1 <= number <= MAX_COUNT)
non_negative_int = _number("a whole number of at least 0", int, lambda number: 0 <= number <= MAX_COUNT)
finite_float = _number("a number that is neither NaN nor infinite", float, lambda number: abs(number) <= MAX_FLOAT)
positive_float = _number("a finite number above 0", float, lambda number: 0 < number <= MAX_FLOAT)
non_negative_float = _number("a finite number of at least 0", float, lambda number: 0 <= number <= MAX_FLOAT)
share = _number("a number above 0 and up to 1", float, lambda number: 0 < number <= 1)
seed = _number(f"a whole number from 0 to {MAX_SEED}", int, lambda number: 0 <= number <= MAX_SEED)


def parsed(parse: Callable[[str], N], text: str, where: str) -> N:
    """What an argparse type makes of a text that stands elsewhere; a UserError begins with ``where``."""
    try:
        return parse(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{where}: {error}.") from None


def count_or_auto(text: str) -> int | str:
    """argparse type: a whole number of at least 0, or auto."""
    return AUTO if text == AUTO else non_negative_int(text)


def require_text(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse values that are no text: bytes of the command line that are not UTF-8 cannot be written into metadata or names.

    Raises:
        UserError: names the flag.
    """
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        for text in value if isinstance(value, list) else [value]:
            try:
                if isinstance(text, str):
                    text.encode()
            except UnicodeEncodeError:
                given = "***" if is_secret(action.dest) else repr(os.fsencode(text))
                raise UserError(
                    f"{action.option_strings[-1]} {given} is not UTF-8 text here; rename the file, "
                    "or set LC_ALL=C.UTF-8 where the name itself is UTF-8."
                ) from None


def public_flags(args: argparse.Namespace) -> dict[str, object]:
    """Every flag and its value, also those that were not given (None); keys and tokens are left out."""
    return {name: value for name, value in vars(args).items() if not is_secret(name)}


def given_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, object]:
    """The flags with other values than their defaults; keys and tokens are left out."""
    return {name: value for name, value in public_flags(args).items() if value != parser.get_default(name)}


def hide_secrets(words: Sequence[str]) -> None:
    """Have keys and tokens on a command line, and in the environment, shown nowhere: W&B stores ``sys.argv``, and ``ps`` shows it.

    Called before the words are parsed, as errors name some.
    """
    for variable, _ in SECRET_VARIABLES.values():
        keep_secret(os.environ.get(variable, ""))
    for word, following in zip(words, [*words[1:], ""]):
        flag, equals, value = word.partition("=")
        secret = value if equals else following
        if flag.startswith("--") and is_secret(flag) and secret and not secret.startswith("--"):
            keep_secret(secret)
            hide_on_command_line(secret)
            variable, command = SECRET_VARIABLES.get(flag[2:], ("an environment variable", "a login"))
            message = "%s: the history of the shell and lists of processes have what stands behind it; better set %s, or run `%s`."
            logger.warning(message, flag, variable, command)


def random_seed() -> int:
    """A seed for runs that were given none. It does not come from the generators that it will seed."""
    return random.SystemRandom().randint(0, MAX_SEED)


def add_device_argument(group: argparse._ArgumentGroup) -> None:
    """--device."""
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")


def require_flags(args: argparse.Namespace, purpose: str, *names: str) -> None:
    """Raise a UserError that lists those of the flags that ``purpose`` needs and that were not given."""
    missing = [f"--{name}" for name in names if getattr(args, name) is None]
    if missing:
        raise UserError(f"{purpose} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} missing.")


def warn_of_unused(parser: argparse.ArgumentParser, args: argparse.Namespace, mode: str, used: Collection[str]) -> None:
    """Log the flags that were given and that ``mode`` does not read; ``used`` names those that it reads."""
    given = [f"--{name}" for name, value in vars(args).items() if name not in used and value != parser.get_default(name)]
    if given:
        logger.warning("%s: no effect with %s.", ", ".join(given), mode)
