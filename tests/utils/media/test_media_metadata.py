"""utils.media.metadata: what is written into each kind of file comes back, and files of others are named."""

import json
import subprocess
from pathlib import Path
from shutil import which

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from utils.errors import UserError
from utils.media.metadata import read_media_metadata
from utils.media.writing import save_animation, save_picture, save_video
from utils.safetensors_io import save_tensors

METADATA = {
    "prompt": 'a "red" ball; seed: 3,\nback\\slash = \ttab, 日本語, \U0001f600, ' + "long " * 20_000,
    "seed": "7",
    "infer_steps": "3",
    "settings": json.dumps({"flags": {"prompt": "q\"'\n€"}}, ensure_ascii=False),
}
FRAMES = np.random.default_rng(0).integers(0, 256, (4, 32, 48, 3), np.uint8)
KINDS = ("png", "mp4", "webp", "gif", "safetensors")


def write(folder: Path, kind: str, metadata: dict[str, str] | None = METADATA, count: int = 4) -> Path:
    path = folder / f"clip.{kind}"
    if kind == "png":
        save_picture(path, FRAMES[0], metadata)
    elif kind == "mp4":
        save_video(path, FRAMES[:count], 24, metadata)
    elif kind == "safetensors":
        save_tensors(path, {"latent": torch.zeros(1)}, metadata)
    else:
        save_animation(path, FRAMES[:count], 24, metadata)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 4])
def test_every_kind_of_file_gives_back_what_was_written(tmp_path, kind, count):
    assert read_media_metadata(write(tmp_path, kind, count=count), "--show") == METADATA


@pytest.mark.skipif(which("ffprobe") is None, reason="needs ffprobe")
def test_ffprobe_reads_the_tags_of_a_video(tmp_path):
    command = ["ffprobe", "-v", "error", "-print_format", "json", "-show_format", str(write(tmp_path, "mp4"))]
    tags = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)["format"]["tags"]
    assert json.loads(tags["description"]) == METADATA
    assert "; seed: 7; infer_steps: 3" in tags["comment"] and "flags" not in tags["comment"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_without_metadata_are_named(tmp_path, kind):
    with pytest.raises(UserError, match="holds no metadata"):
        read_media_metadata(write(tmp_path, kind, None), "--show")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_one_sentence_or_what_it_still_holds(tmp_path, kind):
    path = write(tmp_path, kind, {**METADATA, "prompt": "short"})
    whole = path.read_bytes()
    noise = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole[: noise.integers(0, len(whole))] if noise.random() < 0.5 else whole)
        for place in noise.integers(0, max(len(data), 1), 4):
            data[place : place + 1] = noise.bytes(1)
        path.write_bytes(data)
        try:
            assert read_media_metadata(path, "--show").keys() & {"prompt", "settings"}
        except UserError as error:
            assert "--show" in str(error) or str(path) in str(error)


def png_with(path: Path, **text: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    Image.fromarray(FRAMES[0]).save(path, pnginfo=info)
    return path


A1111 = "a cat\nNegative prompt: bad\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512"
COMFY = json.dumps({"3": {"class_type": "KSampler", "inputs": {"seed": 1}}})


def test_pictures_of_other_tools_are_named(tmp_path):
    for text, tool in (
        ({"parameters": A1111}, "AUTOMATIC1111"),
        ({"prompt": COMFY, "workflow": "{}"}, "ComfyUI"),
        ({"prompt": COMFY}, "ComfyUI"),
        ({"Title": "a holiday"}, "Title"),
    ):
        with pytest.raises(UserError, match=f"metadata of another tool.*{tool}"):
            read_media_metadata(png_with(tmp_path / "x.png", **text), "--show")


def test_webp_of_other_tools_is_named(tmp_path):
    theirs, picture = Image.Exif(), Image.fromarray(FRAMES[0])
    theirs.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.encode("utf-16-be")
    picture.save(tmp_path / "a.webp", exif=theirs)
    theirs = Image.Exif()
    theirs[0x010F], theirs[0x0110] = "workflow:{}", f"prompt:{COMFY}"
    picture.save(tmp_path / "b.webp", exif=theirs)
    for name, tool in (("a.webp", "AUTOMATIC1111"), ("b.webp", "ComfyUI")):
        with pytest.raises(UserError, match=f"metadata of another tool.*{tool}"):
            read_media_metadata(tmp_path / name, "--show")


def test_what_is_no_result_is_named(tmp_path):
    save_tensors(tmp_path / "lora.safetensors", {"x": torch.zeros(1)}, {"ss_network_dim": "4"})
    (tmp_path / "a.txt").write_text("hello")
    for name, says in (("lora.safetensors", "trained model"), ("a.txt", "a.txt"), ("gone.png", "gone.png"), (".", "00000.png")):
        with pytest.raises(UserError, match=says):
            read_media_metadata(tmp_path / name, "--show")
