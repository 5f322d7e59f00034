"""Records of what made a cache: what they notice, what they leave alone, and what training says of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dataset.cache.records as records
from dataset.batches.cached_items import CachedGroup, find_cached_items
from dataset.batches.report import report_cached_group
from dataset.cache.files import save_latents, save_text
from dataset.cache.freshness import judge_latents, judge_text
from dataset.cache.names import latent_cache_path, list_caches, text_cache_path
from dataset.cache.preparation import Target
from dataset.cache.records import hash_source, is_same_source, mismatch, source_record
from dataset.config import DatasetConfig, DatasetGroup
from dataset.items import Item


def touch_later(path: Path) -> None:
    """Another modification time, as a copy or a download has."""
    later = path.stat().st_mtime_ns + 5 * 10**9
    os.utime(path, ns=(later, later))


def test_a_source_is_known_by_its_content_and_read_only_when_its_time_changed(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"0123456789")
    record = source_record(path, "video")
    read = []
    monkeypatch.setattr(records, "hash_source", lambda path, kind: read.append(path) or hash_source(path, kind))
    assert is_same_source(record, path, "video") and not read
    touch_later(path)
    assert is_same_source(record, path, "video", read=False) is None and not read
    assert all(is_same_source(record, path, "video") for _ in range(5)) and len(read) == 1  # once for all windows of a clip
    path.write_bytes(b"0123456780")
    touch_later(path)
    assert is_same_source(record, path, "video") is False  # as long as before
    path.write_bytes(b"0123")
    assert is_same_source(record, path, "video", read=False) is False


def test_large_videos_are_told_by_their_ends_and_pictures_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "WHOLE_BYTES", 99)
    monkeypatch.setattr(records, "PART_BYTES", 10)
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    hashes = {kind: hash_source(path, kind) for kind in ("image", "video")}
    for position, noticed_by in ((9, {"image", "video"}), (50, {"image"}), (90, {"image", "video"})):
        content = bytearray(100)
        content[position] = 1
        path.write_bytes(content)
        assert {kind for kind in hashes if hash_source(path, kind) != hashes[kind]} == noticed_by
    path.write_bytes(bytes(99))  # no longer large
    small = hash_source(path, "video")
    path.write_bytes(bytes(50) + b"1" + bytes(48))
    assert hash_source(path, "video") != small


def test_reasons_name_what_differs_and_what_is_not_written_is_not_compared():
    made = {"bucket": "64x48", "window": "0-9", "frame_rate": "every frame", "vae": "a", "caption1": "y", "tokenizer1": "b"}
    assert mismatch(made, {key: {value, "other"} for key, value in made.items()}) is None
    assert mismatch(made, {}) is None and mismatch({}, {"vae": {"a"}}) is None
    reasons = ["another size", "another window", "another frame rate", "another VAE", "another caption", "another tokenizer"]
    for key, reason in zip(made, reasons):
        assert mismatch(made, {key: {"other"}}) == reason


def judged(target: Target) -> str | None:
    return judge_latents(list_caches(target.item.dataset), target, "vae", skip_existing=True).reason


def test_caches_of_other_tools_are_judged_by_name_size_and_time(tmp_path):
    dataset = DatasetConfig(0, "video", tmp_path, None, tmp_path / "cache", resolution=(64, 64))
    source = tmp_path / "a.mp4"
    source.touch()
    target = Target(Item(dataset, source, "", "a"), (0, 9), (96, 64), (64, 64))
    assert judged(target) == "new"
    by_bucket = latent_cache_path(target.item, (64, 64), (0, 9))  # how other tools name it
    save_latents(by_bucket, torch.zeros(16, 3, 8, 8), (64, 64), 9)
    assert judged(target) is None
    os.utime(by_bucket, ns=(source.stat().st_mtime_ns - 1,) * 2)
    assert judged(target) == "source newer"
    by_bucket.rename(latent_cache_path(target.item, (32, 32), (0, 9)))
    assert judged(target) == "source replaced"
    save_latents(target.cache_path, torch.zeros(16, 3, 8, 6), (96, 64), 9)
    assert judged(target) == "another size"
    target.cache_path.write_bytes(target.cache_path.read_bytes()[:200])
    assert judged(target) == "unreadable"


def test_text_caches_that_are_cut_short_are_made_again(tmp_path):
    item = Item(DatasetConfig(0, "image", tmp_path, None, tmp_path / "cache"), tmp_path / "a.png", "x", "a")
    path = text_cache_path(item)
    assert judge_text(item, {}, skip_existing=True) == "new"
    save_text(path, torch.zeros(2, 4), torch.ones(2), torch.zeros(3), "x")
    assert judge_text(item, {"tokenizer1": "b"}, skip_existing=True) is None
    assert judge_text(item, {}, skip_existing=False) == "without --skip_existing"
    path.write_bytes(path.read_bytes()[:50])
    assert judge_text(item, {}, skip_existing=True) == "unreadable"


@pytest.fixture
def group(tmp_path) -> CachedGroup:
    """Three cached pictures a, b, c of 64x64 with captions; c's caches are of another tool."""
    dataset = DatasetConfig(
        0, "image", tmp_path, None, tmp_path / "cache", resolution=(64, 64), caption_extension=".txt", enable_bucket=True
    )
    for stem in "abc":
        path = tmp_path / f"{stem}.png"
        path.write_bytes(stem.encode() * 10)
        (tmp_path / f"{stem}.txt").write_text(f"caption of {stem}", encoding="utf-8")
        latents = None if stem == "c" else {**source_record(path, "image"), "bucket": "64x64", "vae": "vae"}
        text = None if stem == "c" else {"text_encoder1": "x"}
        save_latents(
            dataset.cache_directory / f"{stem}_0064x0064_hv.safetensors", torch.zeros(16, 1, 8, 8), (64, 64), None, latents
        )
        states = torch.zeros(2, 4), torch.ones(2), torch.zeros(3)
        save_text(dataset.cache_directory / f"{stem}_hv_te.safetensors", *states, f"caption of {stem}", text)
    [found] = find_cached_items(DatasetGroup(tmp_path / "d.toml", (dataset,)))
    return found


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda folder: (folder / "a.png").write_bytes(b"longer than before"), "source replaced: a_0064x0064_hv.safetensors"),
        (lambda folder: touch_later(folder / "b.png"), "source perhaps changed, its time has: b_0064x0064_hv.safetensors"),
        (lambda folder: (folder / "c.txt").write_text("new"), "another caption: c_hv_te.safetensors"),
        (lambda folder: (folder / "c.txt").unlink(), "another caption: c_hv_te.safetensors"),
        (lambda folder: (folder / "a.png").unlink(), "no such item any more: a_0064x0064_hv.safetensors"),
    ],
)
def test_training_warns_of_caches_that_do_not_match_and_reads_no_media(group, caplog, monkeypatch, change, note):
    change(group.dataset.directory)
    monkeypatch.setattr(records, "hash_source", None)
    without, found = report_cached_group(group).notes
    assert without.startswith("2 cache(s) carry no record")
    assert found == f"1 cache(s) do not match, {note}"
    assert "1 cache(s) do not match" in caplog.text and "--skip_existing" in caplog.text


def test_training_notices_another_resolution_even_without_the_media(group, tmp_path):
    changed = replace(group.dataset, resolution=(96, 96), directory=tmp_path / "gone")
    notes = report_cached_group(replace(group, dataset=changed)).notes
    assert notes[1].startswith("2 cache(s) do not match, another size: a_0064x0064")
    unchanged = replace(group.dataset, directory=tmp_path / "gone")
    assert len(report_cached_group(replace(group, dataset=unchanged)).notes) == 1
