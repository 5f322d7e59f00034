"""Draw a small dataset: six pictures and two clips with captions, and the dataset TOML that names them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from utils.files import atomic_path
from utils.media.writing import save_picture, save_video

FRAMES_PER_SECOND = 24
SUPERSAMPLING = 4  # shapes are drawn larger and shrunk, which smooths their edges


@dataclass(frozen=True)
class Scene:
    """One shape on one background. ``travel`` is how far it moves to the right over a clip, in widths of the picture."""

    shape: str
    colour: str
    background: str
    size: tuple[int, int]
    travel: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.colour}_{self.shape}{'_moving' if self.travel else ''}"

    @property
    def caption(self) -> str:
        moving = " moving to the right" if self.travel > 0 else " moving to the left" if self.travel < 0 else ""
        return f"a {self.colour} {self.shape}{moving} on a {self.background} background"


PICTURES = (
    Scene("circle", "red", "blue", (96, 64)),
    Scene("square", "yellow", "green", (64, 96)),
    Scene("triangle", "white", "purple", (80, 80)),
    Scene("circle", "orange", "black", (128, 72)),
    Scene("square", "blue", "white", (72, 128)),
    Scene("triangle", "green", "yellow", (64, 64)),
)
CLIPS = (
    (Scene("circle", "red", "green", (96, 64), travel=0.5), 25),
    (Scene("square", "white", "blue", (64, 64), travel=-0.5), 13),
)

DATASET_TOML = """\
# Two datasets: a folder of pictures and a folder of clips. Captions are text files beside them.
# Paths are relative to the folder in which the scripts are started, so they are written out in full here.
[general]
resolution = [64, 64]
caption_extension = ".txt"
enable_bucket = true

[[datasets]]
image_directory = {images}
cache_directory = {image_cache}
batch_size = 2

[[datasets]]
video_directory = {clips}
cache_directory = {clip_cache}
batch_size = 1
target_frames = [1, 9]
frame_extraction = "head"
"""


def draw(scene: Scene, progress: float = 0.5) -> np.ndarray:
    """The scene at ``progress`` (0 to 1) of its movement: (H, W, 3) uint8 RGB."""
    width, height = (side * SUPERSAMPLING for side in scene.size)
    picture = Image.new("RGB", (width, height), scene.background)
    radius = min(width, height) * 0.25
    x = width * (0.5 + scene.travel * (progress - 0.5))
    y = height * 0.5
    box = (x - radius, y - radius, x + radius, y + radius)
    pen = ImageDraw.Draw(picture)
    if scene.shape == "circle":
        pen.ellipse(box, fill=scene.colour)
    elif scene.shape == "square":
        pen.rectangle(box, fill=scene.colour)
    else:
        pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=scene.colour)
    return np.asarray(picture.resize(scene.size, Image.Resampling.BOX))


def draw_clip(scene: Scene, frames: int) -> np.ndarray:
    """The whole movement: (frames, H, W, 3) uint8 RGB."""
    return np.stack([draw(scene, index / (frames - 1)) for index in range(frames)])


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def make_media(folder: Path) -> Path:
    """Write ``images/``, ``clips/`` and ``dataset.toml`` under ``folder``; returns the path of the TOML file."""
    folder = Path(folder).resolve()
    images, clips = folder / "images", folder / "clips"
    for scene in PICTURES:
        save_picture(images / f"{scene.name}.png", draw(scene))
        write_text(images / f"{scene.name}.txt", scene.caption + "\n")
    for scene, frames in CLIPS:
        save_video(clips / f"{scene.name}.mp4", draw_clip(scene, frames), FRAMES_PER_SECOND)
        write_text(clips / f"{scene.name}.txt", scene.caption + "\n")

    def quoted(path: Path) -> str:
        return json.dumps(path.as_posix(), ensure_ascii=False)  # a JSON string is a TOML string

    toml = DATASET_TOML.format(
        images=quoted(images),
        image_cache=quoted(folder / "image_cache"),
        clips=quoted(clips),
        clip_cache=quoted(folder / "clip_cache"),
    )
    write_text(folder / "dataset.toml", toml)
    return folder / "dataset.toml"
