"""utils.sheets: text in any script, and grids of pictures and clips. Every test works with whatever fonts the system has."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.sheets import fonts, text
from utils.sheets.contact_sheet import Cell, ContactSheet, cell_side, reduced
from utils.sheets.fonts import Fonts, font_folders, fonts_in
from utils.sheets.text import Lettering, clusters, pieces

JAPANESE = "夜の街を歩く猫、雨に濡れた道路。カメラは（ゆっくりと）下がる"
EMOJI = "a cat 🐱, a family 👩‍👩‍👧, a wave 👋🏽 and a flag 🇯🇵"
LONG = "a slow shot of a fisherman who repairs a red net on a wooden pier at dawn, " * 2 + "hyper" * 30
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255), (0, 200, 200), (200, 200, 0))


@pytest.fixture
def letters() -> Lettering:
    return Lettering(Fonts(16))


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> Lettering:
    """A system without fonts: there is only Pillow's own, which has no more than letters of Latin."""
    monkeypatch.setattr(fonts, "system_fonts", lambda: ())
    monkeypatch.setattr(text, "_missing", set())
    return Lettering(Fonts(16))


def solid(colour: tuple[int, int, int], height: int = 32, width: int = 48, length: int = 1) -> np.ndarray:
    return np.full((length, height, width, 3), colour, np.uint8)


def box(picture: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of the rectangle of exactly this colour."""
    rows, columns = np.nonzero((picture == colour).all(-1))
    top, left, height, width = rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1
    assert len(rows) == height * width, "it is not one whole rectangle"
    return top, left, height, width


# ---------------------------------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize("words", [JAPANESE, EMOJI, LONG, "one\ntwo\n\nfour", ""])
@pytest.mark.parametrize("width", [60, 200])
def test_lines_fit_and_nothing_is_left_out(letters: Lettering, words: str, width: int) -> None:
    lines = letters.wrapped(words, width)
    assert all(letters.length(line) <= width or len(clusters(line)) == 1 for line in lines)
    assert "".join("".join(lines).split()) == "".join(letters.readable(words).split())
    assert len(lines) > words.count("\n")


def test_what_is_shown_as_one_is_not_taken_apart() -> None:
    assert clusters("e\u0301a 👩‍👩‍👧👋🏽❤️🇯🇵🇫🇷") == ["e\u0301", "a", " ", "👩‍👩‍👧", "👋🏽", "❤️", "🇯🇵", "🇫🇷"]
    assert pieces("two  words, 猫。 犬") == ["two  ", "words, ", "猫。 ", "犬"]


def test_every_character_that_is_written_has_a_font(letters: Lettering) -> None:
    for words in (JAPANESE, EMOJI, "ሴ ก ع 한 \U0001f9ff \U000f1234 \x07"):
        for face, part in letters.runs(letters.readable(words)):
            shown = [character for character in text.with_glyphs(part) if not character.isspace()]
            assert all(face.has(character) for character in shown), part


def test_a_character_that_no_font_has_is_its_code_point_and_said_once(no_fonts: Lettering, caplog) -> None:
    assert no_fonts.readable("cat 猫 \U0001f431\u200d\U0001f431 \x07猫") == "cat <U+732B> <U+1F431><U+1F431> <U+0007><U+732B>"
    no_fonts.readable("犬")
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "no font of this system has <U+732B>, <U+1F431>, <U+0007>"
    ]


def test_without_shaping_nothing_that_joins_is_written(monkeypatch: pytest.MonkeyPatch, letters: Lettering) -> None:
    monkeypatch.setattr(text, "shapes_text", lambda: False)
    assert "\u200d" not in letters.readable(EMOJI) and "\ufe0f" not in letters.readable("❤️")


def test_text_is_drawn_where_it_is_measured(letters: Lettering) -> None:
    for words in ("dog", JAPANESE, EMOJI):
        line = letters.readable(words)
        picture = Image.new("RGB", (2000, 60), "white")
        letters.write(picture, 20, 10, line, "#202020")
        drawn = np.asarray(picture).min(-1) < 200
        columns, rows = np.nonzero(drawn.any(0))[0], np.nonzero(drawn.any(1))[0]
        assert abs(columns.min() - 20) <= 4 and abs(columns.max() - 20 - letters.length(line)) <= 8
        assert rows.min() >= 10 and rows.max() <= 10 + letters.line_height


def test_without_fontconfig_the_folders_of_the_system_are_searched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("fc-match")

    for name in ("sub/zebra.ttf", "DejaVuSans.ttf", "sub/NotoColorEmoji.ttf", "LastResort.otf", "readme.txt", "msgothic.TTC"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.setattr(fonts, "font_folders", lambda: [tmp_path, tmp_path / "gone"])
    found = [path.name for path, _ in fonts.system_fonts.__wrapped__()]
    assert found == ["DejaVuSans.ttf", "msgothic.TTC", "zebra.ttf", "NotoColorEmoji.ttf"]
    monkeypatch.setattr(fonts, "system_fonts", lambda: tuple((path, 0) for path in fonts_in([tmp_path])))
    assert Fonts(16).face("a") is not None  # files that are no fonts are passed over


def test_each_system_has_its_folders() -> None:
    windows = font_folders("win32", {"WINDIR": "W:", "USERPROFILE": "home"})
    assert windows[0] == Path("W:") / "Fonts" and "AppData" in str(windows[1])
    assert Path("/System/Library/Fonts") in font_folders("darwin", {"HOME": "/home/me"})
    assert Path("/home/me/.fonts") in font_folders("linux", {"HOME": "/home/me"})


# ---------------------------------------------------------------------------------------------------------------------
# Sheets


@pytest.mark.parametrize(("columns", "rows"), [(2, 2), pytest.param(6, 5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("label", ["seed 5", JAPANESE, EMOJI, LONG])
def test_cells_are_aligned_and_labels_stand_beside_them(columns: int, rows: int, label: str) -> None:
    side = 96
    cells = [[Cell(solid((40 * x, 40 * y, 99)), label) for x in range(columns)] for y in range(rows)]
    heads, labels = [f"{number} {label}" for number in range(columns)], [f"{label} {number}" for number in range(rows)]
    picture = ContactSheet(cells, side, heads, labels, label).picture()
    boxes = [[box(picture, (40 * x, 40 * y, 99)) for x in range(columns)] for y in range(rows)]
    assert {found[2:] for row in boxes for found in row} == {(64, 96)}, "32 x 48 pixels twice as large"
    assert all(len({found[0] for found in row}) == 1 for row in boxes)
    assert all(len({found[1] for found in column}) == 1 for column in zip(*boxes))
    inked = (picture != 255).any(-1)
    assert not (inked[:3].any() or inked[-3:].any() or inked[:, :3].any() or inked[:, -3:].any()), "something touches the edge"
    for number in range(columns):  # a label changes nothing but its own place
        other = ContactSheet(cells, side, [*heads[:number], "", *heads[number + 1 :]], labels, label).picture()
        if other.shape == picture.shape:
            changed = np.argwhere((other != picture).any(-1))
            top, left, _, width = boxes[0][number]
            assert len(changed) and changed[:, 0].max() < top and left - 64 <= changed[:, 1].min()
            assert changed[:, 1].max() <= left + width + 64
    for number in range(rows):
        other = ContactSheet(cells, side, heads, [*labels[:number], labels[number] + ".", *labels[number + 1 :]], label).picture()
        if other.shape == picture.shape:
            changed = np.argwhere((other != picture).any(-1))
            assert len(changed) and changed[:, 1].max() < boxes[number][0][1]
            assert boxes[number][0][0] <= changed[:, 0].min()
            assert number + 1 == rows or changed[:, 0].max() < boxes[number + 1][0][0]


def test_pictures_of_any_size_share_a_grid(tmp_path: Path) -> None:
    sizes = [(32, 32), (300, 200), (64, 20), (96, 96)]
    cells = [Cell(solid(colour, *size)) for colour, size in zip(COLOURS, sizes)]
    picture = ContactSheet([cells[:3], cells[3:]], 96).picture()
    found = [box(picture, colour) for colour in COLOURS[:4]]
    assert [each[2:] for each in found] == [(96, 96), (96, 64), (64, 20), (96, 96)]
    assert found[2][0] == found[0][0] + 16, "in the middle of its place"
    assert found[3][1] == found[0][1]


def test_a_failed_cell_is_empty_in_a_red_frame() -> None:
    good, bad = Cell(solid((0, 0, 255))), Cell(None, "out of memory", failed=True)
    picture = ContactSheet([[good, bad]], 96).picture()
    assert (picture == (0xE8, 0xE8, 0xE8)).all(-1).sum() in range(64 * 96, 64 * 96 + 50) and (picture == (0xD0, 0, 0)).all(-1).any()
    assert ContactSheet([[bad]], 96).picture().shape[0] > 96


def test_clips_run_in_step_and_hold_their_last_frame() -> None:
    clips = [np.concatenate([solid(colour) for colour in COLOURS[:length]]) for length in (5, 1, 3)]
    sheet = ContactSheet([[Cell(clip, "caption") for clip in clips]], 49)
    frames = list(sheet.clip())
    assert sheet.length == len(frames) == 5 and frames[0].shape[0] % 2 == frames[0].shape[1] % 2 == 0
    corners = [box(frames[3], COLOURS[number])[:2] for number in (3, 0, 2)]
    steps = [tuple(COLOURS.index(tuple(frame[corner])) for corner in corners) for frame in frames]
    assert steps == [(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 0, 2), (4, 0, 2)]
    assert np.array_equal(sheet.picture()[corners[0]], COLOURS[2])


def test_large_frames_are_reduced_and_small_ones_kept() -> None:
    large = solid((9, 90, 200), 720, 1280, length=2)
    assert reduced(large, 320).shape == (2, 180, 320, 3) and (reduced(large, 320) == (9, 90, 200)).all()
    assert reduced(large, 1280) is large
    assert [cell_side(columns) for columns in (1, 6, 40)] == [512, 400, 160]
