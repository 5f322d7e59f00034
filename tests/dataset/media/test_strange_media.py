"""Media that could take all memory or never end: large pictures in many threads, large frames, views into the system."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dataset.config import DatasetConfig
from dataset.items import list_items
from dataset.media import pictures, videos
from dataset.media.decoding import probe_video
from dataset.media.errors import MediaError, reading
from dataset.media.memory import SharedMemory
from dataset.media.pictures import probe_image, read_image
from utils.errors import UserError
from utils.media.writing import save_video

LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "F")


def noise(mode: str) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (31, 17, 4), np.uint8)
    if mode in ("I;16", "F"):
        return Image.fromarray(values[..., 0].astype(np.uint16 if mode == "I;16" else np.float32) * (200 if mode == "I;16" else 1))
    return Image.fromarray(values, "RGBA").convert(mode)


@pytest.mark.parametrize("mode", MODES)
def test_bands_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    path = tmp_path / "a.tif"
    noise(mode).save(path)
    whole = read_image(path)
    monkeypatch.setattr(pictures, "BAND_PIXELS", 50)
    np.testing.assert_array_equal(read_image(path), whole)


@pytest.mark.parametrize("ending", ["png", "tif", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int, ending: str) -> None:
    monkeypatch.setattr(pictures, "BAND_PIXELS", 50)
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise("RGB").save(tmp_path / f"a.{ending}", exif=exif)
    with Image.open(tmp_path / f"a.{ending}") as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{ending}"), expected)


def test_threads_share_the_memory_of_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise("RGB").save(tmp_path / "a.png")
    need = 31 * 17 * pictures.USUAL_DECODING_BYTES
    at_work, most, lock, convert = 0, 0, threading.Lock(), pictures.picture_to_rgb

    def slowly(image: Image.Image, path: Path) -> np.ndarray:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.01)
        with lock:
            at_work -= 1
        return convert(image, path)

    monkeypatch.setattr(pictures, "picture_to_rgb", slowly)
    for total, expected in ((2 * need + 1, 2), (need // 2, 1)):
        most = 0
        monkeypatch.setattr(pictures, "_memory", SharedMemory(total))
        with ThreadPoolExecutor(8) as pool:
            assert len(list(pool.map(read_image, [tmp_path / "a.png"] * 12))) == 12
        assert most == expected


def test_a_picture_that_fails_gives_its_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise("RGB").save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[: len(content) // 2])
    monkeypatch.setattr(pictures, "_memory", SharedMemory(1))
    for _ in range(2):
        with pytest.raises(MediaError):
            read_image(tmp_path / "b.png")
    read_image(tmp_path / "a.png")


def test_what_is_too_large_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise("RGB").save(tmp_path / "a.png")
    monkeypatch.setattr(pictures, "MOST_DECODING_BYTES", 1000)
    monkeypatch.setattr(pictures, "picture_to_rgb", None)
    with pytest.raises(MediaError, match=r"a\.png is too large to open safely \(17x31 pixels\)"):
        read_image(tmp_path / "a.png")
    save_video(tmp_path / "a.mp4", np.zeros((2, 32, 64, 3), np.uint8), fps=24)
    noise("RGB").save(tmp_path / "a.webp", save_all=True, append_images=[noise("L").convert("RGB")])
    monkeypatch.setattr(videos, "MOST_FRAME_PIXELS", 500)
    for name in ("a.mp4", "a.webp"):
        with pytest.raises(MediaError, match="is too large to open safely"):
            probe_video(tmp_path / name)


def test_no_memory_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with (
        pytest.raises(MediaError, match=r"a\.png needs more memory than there is.*--num_workers"),
        reading(tmp_path / "a.png", "picture"),
    ):
        raise MemoryError


@LINUX
@pytest.mark.parametrize("target", ["/proc/self/status", "/proc/kmsg", "/sys/kernel/uevent_seqnum"])
def test_views_into_the_system_are_no_media_and_no_captions(tmp_path: Path, target: str) -> None:
    if not os.path.isfile(target):
        pytest.skip(f"no {target}")
    link = tmp_path / "a.png"
    link.symlink_to(target)
    for path in (link, Path(target)):
        for read in (read_image, probe_image, probe_video):
            with pytest.raises(MediaError, match="is a view into the system"):
                read(path)
    (tmp_path / "a.txt").symlink_to(target)
    with pytest.raises(UserError, match="is a view into the system"):
        list_items(DatasetConfig(0, "image", tmp_path, None, tmp_path / "cache", caption_extension=".txt"))
    (tmp_path / "a.jsonl").symlink_to(target)
    with pytest.raises(UserError, match="is a view into the system"):
        list_items(DatasetConfig(0, "image", None, tmp_path / "a.jsonl", tmp_path / "cache"))


def test_texts_of_great_size(tmp_path: Path) -> None:
    noise("RGB").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(UserError, match=r"the caption .*a\.txt is larger than 1024 KB"):
        list_items(DatasetConfig(0, "image", tmp_path, None, tmp_path / "cache", caption_extension=".txt"))
    (tmp_path / "a.jsonl").write_bytes(b'{"image_path": "a.png"}\n' + b"x" * ((1 << 20) + 1))
    with pytest.raises(UserError, match=r"a\.jsonl:2 is longer than 1024 KB"):
        list_items(DatasetConfig(0, "image", None, tmp_path / "a.jsonl", tmp_path / "cache"))
