"""Datasets, captions, media and caches that cannot be used, met by the scripts: one sentence that names the culprit, status 2."""

from __future__ import annotations

import io
import os
import sys
import wave
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from bench import picture, refused

from dataset.media.pictures import IMAGE_EXTENSIONS
from utils.media.writing import save_video

LISTS = {
    "empty": ("", ["holds no lines"]),
    "UTF-16": ('{"image_path": "a.png"}'.encode("utf-16"), ["items.jsonl is not UTF-8"]),
    "one JSON list": ('[\n{"image_path": "a.png", "caption": "x"}\n]', ["items.jsonl:1", "one object a line"]),
    "Windows path": ('{"image_path": "C:\\train\\new.png", "caption": "x"}', ["items.jsonl:1", "control characters", "C:/folder"]),
    "path is a folder": ('{"image_path": "/", "caption": "x"}', ["items.jsonl:1", "path of a file"]),
    "path of an existing folder": ('{"image_path": "FOLDER", "caption": "x"}', ["items.jsonl:1", "is a folder"]),
    "half a character in a caption": ('{"image_path": "a.png", "caption": "\\ud800"}', ["items.jsonl:1", "surrogate pair"]),
    "half a character in a path": ('{"image_path": "\\ud800/a.png", "caption": "x"}', ["items.jsonl:1", "surrogate pair"]),
    "no caption": ('{"image_path": "a.png"}', ["1 item(s) have no caption", "a.png"]),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_pictures_that_cannot_be_read(bench, name):
    content, says = LISTS[name]
    if isinstance(content, str):
        (bench.folder / "pictures.png").mkdir()
        content = content.replace("FOLDER", (bench.folder / "pictures.png").as_posix())
    refused(bench.texts(bench.jsonl(content)), *says)


CAPTIONS = {
    "Latin-1": (b"caf\xe9", "a.txt is not UTF-8 text (byte 3)"),
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_caption_that_is_no_text(bench, name):
    toml = bench.media("image", a_png=picture())
    bench.write("media/a.txt", CAPTIONS[name][0])
    for script in (bench.texts, bench.latents):
        refused(script(toml), CAPTIONS[name][1], "Save it as UTF-8")


DATASETS = {
    "UTF-16": ("[general]".encode("utf-16"), ["not UTF-8"]),
    "nested without end": ("x = " + "[" * 50_000, ["not valid TOML"]),
    "a list of numbers": ("datasets = [1, 2]", ["[[datasets]]", "double brackets"]),
    "not a number": ("[[datasets]]\nimage_directory = '.'\nresolution = nan", ["resolution", "whole number"]),
    "training flags": ("[optimizer]\nlearning_rate = 1", ["unknown section 'optimizer'", "[[datasets]]"]),
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_config_that_cannot_be_read(bench, name):
    content, says = DATASETS[name]
    path = bench.write("bad.toml", content)
    refused(bench.train("--dataset_config", path), "bad.toml", *says)
    refused(bench.latents(path), "bad.toml", *says)


def sound() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))
    return buffer.getvalue()


def clip(folder: Path) -> bytes:
    save_video(folder / "clip.mp4", np.zeros((5, 32, 32, 3), np.uint8), 24)
    return (folder / "clip.mp4").read_bytes()


def huge_png() -> bytes:
    """A PNG whose header says 60000 x 60000."""
    whole = picture()
    chunk = b"IHDR" + (60000).to_bytes(4, "big") * 2 + whole[24:29]
    return whole[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + whole[33:]


MEDIA = {
    "picture cut": ("image", "a_png", lambda folder: picture()[:500], "a.png cannot be decoded"),
    "picture too large": ("image", "a_png", lambda folder: huge_png(), "a.png is too large to open safely"),
    "clip called a picture": ("image", "a_png", clip, "a.png cannot be decoded"),
    "video cut": ("video", "a_mp4", lambda folder: clip(folder)[:-200], "a.mp4 is cut short"),
    "sound called a video": ("video", "a_mp4", lambda folder: sound(), "a.mp4 holds no video stream"),
}


@pytest.mark.parametrize("name", MEDIA)
def test_media_that_cannot_be_read(bench, name):
    kind, file, content, says = MEDIA[name]
    ended = bench.latents(bench.media(kind, **{file: content(bench.folder)}))
    assert "1 failure(s):" in ended.stderr and says in ended.stderr
    refused(ended, "nothing to train on", "1 could not be cached")
    assert not list((bench.folder / "cache").glob("*")) if (bench.folder / "cache").exists() else True


def test_every_known_picture_ending_gives_a_sentence(bench):
    """No reader of any format lets an error of its own through."""
    toml = bench.media(
        "image", **{f"p{number}_{ending[1:]}": b"no picture" for number, ending in enumerate(sorted(IMAGE_EXTENSIONS))}
    )
    ended = bench.latents(toml)
    assert f"{len(IMAGE_EXTENSIONS)} failure(s):" in ended.stderr
    refused(ended, "nothing to train on")


def text_cache(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "llm_float32": torch.ones(32, 64),
        "llm_mask": torch.ones(32, dtype=torch.int64),
        "clipL_float32": torch.ones(48),
    } | tensors


LATENTS, TEXT = "a_0032x0032_hv.safetensors", "a_hv_te.safetensors"
KEY = "latents_1x4x4_float32"
CACHES = {
    "latents flat": (LATENTS, lambda t: t.update({KEY: torch.ones(16, 4, 4)}), ["(16, 4, 4)", "cache_latents.py"]),
    "latents empty": (LATENTS, lambda t: t.update({KEY: torch.ones(16, 0, 4, 4)}), ["(16, 0, 4, 4)"]),
    "latents infinite": (LATENTS, lambda t: t[KEY].view(-1)[3:4].fill_(-torch.inf), ["NaN or infinity", "cache_latents.py"]),
    "latents float8": (LATENTS, lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)}), ["float8_e4m3fn"]),
    "text without mask": (TEXT, lambda t: t.pop("llm_mask"), ["llm_mask of shape None", "cache_text_encoder_outputs.py"]),
    "text in a batch": (TEXT, lambda t: t.update(text_cache(llm_float32=torch.ones(1, 32, 64))), ["(1, 32, 64)", "(L, D)"]),
    "mask short": (TEXT, lambda t: t.update(text_cache(llm_mask=torch.ones(31))), ["shape (31,) for 32 rows"]),
    "text NaN": (TEXT, lambda t: t.update(text_cache(llm_float32=torch.full((32, 64), torch.nan))), ["NaN or infinity"]),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_cannot_be_trained_on(bench, name):
    file, change, says = CACHES[name]
    bench.spoil(file, change)
    refused(bench.train(), file, *says)


needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")


@needs_pipes
@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_pipe_among_media_is_a_failure_beside_the_others(bench, kind):
    files = {"image": ("a_png", picture()), "video": ("a_mp4", clip(bench.folder))}
    ending = files[kind][0][2:]
    toml = bench.media(kind, **dict([files[kind]]))
    bench.write("media/b.txt", "a caption")
    os.mkfifo(bench.folder / f"media/b.{ending}")
    ended = bench.latents(toml)
    assert ended.status == 1 and f"b.{ending} is a folder or a device" in ended.stderr
    assert [path.name[:2] for path in (bench.folder / "cache").iterdir()] == ["a_"]
    assert bench.texts(toml).status == 0


@needs_pipes
@pytest.mark.parametrize("name", ["media/a.txt", "items.jsonl", "media.toml"])
def test_a_pipe_does_not_make_caching_wait(bench, name):
    toml = bench.jsonl("") if name == "items.jsonl" else bench.media("image", a_png=picture())
    (bench.folder / name).unlink()
    os.mkfifo(bench.folder / name)
    for script in (bench.latents, bench.texts):
        refused(script(toml), bench.folder / name, "must be a file")


@needs_pipes
@pytest.mark.parametrize("ending", ["_0032x0032_hv.safetensors", "_hv_te.safetensors"])
def test_a_pipe_in_the_place_of_a_cache_file_is_replaced(bench, ending):
    toml = bench.media("image", a_png=picture())
    (bench.folder / "cache").mkdir()
    os.mkfifo(bench.folder / "cache" / f"a{ending}")
    for script in (bench.latents, bench.texts):
        assert script(toml, "--skip_existing").status == 0
        assert script(toml).status == 0
    assert (bench.folder / "cache" / f"a{ending}").is_file()


@pytest.mark.parametrize("damage", ["cut", "folder", "lost link", pytest.param("pipe", marks=needs_pipes)])
@pytest.mark.parametrize("file", [LATENTS, TEXT])
def test_a_cache_that_is_no_file(bench, file, damage):
    path = bench.folder / "pictures" / file
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "folder":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)
    elif sys.platform == "win32":
        pytest.skip("making links needs rights there")
    else:
        path.symlink_to(bench.folder / "moved away")
    says = {"cut": "cut short", "folder": "is a folder", "lost link": "does not exist", "pipe": "not a regular file"}
    refused(bench.train(), file, says[damage])
