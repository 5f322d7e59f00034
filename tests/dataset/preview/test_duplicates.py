"""Copies of a picture or clip are found, different ones are not: of the toy concept, photographs, and clips made here."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import package_folder
from PIL import Image, ImageEnhance, ImageOps

from dataset.cache.preparation import Finished, Prepared, prepare
from dataset.config import DatasetConfig, load_dataset_config
from dataset.items import list_items
from dataset.preview.duplicates import Fingerprints
from dataset.preview.facts import Concern, ItemFacts, compare_items, facts_of
from utils.media.writing import save_video

ROOT = Path(__file__).resolve().parents[3]
PICTURES = ("known_pictures/085_yellow_ring.png", "pictures/zorp_01_red.png")
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "rocket.jpg")


def facts_in(*datasets: DatasetConfig) -> list[ItemFacts]:
    """With the notes of near-duplicates."""
    fingerprints, facts = Fingerprints(), []
    for result in prepare([item for dataset in datasets for item in list_items(dataset)], num_workers=2):
        if isinstance(result, Prepared):
            fingerprints.add(result)
        else:
            assert isinstance(result, Finished)
            facts.append(facts_of(result))
    compare_items(facts, fingerprints)
    return facts


def alike_in(*datasets: DatasetConfig) -> dict[str, set[str]]:
    """Of each file that looks like another, which; with a note of the mirrored ones, as notes have it."""
    facts = facts_in(*datasets)
    notes = {each.item.path.name: [note for note in each.notes if note.concern == Concern.DUPLICATE] for each in facts}
    names = lambda text: set(text.removeprefix("It looks nearly the same as ").split(". ")[0].split(", "))  # noqa: E731
    return {name: names(note.text) for name, found in notes.items() for note in found}


def pictures_in(folder: Path, **values) -> DatasetConfig:
    values = {"resolution": (256, 256), "enable_bucket": True, **values}
    return DatasetConfig(0, "image", folder, None, folder / "cache", caption_extension=".txt", **values)


def clips_in(folder: Path, **values) -> DatasetConfig:
    values = {"resolution": (128, 96), "target_frames": (17,), **values}
    return DatasetConfig(1, "video", folder, None, folder / "cache", caption_extension=".txt", **values)


@cache
def originals() -> dict[str, Image.Image]:
    paths = [ROOT / "examples" / "toy" / "concept" / name for name in PICTURES]
    if (photographs := package_folder("skimage")) is not None:
        paths += [photographs / "data" / name for name in PHOTOGRAPHS]
    return {path.stem: Image.open(path).convert("RGB") for path in paths}


def saved(picture: Image.Image, quality: int) -> Image.Image:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=quality)
    return Image.open(content)


def crop(picture: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """With these shares of the sides cut off."""
    width, height = picture.size
    return picture.crop((round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height)))


@pytest.mark.parametrize(
    "change",
    [
        lambda picture: saved(picture, 50),
        lambda picture: picture.resize((picture.width // 2, picture.height // 2)),
        lambda picture: crop(picture, 0.03, 0.03, 0.03, 0.03),
        lambda picture: crop(picture, 0.03, 0, 0, 0),
        lambda picture: crop(picture, 0, 0.02, 0.03, 0.01),
        lambda picture: ImageEnhance.Brightness(picture).enhance(1.1),
        lambda picture: saved(ImageOps.mirror(picture), 75),
    ],
    ids=["JPEG", "half", "all sides", "one side", "three sides", "brighter", "mirrored"],
)
def test_copies_of_a_picture_are_found(tmp_path, change: Callable[[Image.Image], Image.Image], request):
    for name, picture in originals().items():
        picture.save(tmp_path / f"{name}.bmp")
        change(picture).save(tmp_path / f"{name} copy.bmp")
    mirrored = " (mirrored)" if request.node.callspec.id == "mirrored" else ""
    assert alike_in(pictures_in(tmp_path)) == {
        **{f"{name}.bmp": {f"{name} copy.bmp{mirrored}"} for name in originals()},
        **{f"{name} copy.bmp": {f"{name}.bmp{mirrored}"} for name in originals()},
    }


def test_the_toy_concept_holds_no_copies(monkeypatch):
    """Shapes on plain grounds, several of one shape and colour at nearly one place."""
    monkeypatch.chdir(ROOT)
    assert alike_in(*load_dataset_config("examples/toy/concept/dataset.toml").datasets) == {}


def test_photographs_hold_no_copies_but_the_two_boards(tmp_path):
    if (package := package_folder("skimage")) is None:
        pytest.skip("scikit-image is not installed")
    for path in [*(package / "data").glob("*.png"), *(package / "data").glob("*.jpg")]:
        shutil.copy(path, tmp_path)
    assert alike_in(pictures_in(tmp_path)) == {
        "chessboard_GRAY.png": {"chessboard_RGB.png"},
        "chessboard_RGB.png": {"chessboard_GRAY.png"},
    }


def moving_noise(seed: int) -> np.ndarray:
    """A clip (34, 96, 128, 3) that moves over a rough ground of its own."""
    ground = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 24, 3), np.uint8)).resize(
        (256, 96), Image.Resampling.BICUBIC
    )
    return np.stack([np.asarray(ground)[:, 3 * number : 3 * number + 128] for number in range(34)])


def test_clips_and_their_frames(tmp_path):
    clips, pictures = tmp_path / "clips", tmp_path / "pictures"
    clips.mkdir()
    pictures.mkdir()
    for seed in (1, 2):
        save_video(clips / f"{seed}.mp4", moving_noise(seed), 24)
    with av.open(str(clips / "copy.mkv"), "w") as container:  # of half the size, by another codec
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.bit_rate = 1_000_000
        for frame in moving_noise(1):
            small = np.asarray(Image.fromarray(frame).resize((64, 48)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(small, format="rgb24")))
        container.mux(stream.encode())
    save_video(clips / "turned.mp4", moving_noise(2)[:, :, ::-1], 24)
    save_video(clips / "same beginning.mp4", np.concatenate([moving_noise(1)[:2], moving_noise(3)]), 24)
    Image.fromarray(moving_noise(2)[8]).save(pictures / "frame.jpg")
    Image.fromarray(moving_noise(4)[0]).save(pictures / "other.jpg")
    assert alike_in(pictures_in(pictures, resolution=(128, 96)), clips_in(clips, frame_extraction="chunk")) == {
        "1.mp4": {"copy.mkv"},
        "copy.mkv": {"1.mp4"},
        "2.mp4": {"frame.jpg", "turned.mp4 (mirrored)"},
        "turned.mp4": {"2.mp4 (mirrored)"},
        "frame.jpg": {"2.mp4"},
    }


def test_a_file_in_two_datasets_and_plain_pictures_are_no_copies(tmp_path):
    Image.open(ROOT / "examples" / "toy" / "concept" / PICTURES[0]).save(tmp_path / "a.png")
    for number in range(3):
        grey = np.full((64, 64, 3), 100, np.uint8)
        Image.fromarray(grey + np.random.default_rng(number).integers(0, 2, (64, 64, 1), np.uint8)).save(tmp_path / f"{number}.png")
    assert alike_in(pictures_in(tmp_path), pictures_in(tmp_path, resolution=(128, 128))) == {}


def test_a_copy_of_a_file_in_two_datasets_is_named_once(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        Image.open(ROOT / "examples" / "toy" / "concept" / PICTURES[0]).save(tmp_path / name)
    [note] = {
        note.text
        for each in facts_in(pictures_in(tmp_path), pictures_in(tmp_path, resolution=(128, 128)))
        for note in each.notes
        if each.item.path.name == "a.png" and note.concern == Concern.DUPLICATE
    }
    assert note == "It looks nearly the same as b.png, c.png. Keep one of them."


def test_many_copies_are_named_in_part(tmp_path):
    for number in range(8):
        Image.open(ROOT / "examples" / "toy" / "concept" / PICTURES[0]).save(tmp_path / f"{number}.png")
    found = alike_in(pictures_in(tmp_path))
    assert found["7.png"] == {"0.png", "1.png", "2.png", "3.png", "4.png and 2 more"} and len(found) == 8
