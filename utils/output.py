"""What goes to the terminal and to logs: text from files and their names cannot move the cursor, colour, hide or fake lines, and
nobody has to read it."""

from __future__ import annotations

import io
import logging
import os
import sys
import unicodedata
from typing import Any

SECRET_ENDINGS = ("_api_key", "_token", "_password", "_secret")  # of flags that are stored and shown nowhere
SHORTEST_SECRET = 6  # characters; shorter ones are in many words

_secrets: set[str] = set()


def is_secret(flag: str) -> bool:
    """Whether the value of a flag, whatever dashes it has, is a key or a token."""
    return flag.strip("- '\"").lower().endswith(SECRET_ENDINGS)


def keep_secret(value: str) -> None:
    """Have ``visible`` show stars in place of a key or a token, wherever it turns up."""
    if len(value) >= SHORTEST_SECRET:
        _secrets.add(value)


def visible(text: str, lines: bool = False) -> str:
    """The text with every character that nobody sees, or that moves others, as its code point, such as <U+202A>.

    They come with paths that are copied from file managers, chats and web pages, and from people who want to fool a terminal.
    Secrets are stars.

    Args:
        lines: keep ends of lines and tabs, of tables say.
    """
    for secret in _secrets:
        text = text.replace(secret, "***")
    return "".join(_shown(character) if _is_hidden(character, lines) else character for character in text)


def with_names_of_invisible(text: str) -> str:
    """A message on one line, with what ``visible`` shows named at its end."""
    text = " ".join(text.splitlines())
    hidden = {character for character in text if _is_hidden(character, False)}
    names = sorted(f"U+{ord(character):04X} ({unicodedata.name(character, 'a control character').lower()})" for character in hidden)
    return f"{visible(text)} It has invisible characters: {', '.join(names)}." if names else visible(text)


def show(text: object, error: bool = False) -> None:
    """Print a line or a table on stdout, or on stderr. Everything that scripts print goes through here."""
    print(visible(str(text), lines=True), file=sys.stderr if error else sys.stdout, flush=True)


class _Outlasting(io.FileIO):
    """A stream whose reader may go: what nobody can read, or what no longer fits on the disk of a log, is lost without an error."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or len(data)  # a reader that is slow on a stream that does not wait loses some
        except BrokenPipeError:  # for good, also for libraries and processes that write by themselves
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        except OSError:  # the terminal was closed, or the disk is full
            pass
        return len(data)


def outlast_readers() -> None:
    """Have stdout and stderr go on when the reader of their pipe ends, as ``head`` does, and hours of work with them.

    What the encoding of a stream lacks is escaped.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the script; a file that is opened later must not get its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (stays open)
        elif isinstance(stream, io.TextIOWrapper):
            raw = getattr(stream.buffer, "raw", stream.buffer)  # unbuffered with PYTHONUNBUFFERED
            if type(raw) is io.FileIO:  # and no console of Windows, or what a test puts there
                stream.flush()
                outlasting = _Outlasting(raw.fileno(), "w", closefd=False)
                buffer = outlasting if raw is stream.buffer else io.BufferedWriter(outlasting)
                modes = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
                stream = io.TextIOWrapper(buffer, stream.encoding, **modes)
                setattr(sys, name, stream)
            stream.reconfigure(errors="backslashreplace")


class VisibleFormatter(logging.Formatter):
    """Log records with ``visible`` arguments: a name with a line end does not look like two records."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            record = logging.makeLogRecord(vars(record))
            # Numbers stay, as %d wants them.
            record.args = tuple(arg if isinstance(arg, int | float) else visible(str(arg)) for arg in record.args)
        return visible(super().format(record), lines=True)


def _is_hidden(character: str, lines: bool) -> bool:
    if character.isprintable() or (lines and character in "\n\t"):
        return False
    return unicodedata.category(character)[0] in "CZ" and not "\ud800" <= character <= "\udfff"


def _shown(character: str) -> str:
    return f"<U+{ord(character):04X}>"
