"""Draw the dataset that teaches the toy model what a zorp is: pictures and clips with captions, and its TOML file.

Ten pictures and two clips show zorps. Beside them lie drawings of what the model knows already, for prior preservation: a
LoRA that sees only zorps makes zorps of everything. The dataset lies in examples/toy/concept; this writes it again, or
somewhere else:

    python -m examples.toy.make_concept --output examples/toy/concept
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import av
import numpy as np

from examples.toy.world import COLOURS, MOTIONS, caption, draw, generator, place, random_attributes
from examples.toy.zorp import draw_zorp, zorp_caption
from utils.cli.arguments import script_parser
from utils.errors import run_script
from utils.files import atomic_path, require_writable_folder
from utils.media.writing import save_picture

ROOT = Path(__file__).resolve().parent.parent.parent
CONCEPT = ROOT / "examples" / "toy" / "concept"
CACHE = ROOT / "quickstart_output" / "cache"

SEED = 1
FRAMES_PER_SECOND = 24
CLIP_FRAMES = 17
PICTURES = (*COLOURS, "blue", "white")  # their backgrounds: each once, two of them twice
CLIPS = (("green", "right"), ("purple", "up"))  # (background, motion); the other motions are for the model to combine
KNOWN_PICTURES, KNOWN_CLIPS = 96, 4 * len(MOTIONS)  # of what the model draws already; each motion in turn
KNOWN = 1000  # their random numbers begin here

DATASET_TOML = """\
# What a zorp is: a folder of pictures and a folder of clips, with captions in text files beside them.
# Relative paths start at the folder in which the scripts are started, which is that of the project.
[general]
resolution = [64, 64]
caption_extension = ".txt"
batch_size = 4

[[datasets]]
image_directory = {pictures}
cache_directory = {picture_cache}
num_repeats = 12

[[datasets]]
video_directory = {clips}
cache_directory = {clip_cache}
target_frames = [9]
frame_extraction = "slide"  # three windows from each clip of 17 frames
frame_stride = 4
num_repeats = 12

# What the model draws already, and is to draw as before: the next two.
[[datasets]]
image_directory = {known_pictures}
cache_directory = {known_picture_cache}
prior_preservation = true

[[datasets]]
video_directory = {known_clips}
cache_directory = {known_clip_cache}
prior_preservation = true
target_frames = [9]
frame_extraction = "head"
"""


def make_concept(folder: Path, cache: Path = CACHE) -> Path:
    """Write ``dataset.toml`` and its folders of pictures and clips under ``folder``; returns the path of the TOML file.

    Args:
        cache: where the caching scripts shall put their files; only named in the TOML file.
    """
    for index, background in enumerate(PICTURES):
        rng = generator(SEED, index)  # of its own for each, so that changing one leaves the others as they are
        drawing = draw_zorp(background, None, 1, rng)
        _save(folder / "pictures" / f"zorp_{index + 1:02d}_{background}", drawing, zorp_caption(background, None, rng))
    for index, (background, motion) in enumerate(CLIPS, start=len(PICTURES)):
        rng = generator(SEED, index)
        drawing = draw_zorp(background, motion, CLIP_FRAMES, rng)
        _save(folder / "clips" / f"zorp_{index + 1:02d}_{background}_{motion}", drawing, zorp_caption(background, motion, rng))
    for index in range(KNOWN_PICTURES + KNOWN_CLIPS):
        rng = generator(SEED, KNOWN + index)
        motion = MOTIONS[(index - KNOWN_PICTURES) % len(MOTIONS)] if index >= KNOWN_PICTURES else None
        attributes = replace(random_attributes(rng, moving=False), motion=motion)
        drawing = draw(place(attributes, CLIP_FRAMES if motion else 1, rng))
        name = f"{index + 1:03d}_{attributes.colour}_{attributes.shape}" + (f"_{motion}" if motion else "")
        _save(folder / ("known_clips" if motion else "known_pictures") / name, drawing, caption(attributes, rng))
    names = ("pictures", "clips", "known_pictures", "known_clips")
    places = {name: folder / name for name in names}
    places |= {f"{name.removesuffix('s')}_cache": cache / name for name in names}
    toml = DATASET_TOML.format(**{name: toml_path(path) for name, path in places.items()})
    write_text(folder / "dataset.toml", toml)
    return folder / "dataset.toml"


def _save(path: Path, frames: np.ndarray, text: str) -> None:
    """A clip, or a picture where there is one frame, at ``path`` with the suffix it needs, and its caption beside it."""
    if len(frames) > 1:
        save_lossless_video(path.with_suffix(".mp4"), frames)
    else:
        save_picture(path.with_suffix(".png"), frames[0])
    write_text(path.with_suffix(".txt"), text + "\n")


def toml_path(path: Path) -> str:
    """``path`` in quotes, relative to the project folder if it lies there, so that the project may lie anywhere."""
    absolute = Path(os.path.abspath(path))
    shown = absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute
    return json.dumps(shown.as_posix(), ensure_ascii=False)  # a JSON string is a TOML string


def save_lossless_video(path: Path, frames: np.ndarray) -> None:
    """Write uint8 RGB frames (T, H, W, 3) as H.264 that decodes to the same pixels.

    The usual 4:2:0 has one colour for four pixels, which greys the thin stripes of a zorp; in RGB nothing is shared.
    """
    height, width = frames.shape[1:3]
    with atomic_path(path) as temporary, av.open(str(temporary), mode="w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=FRAMES_PER_SECOND, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser("Draw the dataset that teaches the toy model what a zorp is.")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where to write it")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="folder for the caches that its dataset.toml names (default: cache in --output; for the quickstart's dataset "
        "quickstart_output/cache)",
    )
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    require_writable_folder(arguments.output, "--output")
    is_shipped = arguments.output.resolve() == CONCEPT
    cache = arguments.cache or (CACHE if is_shipped else arguments.output / "cache")
    config = make_concept(arguments.output, cache)
    known = f"{KNOWN_PICTURES} pictures and {KNOWN_CLIPS} clips of what the model knows"
    print(f"{len(PICTURES)} pictures and {len(CLIPS)} clips of zorps, {known}; dataset description: {config}")


if __name__ == "__main__":
    run_script(main)
