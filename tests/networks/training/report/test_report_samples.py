"""Samples in a report: how large they are, and which are left out."""

from __future__ import annotations

import base64
import io
from itertools import pairwise

import av
import numpy as np
from PIL import Image

from networks.training.report.record import SampleRecord
from networks.training.report.samples import small_media, thin_out
from utils.media.writing import save_picture, save_video


def content(uri: str) -> io.BytesIO:
    return io.BytesIO(base64.b64decode(uri.partition(",")[2]))


def test_a_picture_and_a_clip_are_small_and_the_same(tmp_path):
    column = np.linspace(0, 255, 480, dtype=np.uint8)
    pixels = np.broadcast_to(column[None, :, None], (272, 480, 3))
    save_picture(tmp_path / "a.png", pixels)
    uri, clip = small_media(tmp_path / "a.png")
    assert not clip and Image.open(content(uri)).size == (384, 218)
    save_video(tmp_path / "a.mp4", [np.roll(pixels, 20 * index, 1) for index in range(5)], 16)
    uri, clip = small_media(tmp_path / "a.mp4")
    assert Image.open(content(uri)).size == (320, 182)
    with av.open(content(clip)) as container:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 16
    with av.open(str(tmp_path / "a.mp4")) as container:
        before = [frame.to_ndarray(width=320, height=182, format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(frames) == 5 and all(np.abs(one - other).mean() < 4 for one, other in zip(frames, before))
    save_video(tmp_path / "tiny.mp4", [np.zeros((16, 32, 3), np.uint8)] * 2, 24)
    assert Image.open(content(small_media(tmp_path / "tiny.mp4")[0])).size == (32, 16)


def kept(samples: list[SampleRecord]) -> list[int]:
    return sorted({sample.step for sample in samples if sample.uri})


def test_steps_are_thinned_out_evenly():
    """As a training goes on: at most 10 steps of 100 have media, the first and the newest among them, no gap is twice another."""
    samples: list[SampleRecord] = []
    for step in range(100):
        samples += [SampleRecord(step, index, "", 0, "", "x" * 60, "y" * 40) for index in range(2)]
        thin_out(samples, most=2000)
        left = kept(samples)
        assert left[0] == 0 and left[-1] == step and len(left) == min(step + 1, 10)
        gaps = [after - before for before, after in pairwise(left)]
        assert not gaps or max(gaps[:-1], default=1) <= 2 * min(gaps[:-1], default=1) + 1, left
    assert len(samples) == 200 and not any(sample.clip for sample in samples if not sample.uri)


def test_two_steps_that_are_too_large_already_lose_some():
    samples = [SampleRecord(step, index, "", 0, "", "x" * 100) for step in (0, 5, 9) for index in range(10)]
    thin_out(samples, most=550)
    assert sum(len(sample.uri) for sample in samples) == 500 and kept(samples) == [9]
