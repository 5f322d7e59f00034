"""Listing items: folders, JSONL files, captions, and names that would collide."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from pathlib import Path

import pytest

from dataset.cache.names import latent_cache_path
from dataset.config import DatasetConfig
from dataset.items import FILE_NAME_BYTES, LONGEST_CACHE_SUFFIX, Item, list_items, settle_captions, unread_files
from utils.errors import UserError


def folder_dataset(directory: Path, kind: str = "image", caption_extension: str = ".txt") -> DatasetConfig:
    return DatasetConfig(0, kind, directory, None, directory / "cache", caption_extension=caption_extension)


def jsonl_dataset(file: Path, kind: str = "image") -> DatasetConfig:
    return DatasetConfig(0, kind, None, file, file.parent / "cache")


def write_jsonl(folder: Path, *lines: str, encoding: str = "utf-8") -> Path:
    file = folder / "items.jsonl"
    file.write_bytes("\n".join(lines).encode(encoding))
    return file


def test_folder_gives_media_of_its_kind_sorted_with_captions(tmp_path):
    for name in ("b.two.PNG", "a one.jpg", "clip.mp4", "notes.md", ".hidden.png", "猫_x.webp"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "a one.txt").write_text("  a caption\n", encoding="utf-8")
    (tmp_path / "b.two.txt").write_bytes("\ufeffпривет\r\n".encode())
    items = list_items(folder_dataset(tmp_path))
    assert [(item.path.name, item.stem, item.caption) for item in items] == [
        ("a one.jpg", "a one", "a caption"),
        ("b.two.PNG", "b.two", "привет"),
        ("猫_x.webp", "猫_x", None),
    ]
    assert [item.stem for item in list_items(folder_dataset(tmp_path, kind="video"))] == ["clip", "猫_x"]


def test_caption_extension_is_the_one_asked_for(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").write_text("wrong", encoding="utf-8")
    (tmp_path / "a.caption").write_text("right", encoding="utf-8")
    assert list_items(folder_dataset(tmp_path, caption_extension=".caption"))[0].caption == "right"


@pytest.mark.parametrize(
    ("picture", "caption"),
    [
        (unicodedata.normalize("NFC", "Zoë.png"), unicodedata.normalize("NFD", "Zoë.txt")),
        (unicodedata.normalize("NFD", "Zoë.png"), unicodedata.normalize("NFC", "Zoë.txt")),
        ("a.PNG", "a.TXT"),
        ("a.png", "a.png.txt"),
        ("photo.jfif", "photo.txt"),
        ("photo.heic", "photo.txt"),
    ],
)
def test_captions_are_found_by_what_people_see(tmp_path, picture, caption):
    (tmp_path / picture).touch()
    (tmp_path / caption).write_text("found", encoding="utf-8")
    assert [item.caption for item in list_items(folder_dataset(tmp_path))] == ["found"]
    assert unread_files(folder_dataset(tmp_path)) == []


def test_captioned_files_that_are_not_read_are_named(tmp_path):
    for name in ("a.png", "a.npz", "b.psd", "c.mp4", "d.psd", "a.txt", "b.txt", "c.TXT"):
        (tmp_path / name).touch()
    assert unread_files(folder_dataset(tmp_path)) == ["b.psd", "c.mp4"]


def test_paths_of_a_jsonl_may_begin_at_home_or_be_urls(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a b.png").touch()
    lines = (json.dumps({"image_path": path, "caption": ""}) for path in ("~/a b.png", (tmp_path / "a c.png").as_uri(), "~$d.png"))
    items = list_items(jsonl_dataset(write_jsonl(tmp_path, *lines)))
    assert [item.path for item in items] == [tmp_path / "a b.png", tmp_path / "a c.png", Path("~$d.png")]


def test_caption_that_is_not_utf8_names_its_file(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8"):
        list_items(folder_dataset(tmp_path))


def test_missing_captions_are_named_but_an_empty_one_is_a_caption(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.png").touch()
    (tmp_path / "0.txt").write_text("", encoding="utf-8")
    items = list_items(folder_dataset(tmp_path))
    assert items[0].caption == ""
    with pytest.raises(UserError, match="7 item") as raised:
        settle_captions(items, "error")
    assert all(f"{number}.png" in str(raised.value) for number in (1, 2, 3, 4, 5))
    assert "0.png" not in str(raised.value) and "and 2 more" in str(raised.value)
    assert settle_captions(items[:1], "error") == items[:1]
    assert settle_captions(items, "skip") == items[:1]
    assert [item.caption for item in settle_captions(items, "empty")] == [""] * 8


def test_two_files_with_one_stem_are_named(tmp_path):
    (tmp_path / "same.png").touch()
    (tmp_path / "same.jpg").touch()
    with pytest.raises(UserError, match=r"same\.jpg and .*same\.png would share"):
        list_items(folder_dataset(tmp_path))


def test_jsonl_keeps_order_and_accepts_blank_lines_bom_and_line_separators(tmp_path, monkeypatch):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "b.png").touch()
    monkeypatch.chdir(tmp_path)
    file = write_jsonl(
        tmp_path,
        json.dumps({"image_path": "media/b.png", "caption": " two\u2028lines "}, ensure_ascii=False),
        "",
        json.dumps({"image_path": str(tmp_path / "a_1.v2.png"), "caption": "x", "extra": 1}) + "\r",
        encoding="utf-8-sig",
    )
    assert [(item.path, item.stem, item.caption) for item in list_items(jsonl_dataset(file))] == [
        (Path("media/b.png"), "b", "two\u2028lines"),
        (tmp_path / "a_1.v2.png", "a_1.v2", "x"),
    ]


def test_jsonl_paths_are_also_looked_for_beside_the_file(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").touch()
    monkeypatch.chdir(tmp_path)
    file = write_jsonl(tmp_path / "set", '{"image_path": "a.png", "caption": "x"}')
    assert list_items(jsonl_dataset(file))[0].path == tmp_path / "set" / "a.png"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1, 2]", r"holds \[1, 2\], not an object"),
        ('{"video_path": "a.mp4", "caption": "x"}', "has no 'image_path' .it has 'video_path', 'caption'"),
        ('{"image_path": 7}', "must be the path of a file, not 7"),
        ('{"image_path": "a.png", "caption": ["x"]}', "'caption' must be text"),
        ('{"image_path": "a\\tb.png"}', "control characters"),
    ],
)
def test_malformed_jsonl_line_is_named(tmp_path, line, sentence):
    file = write_jsonl(tmp_path, '{"image_path": "ok.png", "caption": "ok"}', "", line)
    with pytest.raises(UserError, match=sentence) as raised:
        list_items(jsonl_dataset(file))
    assert f"{file}:3" in str(raised.value)


def test_jsonl_without_caption_is_a_missing_caption(tmp_path):
    items = list_items(jsonl_dataset(write_jsonl(tmp_path, '{"video_path": "a.mp4"}'), kind="video"))
    assert items[0].caption is None
    with pytest.raises(UserError, match=r'give each line of .*items\.jsonl a "caption"'):
        settle_captions(items, "error")


def test_name_too_long_for_its_cache_files_is_refused(tmp_path):
    longest = FILE_NAME_BYTES - len(LONGEST_CACHE_SUFFIX)
    fits = "犬" * (longest // 3) + "x" * (longest % 3)
    file = write_jsonl(tmp_path, json.dumps({"image_path": f"{fits}.png"}))
    assert list_items(jsonl_dataset(file))[0].stem == fits
    file = write_jsonl(tmp_path, json.dumps({"image_path": f"{fits}y.png"}))
    with pytest.raises(UserError, match=f"{fits}y.png is too long for its cache files: {longest + 1} bytes"):
        list_items(jsonl_dataset(file))
    item = Item(jsonl_dataset(file, "video"), tmp_path / "x.ext", None, "")
    assert len(latent_cache_path(item, (65535, 65535), (999999, 9997)).name) == len(LONGEST_CACHE_SUFFIX)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_name_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).touch()
    with pytest.raises(UserError, match=r"caf\\udce9\.png' is not UTF-8.*rename it"):
        list_items(folder_dataset(tmp_path))
