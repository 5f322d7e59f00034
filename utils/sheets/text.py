"""Text in any script on a picture: wrapped, and in as many fonts as its characters need."""

from __future__ import annotations

import itertools
import logging
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from PIL import Image, features

from utils.errors import name_some
from utils.sheets.fonts import Face, Fonts

logger = logging.getLogger(__name__)

JOINER = "\u200d"
EMOJI_STYLE = "\ufe0f"
WIDE = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U0001f000-\U0003ffff]")  # a line may end beside them
NOT_FIRST = "、。，．：；！？」』）】〉》〕｝ー～…,.:;!?)]}"  # must not begin a line
_missing: set[str] = set()  # characters without a font; the first ones were logged


@cache
def shapes_text() -> bool:
    """Whether Pillow joins emoji and letters; else what joins them would be shown as boxes."""
    return features.check("raqm")


def clusters(text: str) -> list[str]:
    """``text`` in pieces that are shown as one: a character with its marks, emoji that are joined, the two letters of a flag."""
    found: list[str] = []
    for character in text:
        before = found[-1] if found else ""
        flag = is_flag_letter(character) and len(before) == 1 and is_flag_letter(before)
        joined = before.endswith(JOINER) and len(before) > 1
        if before and (flag or joined or continues(character)):
            found[-1] += character
        else:
            found.append(character)
    return found


def is_flag_letter(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def continues(character: str) -> bool:
    """Whether it is a part of the character before: marks, styles and joiners of emoji, tones of skin, tags of flags."""
    return (
        unicodedata.category(character) in ("Mn", "Mc", "Me")
        or character in (JOINER, "\u200c")
        or "\U0001f3fb" <= character <= "\U0001f3ff"
        or "\U000e0020" <= character <= "\U000e007f"
    )


def is_emoji(cluster: str) -> bool:
    return EMOJI_STYLE in cluster or cluster[0] >= "\U0001f000"


def with_glyphs(cluster: str) -> str:
    """Its characters that a font must have: without styles, joiners and tags."""
    return "".join(c for c in cluster if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f")


@dataclass(frozen=True)
class Lettering:
    """Text of a size in pixels."""

    fonts: Fonts

    @classmethod
    @cache
    def of_size(cls, size: int) -> Lettering:
        return cls(Fonts(size))

    @property
    def line_height(self) -> int:
        """Pixels from a line to the next."""
        return round(1.5 * self.fonts.size)

    def readable(self, text: str) -> str:
        """``text`` with every character that no font has as its code point, such as <U+1F600>; the first time, that is logged."""
        missing: list[str] = []
        shown = "".join(self._readable(cluster, missing) for cluster in clusters(text))
        if missing and not _missing:
            logger.warning(
                "no font of this system has %s: contact sheets show such characters by their code points. "
                "Install fonts for them, Noto Sans CJK and Noto Color Emoji for example.",
                name_some(dict.fromkeys(missing)),
            )
        _missing.update(missing)
        return shown

    def _readable(self, cluster: str, missing: list[str]) -> str:
        if cluster.isspace():
            return cluster if cluster == "\n" else " "
        if (shown := with_glyphs(cluster)) and self.fonts.face(shown, is_emoji(cluster)):
            return cluster if shapes_text() else shown
        if len(shown) > 1:
            return "".join(self._readable(character, missing) for character in shown)
        code = "".join(f"<U+{ord(character):04X}>" for character in shown or cluster)
        missing.append(code)
        return code

    def runs(self, text: str) -> Iterator[tuple[Face, str]]:
        """Parts of a line that are written in one font; ``text`` is readable."""
        face = self.fonts.first
        chosen = []
        for cluster in clusters(text):
            if not cluster.isspace():
                face = self.fonts.face(with_glyphs(cluster), is_emoji(cluster)) or self.fonts.first
            elif face.emoji:  # whose blanks are as wide as emoji
                face = self.fonts.first
            chosen.append((face, cluster))
        for face, group in itertools.groupby(chosen, key=lambda pair: pair[0]):
            yield face, "".join(cluster for _, cluster in group)

    def length(self, text: str) -> float:
        """Pixels that a line of readable text takes."""
        return sum(face.length(part) for face, part in self.runs(text))

    def wrapped(self, text: str, width: int) -> list[str]:
        """Readable lines of at most ``width`` pixels, broken between words where that is possible; nothing is left out."""
        return [line for paragraph in self.readable(text).split("\n") for line in self._lines(paragraph, width)]

    def _lines(self, paragraph: str, width: int) -> Iterator[str]:
        line = ""
        for piece in pieces(paragraph):
            for part in self._parts(piece, width):
                if line and self.length((line + part).rstrip()) > width:
                    yield line.rstrip()
                    line = ""
                line += part if line else part.lstrip()
        yield line.rstrip()

    def _parts(self, piece: str, width: int) -> Iterator[str]:
        """A piece, or parts of one that takes more than a line."""
        part = ""
        for cluster in clusters(piece):
            if part and self.length((part + cluster).rstrip()) > width:
                yield part
                part = ""
            part += cluster
        yield part

    def write(self, picture: Image.Image, left: float, top: float, line: str, colour: str) -> None:
        """Write one readable line, whose upper edge is ``top``, on an RGB picture."""
        for face, part in self.runs(line):
            face.draw(picture, left, top + round(1.1 * self.fonts.size), part, colour)
            left += face.length(part)


def pieces(paragraph: str) -> list[str]:
    """What may stand alone on a line, with the blanks behind it: words, and single characters of scripts without blanks."""
    found: list[str] = []
    before = " "
    for cluster in clusters(paragraph):
        wide = WIDE.match(cluster[0]) or WIDE.match(before[0]) or cluster == "<"  # with which code points begin
        if not found or (not cluster.isspace() and cluster not in NOT_FIRST and (before.isspace() or wide)):
            found.append("")
        found[-1] += cluster
        before = cluster
    return found
