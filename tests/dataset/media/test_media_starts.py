"""What generation starts from: the frames that caching would encode, and files that cannot be a start."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.cache.preparation import Prepared, prepare_item
from dataset.config import DatasetConfig
from dataset.items import Item
from dataset.media.errors import MediaError
from dataset.media.starts import find_starts, read_start
from utils.media.writing import save_picture, save_video

SIZE = (48, 64)


def cached_pixels(path: Path, kind: str, length: int) -> np.ndarray:
    """What caching encodes of the file in a dataset of one size."""
    dataset = DatasetConfig(0, kind, path.parent, None, path.parent, SIZE[::-1])
    dataset = replace(dataset, target_frames=(length,)) if kind == "video" else dataset
    prepared, _ = prepare_item(Item(dataset, path, "", path.stem))
    assert isinstance(prepared, Prepared)
    return prepared.pixels


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (13, 96, 128, 3), np.uint8)


@pytest.mark.parametrize("fps", [24, 12, 60])
def test_a_clip_is_that_of_caching(tmp_path, noise, fps, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "clip.mp4"
    save_video(path, noise, fps)
    assert find_starts("video", path, SIZE, 5) == [path]
    frames = read_start("video", path, SIZE, 5)
    np.testing.assert_array_equal(frames, cached_pixels(path, "video", 5))
    said = "" if fps == 24 else f"{fps} -> 24 frames per second, "
    assert f"start {path}: 128x96, {said}its first 5 frames, fitted to 64x48" in caplog.text


def test_real_clips_and_pictures_are_those_of_caching(real_media):
    for path in real_media.clips[:2]:
        find_starts("video", path, SIZE, 17)
        np.testing.assert_array_equal(read_start("video", path, SIZE, 17), cached_pixels(path, "video", 17))
    for path in real_media.pictures[:3]:
        find_starts("image", path, SIZE, 1)
        np.testing.assert_array_equal(read_start("image", path, SIZE, 1), cached_pixels(path, "image", 1))


def test_a_turned_hdr_or_uneven_file_is_that_of_caching():
    for path in sorted((Path(__file__).parent / "cases").glob("*.m*")):
        np.testing.assert_array_equal(read_start("video", path, SIZE, 1), cached_pixels(path, "video", 1))


def test_a_picture_stands_still(tmp_path, noise, caplog):
    caplog.set_level(logging.INFO)
    save_picture(tmp_path / "a.png", noise[0])
    assert find_starts("image", tmp_path / "a.png", SIZE, 5) == [tmp_path / "a.png"]
    frames = read_start("image", tmp_path / "a.png", SIZE, 5)
    assert frames.shape == (5, *SIZE, 3) and (frames == cached_pixels(tmp_path / "a.png", "image", 1)).all()
    assert "standing still for all 5 frames of --video_length" in caplog.text


def test_folders(tmp_path, noise, caplog):
    caplog.set_level(logging.INFO)
    for index, frame in enumerate(noise):
        save_picture(tmp_path / "frames" / f"{index}.png", frame)  # 10 comes after 9, not after 1
    (tmp_path / "frames" / "._0.png").write_bytes(b"of macOS")
    folder = tmp_path / "frames"
    assert find_starts("video", folder, SIZE, 13) == [folder]
    one_by_one = np.concatenate([read_start("image", folder / f"{index}.png", SIZE, 1) for index in range(13)])
    np.testing.assert_array_equal(read_start("video", folder, SIZE, 13), one_by_one)
    np.testing.assert_array_equal(read_start("video", folder, SIZE, 9), one_by_one[:9])
    assert len(find_starts("image", folder, SIZE, 1)) == 13
    for name in ("b", "a"):
        save_video(folder / f"{name}.mp4", noise, 24)
    assert find_starts("video", folder, SIZE, 5) == [folder / "a.mp4", folder / "b.mp4"]
    assert "its 13 pictures are left out, as it holds clips" in caplog.text


def test_what_cannot_be_a_start(tmp_path, noise):
    save_video(tmp_path / "clip.mp4", noise[:7], 24)
    save_picture(tmp_path / "frames" / "a.png", noise[0])
    save_picture(tmp_path / "frames" / "b.png", noise[1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("a red ball")
    (tmp_path / "half.png").write_bytes((tmp_path / "frames" / "a.png").read_bytes()[:9000])
    (tmp_path / "half.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes()[:-500])
    Image.fromarray(noise[0]).save(tmp_path / "picture.jpg")
    refusals = {
        ("video", "clip.mp4"): "has 7 frames at 24 frames per second, and --video_length is 9; --video_length 5 is the longest",
        ("video", "frames"): "has 2 frames, and --video_length is 9; --video_length 1 is the longest",
        ("video", "empty"): "holds no clip and no picture",
        ("image", "empty"): "holds no picture",
        ("video", "none.mp4"): "does not exist",
        ("image", "none.png"): "does not exist",
        ("video", "text.mp4"): "cannot be decoded",
        ("image", "half.png"): "cannot be decoded",
        ("video", "half.mp4"): "cut short",
        ("video", "picture.jpg"): "is a picture, not a video: give it as --image_path",
        ("image", "clip.mp4"): "is a video, not a picture: give it as --video_path",
    }
    for (kind, name), says in refusals.items():
        with pytest.raises(MediaError, match=says) as error:
            find_starts(kind, tmp_path / name, SIZE, 9)
        assert name in str(error.value)
