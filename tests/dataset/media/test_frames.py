"""Clip windows against the reference trainer's, and the properties of each way of cutting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.media.frames import FRAME_EXTRACTIONS, cut_windows, frames_needed, is_clip_length

REFERENCE = json.loads((Path(__file__).resolve().parents[2] / "goldens" / "frames.json").read_text(encoding="utf-8"))


def cut(row: dict) -> list[tuple[int, int]]:
    return cut_windows(row["frames"], row["target_frames"], row["mode"], row["frame_stride"], row["frame_sample"])


def test_windows_equal_the_reference_each_once():
    assert len(REFERENCE["rows"]) == 540
    repeated = 0
    for row in REFERENCE["rows"]:
        expected = list(dict.fromkeys(tuple(window) for window in row["windows"]))
        repeated += len(expected) < len(row["windows"])
        assert cut(row) == expected, row
    assert repeated > 0  # the reference does cut some windows twice


def test_windows_are_those_in_the_names_of_existing_cache_files():
    for row in REFERENCE["file_names"]:
        names = sorted(f"_{start:05d}-{length:03d}_" for start, length in cut(row))
        assert len(names) == len(row["latent_cache_files"])
        assert all(name in file for name, file in zip(names, row["latent_cache_files"])), row


@given(
    st.integers(0, 300),
    st.lists(st.integers(0, 20).map(lambda n: 4 * n + 1), min_size=1, max_size=3),
    st.sampled_from(FRAME_EXTRACTIONS),
    st.integers(1, 30),
    st.integers(1, 12),
)
def test_windows_lie_inside_the_video_and_are_distinct(frames, targets, mode, stride, sample):
    most = stride * sample  # any number will do
    windows = cut_windows(frames, targets, mode, stride, sample, most)
    assert len(set(windows)) == len(windows)
    assert all(start >= 0 and start + length <= frames and is_clip_length(length) for start, length in windows)
    if mode != "full":
        assert {length for _, length in windows} == {length for length in targets if length <= frames}
    needed = frames_needed(targets, mode, most)
    if needed is not None:
        assert cut_windows(min(frames, needed), targets, mode, stride, sample, most) == windows


@pytest.mark.parametrize(
    ("frames", "limit", "expected"),
    [
        (0, 129, []),
        (1, 129, [1]),
        (4, 129, [1]),
        (5, 129, [5]),
        (128, 129, [125]),
        (129, 129, [129]),
        (500, 129, [129]),
        (500, 100, [97]),
        (500, 1, [1]),
        (500, 201, [201]),
    ],
)
def test_full_is_the_whole_clip_trimmed_to_4n_plus_1(frames, limit, expected):
    assert cut_windows(frames, [9, 25], "full", max_frames=limit) == [(0, length) for length in expected]
