"""Decoding in threads: what items call for, order, bounded memory, and broken files that stop nothing."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

import dataset.cache.preparation as preparation
from dataset.cache.caching import print_failures
from dataset.cache.preparation import Failure, Finished, Prepared, plan_targets, prepare, prepare_item
from dataset.config import DatasetConfig
from dataset.items import Item, list_items
from dataset.media import videos
from dataset.media.decoding import iterate_frames
from dataset.media.memory import SharedMemory
from dataset.media.videos import decoding_bytes
from utils.media.writing import save_video
from utils.processes.watchdog import Watchdog


def image_dataset(folder: Path, **values) -> DatasetConfig:
    return DatasetConfig(0, "image", folder, None, folder / "cache", caption_extension=".txt", **{"resolution": (64, 64), **values})


def video_dataset(folder: Path, **values) -> DatasetConfig:
    return DatasetConfig(0, "video", folder, None, folder / "cache", caption_extension=".txt", **{"resolution": (32, 32), **values})


def write_pictures(folder: Path, count: int) -> list[str]:
    """Flat pictures of 64x64 whose grey is their number."""
    for number in range(count):
        Image.new("RGB", (64, 64), (number, number, number)).save(folder / f"{number:03d}.png")
    return [f"{number:03d}" for number in range(count)]


def write_clip(path: Path, frames: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """A clip that gets brighter by four from frame to frame."""
    clip = np.stack([np.full((size[1], size[0], 3), 4 * number, np.uint8) for number in range(frames)])
    save_video(path, clip, fps=24)
    return clip


def test_picture_calls_for_one_cache_named_by_its_upright_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (100, 50), "red").save(tmp_path / "turned.jpg", exif=exif)
    [target] = plan_targets(list_items(image_dataset(tmp_path, enable_bucket=True))[0])
    assert target.original_size == (50, 100) and target.window is None and target.frames == 1
    assert target.bucket[0] < target.bucket[1]
    assert target.cache_path == tmp_path / "cache" / "turned_0050x0100_hv.safetensors"
    results = list(prepare_item(target.item))
    assert results[0].pixels.shape == (1, target.bucket[1], target.bucket[0], 3)


def test_windows_of_a_clip_hold_its_frames(tmp_path):
    write_clip(tmp_path / "a_b.mp4", 22)
    dataset = video_dataset(tmp_path, resolution=(64, 48), target_frames=(1, 9), frame_extraction="chunk")
    results = list(prepare(list_items(dataset), 2))
    clips = {result.target.window: result for result in results if isinstance(result, Prepared)}
    assert set(clips) == {*((start, 1) for start in range(22)), (0, 9), (9, 9)}
    assert clips[9, 9].target.cache_path.name == "a_b_00009-009_0064x0048_hv.safetensors"
    frames = np.stack(list(iterate_frames(tmp_path / "a_b.mp4")))
    np.testing.assert_array_equal(clips[9, 9].pixels, frames[9:18])
    np.testing.assert_array_equal(clips[21, 1].pixels, frames[21:])
    assert results[-1] == Finished(results[-1].item, results[-1].source, results[-1].targets, decoded=True)
    assert {target.window for target in results[-1].targets} == set(clips)


def test_the_first_frame_is_seen_whole_before_it_is_fitted(tmp_path):
    write_clip(tmp_path / "a.mp4", 10)
    dataset = video_dataset(tmp_path, target_frames=(5,), frame_extraction="chunk")
    *results, _ = prepare_item(list_items(dataset)[0], see=lambda frame: (frame.shape, frame.mean() // 2))
    assert [result.seen for result in results] == [((48, 64, 3), 0)] * 2
    write_pictures(tmp_path, 1)
    assert next(prepare_item(list_items(image_dataset(tmp_path, resolution=(32, 16)))[0], see=np.shape)).seen == (64, 64, 3)


def test_only_wanted_targets_are_decoded(tmp_path, monkeypatch):
    write_clip(tmp_path / "a.mp4", 10)
    item = list_items(video_dataset(tmp_path, target_frames=(1, 5)))[0]
    results = list(prepare_item(item, wanted=lambda target: target.frames == 5))
    assert [result.target.window for result in results[:-1]] == [(0, 5)]
    assert len(results[-1].targets) == 2 and results[-1].decoded
    monkeypatch.setattr(preparation, "read_clip_windows", None)  # calling it would be a failure
    [finished] = prepare_item(item, wanted=lambda target: False)
    assert len(finished.targets) == 2 and not finished.decoded


def test_results_come_in_the_order_of_the_items(tmp_path, monkeypatch):
    stems = write_pictures(tmp_path, 12)
    read = preparation.read_image

    def read_unevenly(path: Path, bucket: tuple[int, int], *see) -> np.ndarray:
        time.sleep(0.02 * (int(path.stem) % 3))
        return read(path, bucket, *see)

    monkeypatch.setattr(preparation, "read_image", read_unevenly)
    results = list(prepare(list_items(image_dataset(tmp_path)), num_workers=3))
    assert [result.target.item.stem for result in results[::2]] == stems
    assert [result.item.stem for result in results[1::2]] == stems
    assert [int(result.pixels.mean()) for result in results[::2]] == list(range(12))


def test_workers_do_not_run_ahead_of_the_reader(tmp_path, monkeypatch):
    write_pictures(tmp_path, 30)
    started = []
    read = preparation.read_image
    monkeypatch.setattr(preparation, "read_image", lambda *given: started.append(given) or read(*given))
    results = prepare(list_items(image_dataset(tmp_path)), num_workers=2)
    next(results)
    time.sleep(0.3)
    assert len(started) <= 4  # two at work, two more waiting
    results.close()
    assert len(started) <= 4


def test_windows_wait_until_they_are_read(tmp_path, monkeypatch):
    """A long clip cut into many windows must not pile up in memory."""
    write_clip(tmp_path / "a.mp4", 20)
    cut = []
    read = preparation.read_clip_windows

    def counting(*arguments):
        for window, pixels in read(*arguments):
            cut.append(window)
            yield window, pixels

    monkeypatch.setattr(preparation, "read_clip_windows", counting)
    results = prepare(list_items(video_dataset(tmp_path, frame_extraction="chunk")), num_workers=1)
    next(results)
    time.sleep(0.3)
    assert len(cut) <= 3  # one read, one waiting, one about to wait
    results.close()


def test_broken_files_are_named_and_the_others_go_on(tmp_path):
    write_pictures(tmp_path, 3)
    (tmp_path / "000.png").write_bytes(b"not a picture")
    data = (tmp_path / "001.png").read_bytes()
    (tmp_path / "001.png").write_bytes(data[: len(data) // 2])
    items = list_items(image_dataset(tmp_path))
    items.append(Item(items[0].dataset, tmp_path / "gone.png", "", "gone"))
    results = list(prepare(items, 2))
    assert [type(result) for result in results] == [Failure, Failure, Prepared, Finished, Failure]
    for result, name in zip([results[0], results[1], results[4]], ["000.png", "001.png", "gone.png"]):
        assert name in result.message and result.item.path.name == name


def test_unforeseen_error_of_a_decoder_names_the_file(tmp_path, monkeypatch):
    write_pictures(tmp_path, 2)

    def fail(*_given: object) -> np.ndarray:
        raise ZeroDivisionError("in some decoder")

    monkeypatch.setattr(preparation, "read_image", fail)
    results = list(prepare(list_items(image_dataset(tmp_path)), 2))
    assert [result.message for result in results] == [
        f"{tmp_path / name}: ZeroDivisionError: in some decoder" for name in ("000.png", "001.png")
    ]


def test_failures_show_characters_that_nobody_sees(capsys):
    print_failures([Failure(None, "picture a\u200b.png does not exist.")])
    assert "picture a<U+200B>.png does not exist." in capsys.readouterr().err


def test_a_file_that_is_read_for_too_long_is_named(tmp_path, monkeypatch, caplog):
    write_pictures(tmp_path, 3)
    read_image = preparation.read_image

    def is_said() -> bool:
        return any(line.endswith(f"reading {tmp_path / '001.png'}") for line in caplog.messages)

    def hangs(path, *rest):
        ends = time.monotonic() + 10
        while path.name == "001.png" and not is_said() and time.monotonic() < ends:
            time.sleep(0.01)
        return read_image(path, *rest)

    monkeypatch.setattr(preparation, "read_image", hangs)
    with Watchdog(0.05) as watchdog:
        results = list(prepare(list_items(image_dataset(tmp_path)), 2, watchdog=watchdog))
    assert is_said() and sum(isinstance(result, Prepared) for result in results) == 3


def test_clips_of_large_frames_are_not_read_all_at_once(tmp_path, monkeypatch):
    for number in range(6):
        write_clip(tmp_path / f"{number}.mp4", 9)
    at_once, most, lock, read_clip_windows = 0, 0, threading.Lock(), preparation.read_clip_windows

    def counted(*arguments):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02)
        yield from read_clip_windows(*arguments)
        with lock:
            at_once -= 1

    monkeypatch.setattr(preparation, "read_clip_windows", counted)
    monkeypatch.setattr(preparation, "decoding_bytes", lambda path: 10)
    items = list_items(video_dataset(tmp_path, target_frames=(1, 5)))
    expected = [*((number, frames) for number in range(6) for frames in (1, 5))]
    for total, allowed in ((9, 1), (25, 3), (1000, 6)):
        monkeypatch.setattr(preparation, "CLIP_MEMORY", SharedMemory(total))
        most = 0
        results = [result for result in prepare(items, 5) if isinstance(result, Prepared)]
        assert [(int(result.target.item.stem), result.target.frames) for result in results] == expected
        assert most <= allowed and (total < 1000 or most > 3), (total, most)


def test_large_frames_are_known_by_the_header(tmp_path, monkeypatch):
    write_clip(tmp_path / "a.mp4", 2)
    assert decoding_bytes(tmp_path / "a.mp4") == 0
    monkeypatch.setattr(videos, "LARGE_FRAME_PIXELS", 64 * 48 - 1)
    assert decoding_bytes(tmp_path / "a.mp4") == 64 * 48 * (17 * 12 // 8 + 14)
