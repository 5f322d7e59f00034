"""Frame rates: which frames of a file are trained, from formulas and from files of several rates."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.cache.preparation import Prepared, plan_targets, prepare_item
from dataset.config import DatasetConfig
from dataset.items import list_items
from dataset.media.decoding import frame_times
from dataset.media.frame_rate import EVERY_FRAME, resample


def even_times(count: int, fps: float) -> list[float]:
    return [index / fps for index in range(count)]


@pytest.mark.parametrize("fps", [24, 23.976, 25, 22.9, 25.1])
def test_about_the_same_rate_keeps_every_frame(fps):
    assert resample(even_times(100, fps), fps, 24) is None


@pytest.mark.parametrize(
    ("fps", "target", "start"),
    [
        (30, 24, [0, 1, 2, 4, 5, 6, 7, 9]),  # at 2/24 s frames 2 and 3 are equally near; the earlier one is taken
        (12, 24, [0, 0, 1, 1, 2, 2, 3, 3]),
        (60, 24, [0, 2, 5, 7, 10, 12, 15, 17]),
        (48, 24, [0, 2, 4, 6, 8, 10, 12, 14]),
        (24, 8, [0, 3, 6, 9, 12, 15, 18, 21]),
    ],
)
def test_frames_of_even_videos(fps, target, start):
    found = resample(even_times(4 * fps, fps), None, target)
    assert list(found.indices[:8]) == start
    assert len(found.indices) == 4 * target  # as long in seconds as before
    assert str(found) == f"{fps} -> {target} frames per second"
    assert found.record == f"{target} from timestamps"


def test_times_rounded_to_milliseconds_are_even():
    for fps in (24000 / 1001, 24, 30, 59.94):
        found = resample([round(time, 3) for time in even_times(240, fps)], fps, 24)
        assert found is None if fps <= 24 else (not found.uneven and abs(len(found.indices) - 240 * 24 / fps) < 1)


def test_an_uneven_video_of_the_right_rate_on_average_is_resampled():
    times = [*even_times(12, 12), *(1 + time for time in even_times(36, 36))]  # two seconds, 48 frames
    found = resample(times, 24, 24)
    assert found.uneven and str(found) == "uneven, 24 -> 24 frames per second"
    assert len(found.indices) == 48
    assert found.indices[:6] == (0, 0, 1, 1, 2, 2) and found.indices[24:28] == (12, 13, 15, 16)


@given(st.lists(st.floats(0, 0.3), min_size=1, max_size=60), st.sampled_from([8, 24, 60]))
def test_every_moment_has_the_nearest_frame(gaps, target):
    times = [0.0, *np.cumsum(gaps).tolist()]
    if times[-1] < 1e-3:
        return
    found = resample(times, None, target)
    if found is None:
        return
    indices = np.array(found.indices)
    assert (np.diff(indices) >= 0).all() and indices[0] == 0
    for moment, index in enumerate(found.indices):
        distances = np.abs(np.array(times) - moment / target)
        assert distances[index] <= distances.min() + 2.1e-3
    longest = times[-1] * len(times) / (len(times) - 1)
    assert times[-1] * target - 1 < len(indices) < longest * target + 1


def write_clip(path: Path, times_ms: list[int]) -> Path:
    """A lossless clip of 64x32 whose frame number is its grey, with the frames at these times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "bgr0"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(np.full((32, 64, 3), 3 * number, np.uint8), format="rgb24").reformat(format="bgr0")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(pixels: np.ndarray) -> list[int]:
    """Which frames of ``write_clip`` these are."""
    return [round(frame.mean() / 3) for frame in pixels]


def video_dataset(folder: Path, **values: object) -> DatasetConfig:
    return DatasetConfig(0, "video", folder, None, folder / "cache", resolution=(64, 32), caption_extension=".txt", **values)


def clips_of(folder: Path, **values: object) -> dict[tuple[int, int], list[int]]:
    """The frames in each window of the one clip in ``folder``."""
    item = list_items(video_dataset(folder, **values))[0]
    return {result.target.window: numbers(result.pixels) for result in prepare_item(item) if isinstance(result, Prepared)}


def test_times_come_from_the_file(tmp_path):
    times = [0, 40, 90, 500, 520, 530]
    path = write_clip(tmp_path / "a.mkv", [100 + time for time in times])
    assert frame_times(path, 30) == pytest.approx([time / 1000 for time in times])
    assert frame_times(path, 10, use_timestamps=False) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert len(frame_times(path, 30, limit=(2, 0.3))) == 4
    assert len(frame_times(path, 30, limit=(5, 0.3))) == 5


def test_faulty_timestamps_do_not_stretch_the_clip(tmp_path):
    path = write_clip(tmp_path / "a.mkv", [0, 100, 200, 3_600_000, 3_600_100])
    assert frame_times(path, 10) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_windows_are_counted_and_cut_after_resampling(tmp_path):
    write_clip(tmp_path / "a.mkv", [round(1000 * index / 30) for index in range(40)])
    taken = resample(even_times(40, 30), 30, 24).indices  # the milliseconds of the file change nothing
    assert len(taken) == 32
    clips = clips_of(tmp_path, target_frames=(5, 9), frame_extraction="chunk")
    assert set(clips) == {*((start, 5) for start in range(0, 28, 5)), (0, 9), (9, 9), (18, 9)}
    for (start, length), frames in clips.items():
        assert frames == list(taken[start : start + length])
    assert clips_of(tmp_path, frame_extraction="full") == {(0, 29): list(taken[:29])}
    assert clips_of(tmp_path, target_frames=(9,)) == {(0, 9): list(taken[:9])}  # only the beginning is decoded
    assert clips_of(tmp_path, target_frames=(33,)) == {}


def test_keeping_every_frame_and_stating_the_rate(tmp_path):
    write_clip(tmp_path / "a.mkv", [round(1000 * index / 30) for index in range(20)])
    everything = {(0, 17): list(range(17))}
    assert clips_of(tmp_path, frame_extraction="full", target_fps=0) == everything
    assert clips_of(tmp_path, frame_extraction="full", source_fps=24) == everything
    assert clips_of(tmp_path, frame_extraction="full", source_fps=12, max_frames=9) == {(0, 9): [0, 0, 1, 1, 2, 2, 3, 3, 4]}
    for values, record in (({"target_fps": 0}, EVERY_FRAME), ({}, "24 from timestamps"), ({"source_fps": 12}, "24 from 12")):
        [target] = plan_targets(list_items(video_dataset(tmp_path, frame_extraction="full", **values))[0])
        assert target.record["frame_rate"] == record


def test_a_variable_rate_is_followed(tmp_path):
    times = [*range(0, 1000, 100), *range(1000, 2000, 25)]  # a second of 10 frames, then one of 40
    write_clip(tmp_path / "a.mkv", times)
    [(window, frames)] = clips_of(tmp_path, frame_extraction="full").items()
    assert window == (0, 45)
    for moment, frame in enumerate(frames):
        nearest = min(abs(time - 1000 * moment / 24) for time in times)
        assert abs(times[frame] - 1000 * moment / 24) <= nearest + 2.1
