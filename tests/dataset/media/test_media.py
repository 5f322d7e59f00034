"""Pictures and videos of every kind become the same upright RGB frames, fitted to their bucket; damage is named."""

from __future__ import annotations

import struct
import sys
import tracemalloc
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from dataset.media import pictures, videos
from dataset.media.decoding import frame_times, iterate_frames, probe_video, read_clip_windows
from dataset.media.errors import MediaError
from dataset.media.pictures import probe_image, read_image
from dataset.media.resizing import fit_to_bucket

WHITE, RED = [255, 255, 255], [200, 0, 0]


@pytest.fixture
def noise() -> np.random.Generator:
    return np.random.default_rng(7)


def smooth_picture(width: int, height: int) -> np.ndarray:
    """Gradients: a picture that every correct resizing keeps nearly the same."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / (width - 1), y * 255 / (height - 1), 255 - x * 255 / (width - 1)], axis=2).astype(np.uint8)


# ---- pictures


def test_transparency_becomes_white(tmp_path):
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 128]]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    pixels = read_image(tmp_path / "rgba.png")
    assert pixels[0, :2].tolist() == [RED, WHITE]
    np.testing.assert_allclose(pixels[0, 2], 255 + 128 / 255 * (np.array(RED) - 255), atol=1)

    grey_alpha = np.array([[[90, 255], [90, 0]]], dtype=np.uint8)
    Image.fromarray(grey_alpha).save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png").tolist() == [[[90, 90, 90], WHITE]]


def test_palettes_with_and_without_transparency(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([200, 0, 0, 0, 90, 0, 1, 2, 3])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "plain.png")
    assert read_image(tmp_path / "plain.png").tolist() == [[RED, [0, 90, 0], [1, 2, 3]]]
    image.save(tmp_path / "clear.png", transparency=1)
    assert read_image(tmp_path / "clear.png").tolist() == [[RED, WHITE, [1, 2, 3]]]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_greys_are_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    path = tmp_path / f"deep{suffix}"
    Image.fromarray(values).save(path)
    assert read_image(path)[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, WHITE]


@pytest.mark.parametrize(("values", "expected"), [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 100.0, 255.0], [0, 100, 255])])
def test_floating_point_greys(tmp_path, values, expected):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "f.tif")
    assert read_image(tmp_path / "f.tif")[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "dtype"), [([0, np.nan], "f"), ([-1, 0], "f"), ([0, 1e6], "f"), ([0, np.inf], "f"), ([0, 70000], np.int32)]
)
def test_values_without_agreed_meaning_are_refused(tmp_path, values, dtype):
    Image.fromarray(np.array([values], dtype=dtype)).save(tmp_path / "odd.tif")
    with pytest.raises(MediaError, match=r"odd\.tif holds values"):
        read_image(tmp_path / "odd.tif")


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "RGB"])
def test_other_modes_keep_their_colours(tmp_path, mode):
    original = Image.fromarray(smooth_picture(32, 24)).convert(mode)
    path = tmp_path / "other.tif"
    original.save(path)
    np.testing.assert_allclose(read_image(path), np.asarray(original.convert("RGB")), atol=1)


# what the orientation tag says must be done to the stored picture, as numpy writes it
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".jpg"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(tmp_path, orientation, suffix):
    stored = smooth_picture(48, 32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"phone{suffix}"
    options = {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {"lossless": True}
    Image.fromarray(stored).save(path, exif=exif, **options)
    expected = UPRIGHT[orientation](stored)
    np.testing.assert_allclose(read_image(path).astype(int), expected, atol=4 if suffix == ".jpg" else 0)
    assert probe_image(path)[0] == (expected.shape[1], expected.shape[0])


def test_probing_reads_the_header_only(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(smooth_picture(300, 200)).save(path)
    path.write_bytes(path.read_bytes()[:200])
    assert probe_image(path)[0] == (300, 200)
    with pytest.raises(MediaError, match=r"photo\.png cannot be decoded"):
        read_image(path)
    with pytest.raises(MediaError, match=r"none\.png does not exist"):
        probe_image(tmp_path / "none.png")


def test_postscript_named_like_a_picture_starts_no_program(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **options: started.append(arguments))
    path = tmp_path / "drawing.png"
    Image.new("RGB", (8, 8)).save(path, format="EPS")
    with Image.open(path) as image:
        assert image.format == "EPS"  # Pillow would read it
    for read in (read_image, probe_image):
        with pytest.raises(MediaError, match=r"drawing\.png cannot be decoded"):
            read(path)
    assert not started


@pytest.mark.parametrize("content", ["PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_the_content_counts_and_not_the_ending(tmp_path, content):
    if content not in {"MPO", *pictures.readable_formats()}:
        pytest.skip(f"this Pillow cannot read {content}")
    path = tmp_path / "photo.png"
    picture = Image.new("RGB", (16, 8), (200, 0, 0))
    # MPO is for several pictures: with one alone Pillow writes a JPEG
    picture.save(path, format=content, **({"save_all": True, "append_images": [picture]} if content == "MPO" else {}))
    assert probe_image(path)[0] == (16, 8)
    np.testing.assert_allclose(read_image(path)[4, 8].astype(int), RED, atol=6)


@pytest.fixture
def fresh_plugins():
    """Image plugins are looked for again, before and after the test."""
    pictures.readable_formats.cache_clear()
    yield
    pictures.readable_formats.cache_clear()


def test_a_format_without_its_package_says_what_to_install(tmp_path, monkeypatch, fresh_plugins):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "photo.JXL").write_bytes(b"\xff\x0a" + bytes(20))
    with pytest.raises(MediaError, match=r"photo\.JXL cannot be decoded .*pip install pillow-jxl-plugin"):
        read_image(tmp_path / "photo.JXL")


def test_installed_image_plugins_are_used(tmp_path, monkeypatch, fresh_plugins):
    plugin = "from PIL import Image, BmpImagePlugin\nImage.register_open('JXL', BmpImagePlugin.BmpImageFile)\n"
    (tmp_path / "pillow_jxl.py").write_text(plugin, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    Image.new("RGB", (4, 4), (200, 0, 0)).save(tmp_path / "photo.bmp")
    read_image(tmp_path / "photo.bmp")
    assert "JXL" in pictures.readable_formats()
    del Image.OPEN["JXL"]
    Image.ID.remove("JXL")


# ---- videos


def write_video(path: Path, frames: np.ndarray, codec: str, pixel_format: str, **options: str) -> Path:
    """Encode (F, H, W, 3) uint8 RGB frames, without loss where the codec can."""
    mux_options = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    with av.open(str(path), "w", options=mux_options) as container:
        stream = container.add_stream(codec, rate=24)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.options = options
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def lossless_clip(tmp_path, noise) -> tuple[Path, np.ndarray]:
    """Twenty noisy frames of 64x32 that can be compared to the bit."""
    frames = noise.integers(0, 256, (20, 32, 64, 3), dtype=np.uint8)
    return write_video(tmp_path / "clip.mkv", frames, "ffv1", "bgr0"), frames


def test_real_clips(real_media):
    bikes = next(path for path in real_media.clips if path.name == "bikes.mp4")
    info = probe_video(bikes)
    assert (info.width, info.height, info.fps) == (640, 272, 25.0)
    assert len(frame_times(bikes)) == 250
    with av.open(str(bikes)) as container:
        for expected, frame in zip(container.decode(video=0), iterate_frames(bikes)):
            assert frame.dtype == np.uint8
            np.testing.assert_array_equal(frame, expected.to_ndarray(format="rgb24"))
            if expected.pts and expected.pts > 3000:
                break


def test_every_frame_comes_once_and_in_order(lossless_clip):
    path, frames = lossless_clip
    np.testing.assert_array_equal(np.stack(list(iterate_frames(path))), frames)
    assert len(frame_times(path)) == 20
    assert len(frame_times(path, limit=(7, 0.0))) == 7
    assert len(frame_times(path, limit=(100, 0.0))) == 20
    info = probe_video(path)
    assert (info.width, info.height, info.fps) == (64, 32, 24.0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows allows no colon in a name")
def test_names_that_look_like_protocols_are_files(lossless_clip, monkeypatch):
    path, _ = lossless_clip
    name = "http:x.mkv"
    path.rename(path.with_name(name))
    monkeypatch.chdir(path.parent)
    assert len(frame_times(Path(name))) == 20
    assert probe_video(Path(name)).width == 64


# a, b, c, d of the display matrix: x' = a x + c y, y' = b x + d y
MATRICES = [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1), (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0), (0, -1, -1, 0)]


@pytest.mark.parametrize("matrix", MATRICES)
def test_rotation_and_mirroring_in_the_file(tmp_path, noise, matrix):
    frames = noise.integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    path = write_video(tmp_path / "phone.mp4", frames, "libx264rgb", "rgb24", qp="0")
    a, b, c, d = matrix
    data = bytearray(path.read_bytes())
    position = data.index(b"tkhd") + 44  # ISO/IEC 14496-12: the matrix of a version 0 track header
    one, w = 1 << 16, 1 << 30
    data[position : position + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, w)
    path.write_bytes(data)

    y, x = np.mgrid[0:32, 0:48]
    new_x, new_y = a * x + c * y, b * x + d * y
    new_x, new_y = new_x - new_x.min(), new_y - new_y.min()
    expected = np.zeros((new_y.max() + 1, new_x.max() + 1, 3), dtype=np.uint8)
    expected[new_y, new_x] = frames[0]
    np.testing.assert_array_equal(next(iterate_frames(path)), expected)
    info = probe_video(path)
    assert (info.height, info.width) == expected.shape[:2]


def test_windows_are_slices_of_the_fitted_frames(lossless_clip):
    path, frames = lossless_clip
    windows = [(8, 5), (0, 9), (0, 1), (3, 17), (8, 5), (19, 1)]
    clips = list(read_clip_windows(path, windows, (32, 16)))
    assert sorted(window for window, _ in clips) == sorted(set(windows))
    assert [sum(window) for window, _ in clips] == sorted(sum(window) for window, _ in clips)
    fitted = np.stack([fit_to_bucket(frame, (32, 16)) for frame in frames])
    for (start, length), clip in clips:
        assert clip.dtype == np.uint8
        np.testing.assert_array_equal(clip, fitted[start : start + length])


def test_only_frames_of_windows_are_converted(lossless_clip, monkeypatch):
    converted = []
    convert = videos.Video.rgb
    monkeypatch.setattr(videos.Video, "rgb", lambda video, frame, *size: converted.append(frame) or convert(video, frame, *size))
    assert len(list(read_clip_windows(lossless_clip[0], [(2, 1), (5, 5)], (32, 16)))) == 2
    assert len(converted) == 6


def test_memory_is_bounded_by_the_open_windows(tmp_path):
    frames = np.zeros((120, 128, 128, 3), dtype=np.uint8)
    path = write_video(tmp_path / "long.mkv", frames, "ffv1", "bgr0")
    windows = [(start, 5) for start in range(116)]
    frame_bytes = frames[0].nbytes
    tracemalloc.start()
    cut = sum(1 for _ in read_clip_windows(path, windows, (128, 128)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert cut == 116
    assert peak < 20 * frame_bytes  # of 120


def test_a_window_past_the_end_is_an_error_after_the_others(lossless_clip):
    clips = read_clip_windows(lossless_clip[0], [(0, 5), (10, 25)], (32, 16))
    assert next(clips)[0] == (0, 5)
    with pytest.raises(MediaError, match=r"clip\.mkv ends after 20 frames, but the clip of frames 10 to 34"):
        next(clips)


def cut_short(path: Path) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    return path


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("index_first.mp4", "libx264", {"movflags": "faststart"}), ("clip.mkv", "ffv1", {}), ("clip.webm", "libvpx", {})],
)
def test_half_a_download_is_not_a_short_clip(tmp_path, noise, name, codec, options):
    pixel_format = "bgr0" if codec == "ffv1" else "yuv420p"
    frames = noise.integers(0, 256, (20, 32, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / name, frames, codec, pixel_format, **options)
    assert len(frame_times(path)) == 20
    cut_short(path)
    for read in (frame_times, probe_video, lambda path: next(iterate_frames(path))):
        with pytest.raises(MediaError, match=r"is cut short: its last [0-9]+ bytes are missing"):
            read(path)


def test_a_damaged_frame_is_named(tmp_path, noise):
    frames = noise.integers(0, 256, (5, 32, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / "hurt.mov", frames, "png", "rgb24")
    data = bytearray(path.read_bytes())
    third = [i for i in range(len(data)) if data[i : i + 4] == b"\x89PNG"][2]
    data[third : third + 40] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"video .*hurt\.mov cannot be decoded"):
        frame_times(path)


def test_files_that_are_no_videos(tmp_path):
    with pytest.raises(MediaError, match=r"video .*none\.mp4 does not exist"):
        frame_times(tmp_path / "none.mp4")
    for read in (frame_times, read_image):
        with pytest.raises(MediaError, match=f"{tmp_path.name} is a folder"):
            read(tmp_path)


def endless_gif(path: Path, side: int, frames: int) -> Path:
    """A square canvas whose frames change one pixel each, in 23 bytes (GIF89a specification)."""
    size = side.to_bytes(2, "little")
    head = b"GIF89a" + size + size + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\x04\0\x01\0\0\0" + b"\x2c" + bytes(4) + b"\x01\0\x01\0\0" + b"\x02\x02\x44\x01\0"
    path.write_bytes(head + frame * frames + b";")
    return path


def test_a_file_of_endless_frames_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "MAX_FRAMES", 50)
    assert len(frame_times(endless_gif(tmp_path / "short.gif", 16, 50))) == 50
    with pytest.raises(MediaError, match=r"long\.gif has more than 50 frames; cut it into shorter ones"):
        frame_times(endless_gif(tmp_path / "long.gif", 16, 51))
    assert len(list(islice(iterate_frames(tmp_path / "long.gif"), 20))) == 20, "as far as it is needed"


def test_a_frame_of_many_bytes_is_refused(tmp_path, monkeypatch):
    with av.open(str(tmp_path / "deep.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p10le"
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24").reformat(format="yuv444p10le")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert len(frame_times(tmp_path / "deep.mp4")) == 1
    monkeypatch.setattr(videos, "MOST_FRAME_BYTES", 64 * 48 * 6 - 1)
    with pytest.raises(MediaError, match=r"too large to open safely \(64x48 pixels of 48 bits\)"):
        frame_times(tmp_path / "deep.mp4")


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_a_small_file_of_endless_pixels_is_refused(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(videos, "MAX_PIXELS", 10**6)
    monkeypatch.setattr(videos, "MAX_WEBP_PIXELS", 10**6)
    path = endless_gif(tmp_path / "a.gif", 500, 20)
    if ending == "webp":
        frames = [Image.new("RGB", (500, 500), (number, 0, 0)) for number in range(20)]
        frames[0].save(path := tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(MediaError, match=rf"a\.{ending} makes \d+ million pixels of \d+ bytes, .* may never end"):
        frame_times(path)
