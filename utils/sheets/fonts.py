"""The fonts of the system, and which of them has a character."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ENDINGS = frozenset({".ttf", ".otf", ".ttc", ".otc"})
NO_CHARACTER = "\U0010ffff"  # which no font has: what is shown for it stands for a missing character
PICTURE_SIZES = (109, 160, 136, 128, 96, 64)  # of fonts that hold pictures instead of outlines
EMOJI_NAME = re.compile("emoji|emj", re.IGNORECASE)
SECONDS = 10  # that fontconfig may take; the first call after an installation reads all fonts

# Regular fonts that come with systems, the ones with most characters first; others follow by name.
PREFERRED = (
    *("NotoSans-Regular", "DejaVuSans", "LiberationSans-Regular", "segoeui", "arial", "Helvetica", "Arial"),
    *("NotoSansCJK-Regular", "NotoSansJP-Regular", "YuGothM", "meiryo", "msgothic", "ヒラギノ角ゴシック W3", "msyh", "malgun"),
    *("Hiragino Sans GB", "AppleSDGothicNeo", "Arial Unicode", "seguisym", "Apple Symbols"),
)
UNUSABLE = re.compile("LastResort|AdobeBlank", re.IGNORECASE)  # these have a box for every character


def font_folders(platform: str = sys.platform, environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Where fonts lie."""
    home = Path(environment.get("USERPROFILE" if platform == "win32" else "HOME", "."))
    if platform == "win32":
        return [Path(environment.get("WINDIR", r"C:\Windows"), "Fonts"), home / "AppData/Local/Microsoft/Windows/Fonts"]
    if platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    return [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".local/share/fonts", home / ".fonts"]


def fonts_in(folders: list[Path]) -> list[Path]:
    """Every font file in ``folders`` and the folders in them, in the order in which to look for a character."""
    found = [Path(root, name) for folder in folders for root, _, names in os.walk(folder) for name in names]
    rank = {name: number for number, name in enumerate(PREFERRED)}
    fonts = [path for path in found if path.suffix.lower() in ENDINGS]
    return sorted(fonts, key=lambda path: (rank.get(path.stem, len(rank)), path.name))


def fonts_of_fontconfig() -> list[tuple[Path, int]]:
    """Files and numbers of the faces in them in the order of the user's settings; none where there is no fontconfig."""
    command = ["fc-match", "-s", "--format", "%{file}|%{index}\n", "sans-serif"]
    try:
        listed = subprocess.run(command, capture_output=True, timeout=SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    pairs = [line.rpartition("|") for line in os.fsdecode(listed).splitlines()]
    return [(Path(file), int(index) & 0xFFFF) for file, _, index in pairs if Path(file).suffix.lower() in ENDINGS]


@cache
def system_fonts() -> tuple[tuple[Path, int], ...]:
    """Files and numbers of the faces in them, in the order in which to look for a character; emoji in colour are the last."""
    fonts = fonts_of_fontconfig() or [(path, 0) for path in fonts_in(font_folders())]
    return tuple(sorted((font for font in fonts if not UNUSABLE.search(font[0].name)), key=lambda font: is_emoji_font(font[0])))


def is_emoji_font(path: Path) -> bool:
    return EMOJI_NAME.search(path.name) is not None


@dataclass(frozen=True, eq=False)
class Face:
    """A font at a size.

    Attributes:
        scale: of what it draws; not 1 for fonts that have pictures of one size.
    """

    font: ImageFont.FreeTypeFont
    scale: float = 1.0
    emoji: bool = False

    @cached_property
    def _missing(self) -> tuple[tuple[int, int], bytes]:
        return self._shape(NO_CHARACTER)

    def _shape(self, character: str) -> tuple[tuple[int, int], bytes]:
        mask = self.font.getmask(character, mode="L")
        return mask.size, bytes(mask)

    def has(self, character: str) -> bool:
        """Whether the font shows ``character``."""
        return self._shape(character) != self._missing

    def length(self, text: str) -> float:
        """Pixels that ``text`` takes on a line."""
        return self.font.getlength(text) * self.scale

    def draw(self, picture: Image.Image, left: float, baseline: float, text: str, colour: str) -> None:
        """Write ``text`` on an RGB picture, in the font's own colours where it has some."""
        if self.scale == 1:
            ImageDraw.Draw(picture).text((left, baseline), text, fill=colour, font=self.font, anchor="ls", embedded_color=True)
            return
        ascent, descent = self.font.getmetrics()
        size = (int(self.font.getlength(text)) + 1, ascent + descent)
        drawn = Image.new("RGBA", size, (255, 255, 255, 0))
        ImageDraw.Draw(drawn).text((0, ascent), text, fill=colour, font=self.font, anchor="ls", embedded_color=True)
        drawn = drawn.resize((max(1, round(size[0] * self.scale)), max(1, round(size[1] * self.scale))), Image.Resampling.LANCZOS)
        picture.paste(drawn, (round(left), round(baseline - ascent * self.scale)), drawn)


def open_face(path: Path, index: int, size: int) -> Face | None:
    """None for a file that Pillow cannot read."""
    for stored in (size, *PICTURE_SIZES):
        with suppress(OSError, ValueError):
            return Face(ImageFont.truetype(str(path), stored, index=index), size / stored, is_emoji_font(path))
    return None


class Fonts:
    """The fonts of the system at a size in pixels, opened when a character is looked for; the last one comes with Pillow."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._opened: list[Face] = []
        self._rest = self._open_all()
        self._found: dict[tuple[str, bool], Face | None] = {}

    def _open_all(self) -> Iterator[Face]:
        opened = (open_face(path, index, self.size) for path, index in system_fonts())
        yield from (face for face in opened if face is not None)
        yield Face(ImageFont.load_default(self.size))

    def _faces(self) -> Iterator[Face]:
        yield from self._opened
        for face in self._rest:
            self._opened.append(face)
            yield face

    @property
    def first(self) -> Face:
        """The font of ordinary text."""
        return next(self._faces())

    def face(self, characters: str, in_colour: bool = False) -> Face | None:
        """The first font that has all ``characters``, with ``in_colour`` an emoji font where one does; None without any."""
        key = characters, in_colour
        if key not in self._found:
            having = (face for face in self._faces() if all(map(face.has, characters)))
            found = next((face for face in having if face.emoji), None) if in_colour else next(having, None)
            self._found[key] = self.face(characters) if in_colour and found is None else found
        return self._found[key]
