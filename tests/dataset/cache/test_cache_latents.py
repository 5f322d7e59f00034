"""cache_latents.py as a user runs it: what it writes, skips, refuses and reports."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cache_latents
import hunyuan_model
from dataset.cache.debug_view import SHADES
from dataset.cache.files import read_latent_header, read_latents
from dataset.cache.latents import LatentEncoder
from dataset.media.decoding import iterate_frames, probe_video
from dataset.media.resizing import fit_to_bucket
from hunyuan_model.vae.model import AutoencoderKLCausal3D, VAEConfig
from utils.errors import run_script
from utils.safetensors_io import read_header, save_tensors


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    """A VAE with random weights, narrow enough that encoding costs nothing."""
    folder = tmp_path_factory.mktemp("vae")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLCausal3D(VAEConfig(block_out_channels=(4, 8, 8, 8), layers_per_block=1, norm_num_groups=4))
    save_tensors(folder / "vae.safetensors", vae.state_dict())
    entries = {"block_out_channels": [4, 8, 8, 8], "layers_per_block": 1, "latent_channels": 16, "norm_num_groups": 4}
    (folder / "config.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.fixture
def run(monkeypatch, vae_folder):
    """Run the script in this process with that VAE; returns its status."""

    def call(*arguments: object, vae: Path | None = vae_folder) -> int:
        flags = ["--num_workers", "2", "--device", "cpu", *(["--vae", vae] if vae else []), *arguments]
        monkeypatch.setattr(sys, "argv", ["cache_latents.py", *map(str, flags)])
        with pytest.raises(SystemExit) as left:
            run_script(cache_latents.main)
        return left.value.code

    return call


def write_dataset(folder: Path, source: str, **values: object) -> Path:
    """A TOML with one dataset over ``folder/source``; the caches go to ``folder/cache``."""
    (folder / source).mkdir(exist_ok=True)
    kind = "video" if source == "clips" else "image"
    entries = {
        "resolution": 64,
        f"{kind}_directory": (folder / source).as_posix(),
        "cache_directory": (folder / "cache").as_posix(),
    }
    lines = (
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}" for key, value in (entries | values).items()
    )
    toml = folder / "dataset.toml"
    toml.write_text("[[datasets]]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return toml


@pytest.fixture
def pictures(tiny_dataset, tmp_path) -> Path:
    """A TOML over the six drawn pictures."""
    shutil.copytree(tiny_dataset.parent / "images", tmp_path / "images", ignore=shutil.ignore_patterns("*.safetensors"))
    return write_dataset(tmp_path, "images", enable_bucket=True, batch_size=4)


@pytest.fixture
def clips(tiny_dataset, tmp_path) -> Path:
    """A TOML over the two drawn clips, of 25 frames (96x64) and 13 frames (64x64)."""
    shutil.copytree(tiny_dataset.parent / "clips", tmp_path / "clips", ignore=shutil.ignore_patterns("*.safetensors"))
    return write_dataset(tmp_path, "clips", enable_bucket=True, target_frames=[1, 9])


def caches(folder: Path) -> dict[str, torch.Tensor]:
    return {path.name: read_latents(path) for path in sorted(folder.glob("*.safetensors"))}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def test_caches_of_pictures_and_clips(run, tiny_dataset, capsys):
    assert run("--dataset_config", tiny_dataset) == 0
    names = [path.name for path in sorted(tiny_dataset.parent.rglob("*_hv.safetensors"))]
    assert len(names) == 6 + 2 * 2
    assert "orange_circle_0128x0072_hv.safetensors" in names
    assert "red_circle_moving_00000-009_0096x0064_hv.safetensors" in names
    path = next(tiny_dataset.parent.rglob("red_circle_moving_00000-009*"))
    assert read_latent_header(path)[0] == (16, 3, 48 // 8, 80 // 8)  # the bucket of 96x64 in an area of 64x64
    assert read_header(path).metadata["frame_count"] == "9"
    table = capsys.readouterr().out
    assert re.search(r"1 \(images\) +6 +0 +6 +0 +0 +6 ", table)
    assert re.search(r"2 \(videos\) +2 +0 +2 +0 +0 +4 ", table)


def test_cache_holds_one_sample_of_the_posterior_unscaled(run, pictures, tmp_path, vae_folder):
    assert run("--dataset_config", pictures) == 0
    cached = read_latents(tmp_path / "cache" / "green_triangle_0064x0064_hv.safetensors")
    image = np.array(Image.open(tmp_path / "images" / "green_triangle.png").convert("RGB"))  # has the size of its bucket
    vae = hunyuan_model.load_vae(vae_folder, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(image).permute(2, 0, 1)[None, :, None].float() / 255 * 2 - 1)
    noise = (cached - posterior.mean[0]) / torch.exp(0.5 * posterior.logvar[0])
    assert abs(noise.mean()) < 0.15 and 0.9 < noise.std() < 1.1  # 1024 standard normal numbers


def test_reruns_and_other_batches_give_the_same_latents(run, pictures, tmp_path):
    assert run("--dataset_config", pictures) == 0
    first = caches(tmp_path / "cache")
    assert run("--dataset_config", pictures) == 0
    second = caches(tmp_path / "cache")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert run("--dataset_config", pictures, "--batch_size", 1) == 0
    single = caches(tmp_path / "cache")
    for name in first:
        torch.testing.assert_close(single[name], first[name], atol=1e-4, rtol=1e-4)


def test_batch_size_is_the_smaller_of_flag_and_dataset(run, pictures, tmp_path, monkeypatch):
    sizes = []
    encode = LatentEncoder.encode
    monkeypatch.setattr(LatentEncoder, "encode", lambda self, batch: sizes.append(len(batch)) or encode(self, batch))
    write_dataset(tmp_path, "images", batch_size=4)  # without buckets all six have one size
    for flag, expected in ((["--batch_size", 3], [3, 3]), (["--batch_size", 9], [4, 2])):
        sizes.clear()
        assert run("--dataset_config", pictures, *flag) == 0
        assert sizes == expected


def test_broken_files_are_listed_and_the_others_cached(run, pictures, tmp_path, capsys):
    assert run("--dataset_config", pictures) == 0
    before = times(tmp_path / "cache")
    (tmp_path / "images" / "red_circle.png").write_bytes(b"not a picture")
    assert run("--dataset_config", pictures, "--skip_existing", "--remove_orphans") == 1
    assert times(tmp_path / "cache") == before  # what cannot be read has no orphans
    shutil.rmtree(tmp_path / "cache")
    capsys.readouterr()
    assert run("--dataset_config", pictures) == 1
    output = capsys.readouterr()
    assert "1 failure(s):" in output.err and "red_circle.png" in output.err.split("1 failure(s):")[1]
    assert len(caches(tmp_path / "cache")) == 5
    assert re.search(r"1 \(images\) +6 +0 +5 +0 +1 +5 ", output.out)


def test_latents_that_are_no_numbers_are_not_saved(run, pictures, tmp_path, monkeypatch, capsys):
    encode = LatentEncoder.encode

    def overflow(self, batch):
        return [x * float("nan") if p.target.item.stem == "red_circle" else x for p, x in zip(batch, encode(self, batch))]

    monkeypatch.setattr(LatentEncoder, "encode", overflow)
    assert run("--dataset_config", pictures) == 1
    assert len(caches(tmp_path / "cache")) == 5
    assert re.search(r"red_circle\.png: the latents for red_circle_.* hold NaN", capsys.readouterr().err)


def test_too_short_clips_are_counted_and_an_empty_result_says_so(run, clips, tmp_path, capsys):
    write_dataset(tmp_path, "clips", enable_bucket=True, target_frames=[25])
    assert run("--dataset_config", clips) == 0
    assert re.search(r"1 \(videos\) +2 +0 +1 +1 +0 +1 ", capsys.readouterr().out)
    shutil.rmtree(tmp_path / "cache")
    write_dataset(tmp_path, "clips", target_frames=[29])
    assert run("--dataset_config", clips) == 2
    assert "of 2 item(s) 2 have fewer frames than the 29" in capsys.readouterr().err


def test_cache_directory_that_cannot_be_made_is_told_before_the_vae_is_loaded(run, pictures, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    write_dataset(tmp_path, "images", cache_directory=(tmp_path / "file" / "below").as_posix())
    monkeypatch.setattr(hunyuan_model, "load_vae", None)
    assert run("--dataset_config", pictures) == 2
    assert re.search(r"cache_directory of \[\[datasets\]\] number 1 .* cannot be written to", capsys.readouterr().err)
    flags = ["--debug_mode", "console", "--console_num_images", 1]  # writes nothing
    assert run("--dataset_config", pictures, *flags, vae=None) == 0


def test_disk_trouble_stops_the_run_instead_of_failing_item_by_item(run, pictures, tmp_path, capsys, monkeypatch):
    rename = os.replace

    def full(source, target):  # after the check at the start
        if str(target).endswith(".safetensors"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert run("--dataset_config", pictures) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_debug_video_writes_the_clips_as_they_are_trained(run, tiny_dataset, capsys):
    assert run("--dataset_config", tiny_dataset, "--debug_mode", "video", vae=None) == 0
    media = tiny_dataset.parent
    written = sorted(path.name for path in (media / "clip_cache" / "debug").iterdir())
    assert written == [
        "red_circle_moving_00000-001_0096x0064_hv.mp4",
        "red_circle_moving_00000-009_0096x0064_hv.mp4",
        "white_square_moving_00000-001_0064x0064_hv.mp4",
        "white_square_moving_00000-009_0064x0064_hv.mp4",
    ]
    assert all(path.suffix == ".png" for path in (media / "image_cache" / "debug").iterdir())
    assert not list(media.rglob("*.safetensors")) and written[1] in capsys.readouterr().out
    path = media / "clip_cache" / "debug" / written[1]
    info = probe_video(path)
    assert (info.width, info.height, info.fps) == (80, 48, 24.0)
    source = islice(iterate_frames(media / "clips" / "red_circle_moving.mp4"), 9)
    for frame, trained in zip(iterate_frames(path), source, strict=True):
        assert np.abs(frame.astype(int) - fit_to_bucket(trained, (80, 48))).mean() < 4  # a video is compressed


def test_debug_console_draws_as_many_as_asked(run, pictures, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    flags = ["--debug_mode", "console", "--console_width", 16, "--console_num_images", 2]
    assert run("--dataset_config", pictures, *flags, vae=None) == 0
    assert capsys.readouterr().out.count("\u2580") % 16 == 0
    assert not (tmp_path / "cache").exists()
    monkeypatch.delenv("FORCE_COLOR")  # a pipe
    assert run("--dataset_config", pictures, *flags, "--console_back", "blue", vae=None) == 0
    piped = capsys.readouterr().out
    assert "\x1b" not in piped and any(len(line) == 16 and set(line) <= set(SHADES) for line in piped.splitlines())
    assert run("--dataset_config", pictures, "--console_width", 16) == 0
    assert "--console_width has no effect without --debug_mode console" in caplog.text
