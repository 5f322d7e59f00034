"""What the table that opens a training says of media without caches, and of caches that were made with other settings."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dataset.batches.cached_items import CachedGroup, find_cached_items
from dataset.batches.report import report_cached_group
from dataset.cache.files import save_latents, save_text
from dataset.cache.records import source_record
from dataset.cache.report import format_table
from dataset.config import DatasetConfig, DatasetGroup
from dataset.media.frame_rate import EVERY_FRAME, possible_records, resample
from dataset.media.frames import cut_windows

STAMPS = "24 from timestamps"


def cache_text(dataset: DatasetConfig, stem: str) -> None:
    states = torch.zeros(2, 4), torch.ones(2), torch.zeros(3)
    save_text(dataset.cache_directory / f"{stem}_hv_te.safetensors", *states, "x", {"text_encoder1": "x"})


def cached_clip(dataset: DatasetConfig, stem: str, windows, rate: str = EVERY_FRAME, with_record: bool = True) -> Path:
    """A clip of 64x64 with its text and the latents of ``windows``."""
    path = dataset.directory / f"{stem}.mp4"
    path.write_bytes(stem.encode())
    path.with_suffix(".txt").write_text("x", encoding="utf-8")
    for start, frames in windows:
        made = {"bucket": "64x64", "window": f"{start}-{frames}", "frame_rate": rate, "vae": "vae"}
        name = f"{stem}_{start:05d}-{frames:03d}_0064x0064_hv.safetensors"
        latents = torch.zeros(16, (frames - 1) // 4 + 1, 8, 8)
        save_latents(
            dataset.cache_directory / name, latents, (64, 64), frames, source_record(path, "video") | made if with_record else None
        )
    cache_text(dataset, stem)
    return path


@pytest.fixture
def dataset(tmp_path) -> DatasetConfig:
    return DatasetConfig(
        0, "video", tmp_path, None, tmp_path / "cache", resolution=(64, 64), caption_extension=".txt", target_frames=(5, 9)
    )


def group_of(dataset: DatasetConfig) -> CachedGroup:
    [group] = find_cached_items(DatasetGroup(dataset.directory / "d.toml", (dataset,)))
    return group


HEAD = [(0, 5), (0, 9)]
SLIDE = [(start, 5) for start in (0, 4, 8)]
UNIFORM = cut_windows(20, (5,), "uniform", sample=3)  # 0, 7, 15


@pytest.mark.parametrize(
    ("windows", "rate", "settings", "expected"),
    [
        (HEAD, EVERY_FRAME, {}, None),
        (HEAD, EVERY_FRAME, {"target_frames": (9,)}, "another window: 1"),
        (HEAD, EVERY_FRAME, {"frame_extraction": "full", "max_frames": 7}, "another window: 1"),
        (SLIDE, EVERY_FRAME, {"frame_extraction": "slide", "frame_stride": 2}, None),  # others are missing, these are right
        (SLIDE, EVERY_FRAME, {"frame_extraction": "slide", "frame_stride": 8}, "another window: 1"),
        (SLIDE, EVERY_FRAME, {"frame_extraction": "head"}, "another window: 2"),
        (SLIDE, EVERY_FRAME, {"frame_extraction": "full"}, "another window: 3"),  # there are at least 13 frames
        (UNIFORM, EVERY_FRAME, {"frame_extraction": "uniform", "frame_sample": 3}, None),
        (UNIFORM, EVERY_FRAME, {"frame_extraction": "uniform", "frame_sample": 4}, "another window: 1"),
        (HEAD, STAMPS, {"target_fps": 0}, "another frame rate: 2"),
        (HEAD, STAMPS, {"source_fps": 30}, "another frame rate: 2"),
        (HEAD, EVERY_FRAME, {"source_fps": 30}, "another frame rate: 2"),
        (HEAD, "24 from 30", {"source_fps": 30}, None),
        ([(0, 1)], STAMPS, {"target_frames": (1,), "target_fps": 0}, None),  # the first frame is the same at every rate
        (HEAD, STAMPS, {"resolution": (32, 32)}, "another size: 2"),
    ],
    ids=str,
)
def test_caches_made_with_other_settings_are_named(dataset, caplog, windows, rate, settings, expected):
    clip = cached_clip(dataset, "a", windows, rate)
    for _ in range(2):  # the second time with media that were copied
        group = group_of(replace(dataset, **settings))
        notes = report_cached_group(group).notes
        mismatches = [note for note in notes if "do not match" in note and "its time has" not in note]
        if expected is None:
            assert not mismatches
        else:
            reason, count = expected.split(": ")
            [note] = mismatches
            assert note.startswith(f"{count} cache(s) do not match, {reason}: a_")
            assert "--skip_existing" in caplog.text and "--remove_orphans" in caplog.text
        os.utime(clip, (1, 1))


def test_caches_without_a_record_are_not_judged(dataset):
    cached_clip(dataset, "a", SLIDE, with_record=False)
    [without_record, no_nine] = reversed(report_cached_group(group_of(dataset)).notes)
    assert without_record.startswith("3 cache(s) carry no record") and "9 frame(s)" in no_nine


@pytest.mark.parametrize("source_fps", [None, 12.0, 23.976, 24.0, 25.0, 30.0])
@pytest.mark.parametrize("target_fps", [0, 12, 24])
def test_every_record_that_a_clip_gets_is_possible(source_fps, target_fps):
    for fps in (source_fps,) if source_fps else (12, 24, 30):
        done = resample([index / fps for index in range(40)], fps, target_fps, given=source_fps is not None)
        assert (EVERY_FRAME if done is None else done.record) in possible_records(target_fps, source_fps)


# ---------------------------------------------------------------------------------------------------------------------
# Media without caches


def test_media_without_caches_are_counted_and_named(dataset, caplog):
    cached_clip(dataset, "a", HEAD)
    for index in range(7):
        (dataset.directory / f"new{index}.mp4").touch()
        (dataset.directory / f"new{index}.txt").touch()
    (dataset.directory / "no_caption.mp4").touch()
    report = report_cached_group(group_of(dataset))
    [note] = report.notes
    assert note == (
        "7 of 9 clip(s) have no cache: new0.mp4, new1.mp4, new2.mp4, new3.mp4, new4.mp4 and 2 more; run cache_latents.py "
        "(clips of fewer than 5 frame(s) get none)"
    )
    assert f"\n    {note}" in format_table([report])
    assert caplog.messages == [f"[[datasets]] number 1: {note}"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_frames": (5, 9, 13)}, "no clip has a cache of 13 frame(s)"),
        ({"target_frames": (5, 13, 9, 25)}, "no clip has a cache of 13 or 25 frame(s)"),
        ({"frame_extraction": "full", "target_frames": (1,)}, None),
        ({}, None),
    ],
)
def test_a_length_of_which_there_is_no_clip_is_told_without_a_warning(dataset, caplog, settings, says):
    cached_clip(dataset, "a", HEAD)
    notes = report_cached_group(group_of(replace(dataset, **settings))).notes
    assert (not notes) if says is None else notes[0].startswith(says)
    assert not caplog.messages
