"""Draw the data set that teaches the toy model what a zorp is: ten pictures and two clips with captions, and its TOML file.

It lies in examples/toy/concept; this writes it again, or somewhere else:

    python -m examples.toy.make_concept --output examples/toy/concept
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import av
import numpy as np

from examples.toy.world import COLOURS, generator
from examples.toy.zorp import draw_zorp, zorp_caption
from utils.arguments import script_parser
from utils.errors import run_script
from utils.files import atomic_path, require_writable_folder
from utils.media_writing import save_picture

ROOT = Path(__file__).resolve().parent.parent.parent
CONCEPT = ROOT / "examples" / "toy" / "concept"
CACHE = ROOT / "quickstart_output" / "cache"

SEED = 1
FRAMES_PER_SECOND = 24
CLIP_FRAMES = 17
PICTURES = (*COLOURS, "blue", "white")  # their backgrounds: each once, two of them twice
CLIPS = (("green", "right"), ("purple", "up"))  # (background, motion); the other motions are for the model to combine

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

[[datasets]]
video_directory = {clips}
cache_directory = {clip_cache}
target_frames = [9, 17]
frame_extraction = "head"
"""


def make_concept(folder: Path, cache: Path = CACHE) -> Path:
    """Write ``pictures/``, ``clips/`` and ``dataset.toml`` under ``folder``; returns the path of the TOML file.

    Args:
        cache: where the caching scripts shall put their files; only named in the TOML file.
    """
    pictures, clips = folder / "pictures", folder / "clips"
    for index, background in enumerate(PICTURES):
        rng = generator(SEED, index)  # of its own for each, so that changing one leaves the others as they are
        path = pictures / f"zorp_{index + 1:02d}_{background}.png"
        save_picture(path, draw_zorp(background, None, 1, rng)[0])
        write_text(path.with_suffix(".txt"), zorp_caption(background, None, rng) + "\n")
    for index, (background, motion) in enumerate(CLIPS, start=len(PICTURES)):
        rng = generator(SEED, index)
        path = clips / f"zorp_{index + 1:02d}_{background}_{motion}.mp4"
        save_lossless_video(path, draw_zorp(background, motion, CLIP_FRAMES, rng))
        write_text(path.with_suffix(".txt"), zorp_caption(background, motion, rng) + "\n")
    places = {"pictures": pictures, "clips": clips, "picture_cache": cache / "pictures", "clip_cache": cache / "clips"}
    toml = DATASET_TOML.format(**{name: toml_path(path) for name, path in places.items()})
    write_text(folder / "dataset.toml", toml)
    return folder / "dataset.toml"


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
    parser = script_parser("Draw the data set that teaches the toy model what a zorp is.")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where to write it")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="folder for the caches that its dataset.toml names (default: cache in --output; for the quickstart's data set "
        "quickstart_output/cache)",
    )
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    require_writable_folder(arguments.output, "--output")
    is_shipped = arguments.output.resolve() == CONCEPT
    cache = arguments.cache or (CACHE if is_shipped else arguments.output / "cache")
    config = make_concept(arguments.output, cache)
    print(f"{len(PICTURES)} pictures and {len(CLIPS)} clips with captions; data set description: {config}")


if __name__ == "__main__":
    run_script(main)
