"""Files as phones, cameras, discs and programs write them, against what ffmpeg and ImageMagick read from them (odd/make.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dataset.media.decoding import VIDEO_EXTENSIONS, frame_times, iterate_frames, probe_video
from dataset.media.errors import MediaError
from dataset.media.pictures import IMAGE_EXTENSIONS, probe_image, read_image, readable_formats

HERE = Path(__file__).parent
ODD, CASES = HERE / "odd", HERE / "cases"
EXPECTED = json.loads((ODD / "expected.json").read_text(encoding="utf-8"))
CLIPS = [name for name in EXPECTED if "frames" in EXPECTED[name]]
PICTURES = [name for name in EXPECTED if "frames" not in EXPECTED[name]]


def grid(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> the mean colours of 3 x 4 cells."""
    return np.array([[cell.mean(axis=(0, 1)) for cell in np.array_split(row, 4, 1)] for row in np.array_split(pixels, 3)])


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_is_what_ffmpeg_sees(name: str) -> None:
    path, expected = ODD / name, EXPECTED[name]
    assert path.suffix in VIDEO_EXTENSIONS
    frames = list(iterate_frames(path))
    assert [frames[0].shape[1], frames[0].shape[0]] == expected["size"]
    assert np.abs(grid(frames[0]) - expected["grid"]).mean() < 3
    assert len(frames) == len(frame_times(path)) == expected["frames"]
    assert [probe_video(path).width, probe_video(path).height] == expected["size"]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_imagemagick_sees(name: str) -> None:
    path, expected = ODD / name, EXPECTED[name]
    assert path.suffix in IMAGE_EXTENSIONS
    needed = {".heic": "HEIF", ".avif": "AVIF"}.get(path.suffix)
    if needed and needed not in readable_formats():
        with pytest.raises(MediaError, match="pip install"):
            read_image(path)
        pytest.skip(f"nothing that reads {needed} is installed")
    pixels = read_image(path)
    assert [pixels.shape[1], pixels.shape[0]] == list(probe_image(path)[0]) == expected["size"]
    assert np.abs(grid(pixels) - expected["grid"]).mean() < 3


def test_what_is_done_is_named() -> None:
    clips = {name: done for name in CLIPS if (done := probe_video(ODD / name).done)}
    assert clips["hlg.mp4"] == "HLG to SDR" and clips["pq.mp4"] == "PQ to SDR" and clips["sdr_2020.mp4"] == "BT.2020 to BT.709"
    assert clips["interlaced_dvd.mpg"] == "pixels of 4:3 made square, deinterlaced"
    assert clips["alpha_vp8.webm"] == "transparency over white"
    assert not {"bt709_tv.mp4", "untagged_sd.mp4", "ten_bits.mp4", "uneven.mp4", "moving.gif"} & set(clips), (
        "plain ones are read as always"
    )
    pictures = {name: done for name in PICTURES if (done := probe_image(ODD / name)[1])}
    assert pictures["adobe.png"] == "Compatible with Adobe RGB (1998) to sRGB" and pictures["gamma_1.png"] == "gamma 1 to sRGB"
    assert "srgb.png" not in pictures and "transparent.png" not in pictures


def patches(pixels: np.ndarray) -> list[list[int]]:
    """The middles of three patches side by side."""
    height, width = pixels.shape[:2]
    return pixels[height // 2, [width // 6, width // 2, 5 * width // 6]].tolist()


@pytest.mark.parametrize(
    ("name", "high", "low", "within"), [("hlg.mp4", 200, 30, 6), ("bt709.mp4", 200, 30, 3), ("untagged_hd.mp4", 200, 30, 3)]
)
def test_patches_of_clips(name: str, high: int, low: int, within: int) -> None:
    expected = np.full((3, 3), low) + np.eye(3, dtype=int) * (high - low)
    assert np.abs(np.array(patches(next(iterate_frames(CASES / name)))) - expected).max() <= within


def test_patches_of_a_picture_with_a_wide_gamut() -> None:
    expected = [[200, 60, 60], [60, 180, 60], [60, 60, 200]]
    assert np.abs(np.array(patches(read_image(CASES / "wide.png"))) - expected).max() <= 3


@pytest.mark.parametrize("name", ["alpha_qtrle.mov", "alpha_vp9.webm"])
def test_a_transparent_clip_is_white(name: str) -> None:
    assert all((frame == 255).all() for frame in iterate_frames(CASES / name))


def test_a_circle_on_a_disc_is_round() -> None:
    frame = next(iterate_frames(CASES / "dvd.mp4")).astype(int)
    assert frame.shape == (576, 1024, 3)
    rows, columns = np.nonzero(np.abs(frame - frame[0, 0]).sum(-1) > 150)
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 3
