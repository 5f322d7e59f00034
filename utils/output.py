"""What goes to the terminal and to logs: text from files and their names cannot move the cursor, colour, hide or fake lines."""

from __future__ import annotations

import logging
import sys
import unicodedata


def visible(text: str, lines: bool = False) -> str:
    """The text with every character that nobody sees, or that moves others, as its code point, such as <U+202A>.

    They come with paths that are copied from file managers, chats and web pages, and from people who want to fool a terminal.

    Args:
        lines: keep ends of lines and tabs, of tables say.
    """
    return "".join(_shown(character) if _is_hidden(character, lines) else character for character in text)


def with_names_of_invisible(text: str) -> str:
    """A message on one line, with what ``visible`` shows named at its end."""
    text = " ".join(text.splitlines())
    hidden = {character for character in text if _is_hidden(character, False)}
    names = sorted(f"U+{ord(character):04X} ({unicodedata.name(character, 'a control character').lower()})" for character in hidden)
    return f"{visible(text)} It has invisible characters: {', '.join(names)}." if names else text


def show(text: object, error: bool = False) -> None:
    """Print a line or a table on stdout, or on stderr. Everything that scripts print goes through here."""
    print(visible(str(text), lines=True), file=sys.stderr if error else sys.stdout, flush=True)


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
