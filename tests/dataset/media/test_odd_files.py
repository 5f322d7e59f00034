"""Files as phones, cameras, discs and programs write them, against what ffmpeg and ImageMagick read from them (odd/make.py)."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

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


def test_every_transparency_of_every_value_is_over_white(tmp_path: Path) -> None:
    value, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("png", rate=24)
        stream.width, stream.height, stream.pix_fmt = 256, 256, "rgba"
        frame = av.VideoFrame.from_ndarray(np.stack([value, value, value, alpha], axis=-1), "rgba")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    [found] = iterate_frames(tmp_path / "a.mov")
    share = alpha / 255
    assert np.array_equal(found[..., 0], np.floor(value * share + 255 * (1 - share) + 0.5 + 1e-9))


def test_a_circle_on_a_disc_is_round() -> None:
    frame = next(iterate_frames(CASES / "dvd.mp4")).astype(int)
    assert frame.shape == (576, 1024, 3)
    rows, columns = np.nonzero(np.abs(frame - frame[0, 0]).sum(-1) > 150)
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 3


def write_clip(path: Path, codec: str = "mpeg2video", size: tuple[int, int] = (64, 48), **options: object) -> Path:
    """A grey clip; options are attributes of the codec."""
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for name, value in options.items():
            setattr(stream.codec_context, name, value)
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 120, np.uint8), "rgb24").reformat(format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_absurd_pixels_are_refused(tmp_path: Path) -> None:
    path, pasp = tmp_path / "a.mp4", b"pasp" + struct.pack(">2I", 64, 45)
    path.write_bytes((CASES / "dvd.mp4").read_bytes().replace(pasp, b"pasp" + struct.pack(">2I", 1, 1000)))
    with pytest.raises(MediaError, match="its pixels are 1/1000 times as wide as high"):
        probe_video(path)


def test_an_interlaced_clip_may_change_its_size(tmp_path: Path) -> None:
    flags = av.codec.context.Flags.interlaced_dct | av.codec.context.Flags.interlaced_me
    parts = [write_clip(tmp_path / f"{size[0]}.ts", size=size, flags=flags) for size in ((64, 48), (96, 64))]
    (tmp_path / "both.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    assert probe_video(tmp_path / "both.ts").done == "deinterlaced"
    assert {frame.shape for frame in iterate_frames(tmp_path / "both.ts")} == {(48, 64, 3), (64, 96, 3)}


def test_colours_that_nothing_reads_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes((ODD / "hlg.mp4").read_bytes().replace(b"hev1", b"dvh1"))
    with pytest.raises(MediaError, match="Dolby Vision alone"):
        probe_video(tmp_path / "a.mp4")
    with pytest.raises(MediaError, match="matrix 14 of"):
        probe_video(write_clip(tmp_path / "b.mkv", codec="libx264", colorspace=14))


@pytest.mark.parametrize("name", ["cmyk.jpg", "grey_profile.png"])
def test_the_profile_of_another_kind_of_picture_is_named(tmp_path: Path, name: str) -> None:
    with Image.open(ODD / name) as other:
        profile = other.info["icc_profile"]
    Image.new("RGB", (8, 8), (200, 60, 60)).save(tmp_path / "a.png", icc_profile=profile)
    assert probe_image(tmp_path / "a.png")[1] == "unreadable colour profile, taken for sRGB"
    assert read_image(tmp_path / "a.png")[0, 0].tolist() == [200, 60, 60]


@pytest.mark.parametrize(
    ("kind", "content", "done"),
    [
        (b"iCCP", b"name\0\0no zlib", "unreadable colour profile, taken for sRGB"),
        (b"cHRM", struct.pack(">8I", *[31270, 32900] * 4), ""),  # all primaries are one colour
    ],
)
def test_broken_colour_chunks_of_a_png(tmp_path: Path, kind: bytes, content: bytes, done: str) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), (200, 60, 60)).save(path)
    png = path.read_bytes()
    chunks = [(b"gAMA", struct.pack(">I", 45455)), (kind, content)]
    written = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    path.write_bytes(png[:33] + b"".join(written) + png[33:])
    assert probe_image(path)[1] == done and read_image(path)[0, 0].tolist() == [200, 60, 60]


@pytest.mark.skipif("AVIF" not in readable_formats(), reason="nothing that reads AVIF is installed")
def test_the_colours_of_a_gain_map_are_not_those_of_the_picture(tmp_path: Path) -> None:
    content = (ODD / "hlg.avif").read_bytes()
    meta, pixels = content.index(b"meta") - 4, content.index(b"mdat") + 4
    other = struct.pack(">I4s8s4H", 24, b"free", b"colrnclx", 1, 13, 1, 0)  # before that of the picture
    moved = content[meta:].replace(struct.pack(">I", pixels), struct.pack(">I", pixels + len(other)))
    (tmp_path / "a.avif").write_bytes(content[:meta] + other + moved)
    assert probe_image(tmp_path / "a.avif")[1] == "HLG to SDR"


def test_an_animation_has_the_colours_of_its_profile(tmp_path: Path) -> None:
    with Image.open(ODD / "adobe.png") as image:
        profile, first = image.info["icc_profile"], image.convert("RGB")
    path = tmp_path / "a.webp"
    first.save(path, save_all=True, append_images=[first.transpose(0)], duration=40, icc_profile=profile, lossless=True)
    assert probe_video(path).done.startswith("Compatible with Adobe RGB (1998) to sRGB")
    assert np.array_equal(next(iterate_frames(path)), read_image(ODD / "adobe.png"))
