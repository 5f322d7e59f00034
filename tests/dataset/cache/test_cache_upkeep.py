"""Both caching scripts run again after something changed: exactly what changed is made again, and the numbers say why."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dataset import load_dataset_config
from dataset.cache.files import read_latents, save_latents
from dataset.cache.records import PIXELS, TEXT_ENCODERS, TOKENIZERS
from dataset.media.decoding import iterate_frames
from utils.media.writing import save_video
from utils.processes.locks import sole_run
from utils.safetensors_io import read_header

CASES = Path(__file__).parent.parent / "media" / "cases"


def latents(folder: Path) -> dict[str, int]:
    """Modification times of the latent caches of the tiny dataset, by name."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.rglob("*_hv.safetensors"))}


def texts(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.rglob("*_hv_te.safetensors"))}


def redone(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name for name in after if after[name] != before.get(name)}


def outcomes(stdout: str) -> list[str]:
    """The summary of each dataset."""
    return re.findall(r"^    cache files: (.*)$", stdout, re.MULTILINE)


@pytest.fixture
def cache_latents(call_script, tiny_model, tiny_dataset):
    def run(*flags: object, vae: Path = tiny_model.vae):
        common = ["--num_workers", 2, "--device", "cpu", "--dataset_config", tiny_dataset]
        finished = call_script("cache_latents", *common, "--vae", vae, *flags)
        assert finished.status == 0, finished.stderr
        return finished

    return run


@pytest.fixture
def cache_text(call_script, tiny_model, tiny_dataset):
    def run(*flags: object, text_encoder1: Path = tiny_model.text_encoder1, text_encoder2: Path = tiny_model.text_encoder2):
        encoders = ["--text_encoder1", text_encoder1, "--text_encoder2", text_encoder2]
        common = ["--device", "cpu", "--dataset_config", tiny_dataset, "--batch_size", 8]
        finished = call_script("cache_text_encoder_outputs", *common, *encoders, *flags)
        assert finished.status == 0, finished.stderr
        return finished

    return run


def change_weights(source: Path, folder: Path) -> Path:
    """A copy of a model folder with slightly other weights."""
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        tensors = {name: x * 1.01 if x.is_floating_point() else x for name, x in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    return folder


def replace_picture(path: Path) -> None:
    """Another picture of the same size in bytes and pixels, with the time of the old one."""
    before = path.stat()
    red, green, blue = Image.open(path).split()
    Image.merge("RGB", (green, blue, red)).save(path, optimize=True)
    missing = before.st_size - path.stat().st_size
    with open(path, "ab") as file:
        file.write(bytes(max(0, missing)))
    assert missing >= 0, "the new picture is larger; choose another one"
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns - 10**9))  # older than the cache


def test_caches_of_files_that_were_read_in_another_way_are_made_again(call_script, tiny_model, tmp_path):
    for name in ("hlg.mp4", "bt709.mp4"):
        shutil.copy(CASES / name, tmp_path)
        (tmp_path / name).with_suffix(".txt").write_text("patches", encoding="utf-8")
    (tmp_path / "other.raw").touch()
    (tmp_path / "other.txt").touch()
    source = f"video_directory = '{tmp_path}'\ncache_directory = '{tmp_path / 'cache'}'"
    (tmp_path / "set.toml").write_text(f"[[datasets]]\nresolution = 32\n{source}\ntarget_frames = [1]\n", encoding="utf-8")
    flags = ("--dataset_config", tmp_path / "set.toml", "--vae", tiny_model.vae, "--device", "cpu", "--skip_existing")
    first = call_script("cache_latents", *flags)
    assert "    HLG to SDR: hlg.mp4\n" in first.stdout and first.status == 0, first.stderr
    assert "1 file(s) with a caption but of a kind not read here: other.raw" in first.stdout
    for path in (tmp_path / "cache").iterdir():  # as an earlier version wrote them
        metadata = {key: value for key, value in read_header(path).metadata.items() if key != PIXELS}
        save_file(load_file(path), path, metadata)
    again = call_script("cache_latents", *flags)
    assert outcomes(again.stdout)[-1] == "0 made, 1 kept, 1 redone (1 pixels read in another way), 0 skipped, 0 orphans"


def test_only_what_changed_is_made_again(cache_latents, tiny_model, tiny_dataset, tmp_path):
    media = tiny_dataset.parent
    first = cache_latents("--skip_existing")
    assert outcomes(first.stdout) == [
        "6 made, 0 kept, 0 redone, 0 skipped, 0 orphans",
        "4 made, 0 kept, 0 redone, 0 skipped, 0 orphans",
    ]
    before = latents(media)
    again = cache_latents("--skip_existing")
    assert outcomes(again.stdout)[0] == "0 made, 6 kept, 0 redone, 0 skipped, 0 orphans"
    assert latents(media) == before

    replace_picture(media / "images" / "red_circle.png")
    clip = media / "clips" / "white_square_moving.mp4"
    os.utime(clip, (time.time(), time.time()))  # touched, with the same content
    record = image_record = media / "image_cache" / "blue_square_0072x0128_hv.safetensors"
    save_latents(record, read_latents(record), (72, 128))  # as of another tool
    before = latents(media)
    changed = cache_latents("--skip_existing")
    assert redone(before, latents(media)) == {"red_circle_0096x0064_hv.safetensors"}
    assert outcomes(changed.stdout) == [
        "0 made, 5 kept, 1 redone (1 source replaced), 0 skipped, 0 orphans",
        "0 made, 4 kept, 0 redone, 0 skipped, 0 orphans",
    ]

    other = change_weights(tiny_model.vae, tmp_path / "other_vae")
    before = latents(media)
    changed = cache_latents("--skip_existing", vae=other)
    assert set(before) - redone(before, latents(media)) == {image_record.name}  # it does not say which VAE made it
    assert outcomes(changed.stdout)[0] == "0 made, 1 kept, 5 redone (5 another VAE), 0 skipped, 0 orphans"

    tiny_dataset.write_text(tiny_dataset.read_text("utf-8").replace("[64, 64]", "[48, 48]"), encoding="utf-8")
    changed = cache_latents("--skip_existing", vae=other)
    assert outcomes(changed.stdout)[1] == "0 made, 0 kept, 4 redone (4 another size), 0 skipped, 0 orphans"
    assert outcomes(cache_latents(vae=other).stdout)[1] == (
        "0 made, 0 kept, 4 redone (4 without --skip_existing), 0 skipped, 0 orphans"
    )


def test_frame_rates_are_told_and_recorded(cache_latents, tiny_dataset):
    clip = tiny_dataset.parent / "clips" / "red_circle_moving.mp4"
    save_video(clip, np.stack(list(iterate_frames(clip))), fps=30)
    first = cache_latents()
    assert "\n    30 -> 24 frames per second: red_circle_moving.mp4\n" in first.stdout
    path = tiny_dataset.parent / "clip_cache" / "red_circle_moving_00000-009_0096x0064_hv.safetensors"
    assert read_header(path).metadata["frame_rate"] == "24 from timestamps"
    assert outcomes(cache_latents("--skip_existing").stdout)[1] == "0 made, 4 kept, 0 redone, 0 skipped, 0 orphans"
    before = read_latents(path)
    tiny_dataset.write_text(tiny_dataset.read_text("utf-8") + "target_fps = 0\n", encoding="utf-8")
    changed = cache_latents("--skip_existing")
    assert (
        outcomes(changed.stdout)[1] == "0 made, 3 kept, 1 redone (1 another frame rate), 0 skipped, 0 orphans"
    )  # not the first frame
    assert "frames per second" not in changed.stdout and not torch.equal(read_latents(path), before)


def test_missing_captions_are_skipped_or_empty_in_both_scripts(cache_latents, cache_text, tiny_dataset):
    media = tiny_dataset.parent
    (media / "images" / "red_circle.txt").unlink()
    name = "red_circle_0096x0064_hv.safetensors"
    skipped = cache_latents("--missing_caption", "skip")
    assert outcomes(skipped.stdout)[0] == "5 made, 0 kept, 0 redone, 1 skipped, 0 orphans" and name not in latents(media)
    skipped = cache_text("--missing_caption", "skip")
    assert outcomes(skipped.stdout)[0] == "5 made, 0 kept, 0 redone, 1 skipped, 0 orphans"
    assert "5 captions" not in skipped.stdout and "7 captions: 7 encoded" in skipped.stdout

    assert outcomes(cache_latents("--missing_caption", "empty", "--skip_existing").stdout)[0].startswith("1 made, 5 kept, 0 redone")
    assert outcomes(cache_text("--missing_caption", "skip", "--skip_existing").stdout)[0].endswith("1 skipped, 0 orphans")
    assert outcomes(cache_text("--missing_caption", "empty", "--skip_existing").stdout)[0].startswith("1 made, 5 kept, 0 redone")
    assert read_header(media / "image_cache" / "red_circle_hv_te.safetensors").metadata["caption1"] == ""
    removed = cache_latents("--missing_caption", "skip", "--skip_existing", "--remove_orphans")
    assert outcomes(removed.stdout)[0] == "0 made, 5 kept, 0 redone, 1 skipped, 1 orphans (1 removed)"


def test_orphans_are_listed_and_removed_only_when_asked(cache_latents, cache_text, tiny_dataset):
    media = tiny_dataset.parent
    cache_latents()
    cache_text()
    images, cache = media / "images", media / "image_cache"
    for suffix in (".png", ".txt"):
        (images / f"green_triangle{suffix}").unlink()
    Image.open(images / "red_circle.png").resize((100, 80)).save(images / "red_circle.png")
    (cache / "lora.safetensors").touch()
    (cache / "notes.txt").touch()
    fresh, abandoned = cache / ".0123abcd.tmp.safetensors", cache / ".0123abce.tmp.safetensors"
    fresh.touch()
    abandoned.touch()
    os.utime(abandoned, (1, 1))
    gone = {"green_triangle_0064x0064_hv.safetensors", "red_circle_0096x0064_hv.safetensors", abandoned.name}
    names = {path.name for path in cache.iterdir()}

    listed = cache_latents("--skip_existing")
    assert outcomes(listed.stdout)[0] == "0 made, 4 kept, 1 redone (1 source replaced), 0 skipped, 3 orphans"
    assert set(re.findall(r"^    orphan: (.*)$", listed.stdout, re.MULTILINE)) == gone
    assert {path.name for path in cache.iterdir()} == names | {"red_circle_0100x0080_hv.safetensors"}

    removed = cache_latents("--skip_existing", "--remove_orphans")
    assert outcomes(removed.stdout)[0] == "0 made, 5 kept, 0 redone, 0 skipped, 3 orphans (3 removed)"
    assert {path.name for path in cache.iterdir()} == (names | {"red_circle_0100x0080_hv.safetensors"}) - gone
    assert (cache / "green_triangle_hv_te.safetensors").exists()  # that of the other script
    assert "orphan: green_triangle_hv_te.safetensors" in cache_text("--skip_existing").stdout
    removed = cache_text("--skip_existing", "--remove_orphans")
    assert outcomes(removed.stdout)[0] == "0 made, 5 kept, 0 redone, 0 skipped, 1 orphans (1 removed)"
    assert not (cache / "green_triangle_hv_te.safetensors").exists() and len(texts(media)) == 7
    assert (cache / "lora.safetensors").exists() and fresh.exists()


def test_text_is_made_again_for_another_caption_encoder_or_tokenizer(cache_text, tiny_model, tiny_dataset, tmp_path):
    media = tiny_dataset.parent
    assert outcomes(cache_text("--skip_existing").stdout)[0] == "6 made, 0 kept, 0 redone, 0 skipped, 0 orphans"
    metadata = read_header(media / "image_cache" / "red_circle_hv_te.safetensors").metadata
    assert set(metadata) == {"architecture", "format_version", "caption1", "checksum", *TEXT_ENCODERS, *TOKENIZERS}
    (media / "images" / "red_circle.txt").write_text("something else", encoding="utf-8")
    before = texts(media)
    changed = cache_text("--skip_existing")
    assert redone(before, texts(media)) == {"red_circle_hv_te.safetensors"}
    assert outcomes(changed.stdout) == [
        "0 made, 5 kept, 1 redone (1 another caption), 0 skipped, 0 orphans",
        "0 made, 2 kept, 0 redone, 0 skipped, 0 orphans",
    ]
    other = change_weights(tiny_model.text_encoder2, tmp_path / "other")
    changed = cache_text("--skip_existing", text_encoder2=other)
    assert outcomes(changed.stdout)[1] == "0 made, 0 kept, 2 redone (2 another text encoder), 0 skipped, 0 orphans"
    assert outcomes(cache_text("--skip_existing", text_encoder2=other).stdout)[1].startswith("0 made, 2 kept")
    tokens = tmp_path / "tokens"
    shutil.copytree(tiny_model.text_encoder1, tokens)
    text = (tokens / "tokenizer.json").read_text("utf-8")
    merges = re.search(r'"merges":\s*\[', text)
    assert merges, "the tiny tokenizer has merges"
    first = re.compile(r'\s*(\[[^\]]*\]|"[^"]*"),').match(text, merges.end())
    (tokens / "tokenizer.json").write_text(text[: merges.end()] + text[first.end() :], encoding="utf-8")
    changed = cache_text("--skip_existing", "--tokenizer1", tokens, text_encoder2=other)
    assert outcomes(changed.stdout)[1] == "0 made, 0 kept, 2 redone (2 another tokenizer), 0 skipped, 0 orphans"


def test_two_runs_do_not_cache_the_same_in_one_folder(call_script, cache_latents, cache_text, tiny_model, tiny_dataset):
    folder = load_dataset_config(tiny_dataset).datasets[0].cache_directory
    with sole_run(folder / ".latents.lock", "caches latents", ""):
        ended = call_script("cache_latents", "--dataset_config", tiny_dataset, "--vae", tiny_model.vae)
        assert ended.status == 2 and f"error: another run caches latents in {folder} (process " in ended.stderr
        assert not list(tiny_dataset.parent.rglob("*_hv.safetensors"))
        cache_text()
    cache_latents()
    assert not list(tiny_dataset.parent.rglob(".*"))
