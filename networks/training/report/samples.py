"""Samples in a report: small, encoded once, and thinned out evenly where they become too many for one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

from networks.training.report.record import SampleRecord
from utils.pages.media import clip_uri, picture_uri

PICTURE_SIDE = 384  # pixels
CLIP_SIDE = 320
CLIP_CRF = 30
MOST_CHARACTERS = 22 << 20  # of all samples of a page, in which 400 pictures have room


def small_media(path: Path) -> tuple[str, str]:
    """What a page shows of a sample: a picture, or the first frame of a clip, and the clip; as data URIs."""
    if path.suffix != ".mp4":
        with Image.open(path) as picture:
            return picture_uri(np.asarray(picture.convert("RGB")), PICTURE_SIDE), ""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        scale = min(1, CLIP_SIDE / max(stream.width, stream.height))
        size = {name: max(2, round(getattr(stream, name) * scale / 2) * 2) for name in ("width", "height")}
        # Made small one by one: all of them in their own size would take hundreds of MB.
        frames = [frame.to_ndarray(format="rgb24", **size) for frame in container.decode(stream)]
        fps = round(stream.average_rate)
    return picture_uri(frames[0], CLIP_SIDE), clip_uri(frames, fps, CLIP_SIDE, CLIP_CRF)


def thin_out(samples: Sequence[SampleRecord], most: int = MOST_CHARACTERS) -> None:
    """Empty the media of samples until at most so many characters are left.

    Whole steps go, evenly; the first and the newest stay as long as they fit.
    """
    sizes: dict[int, int] = {}
    for sample in samples:
        size = len(sample.uri) + len(sample.clip)
        if size:
            sizes[sample.step] = sizes.get(sample.step, 0) + size
    left = sum(sizes.values())
    steps = sorted(sizes)
    outdated: set[int] = set()
    while left > most and len(steps) > 2:
        # the one whose neighbours are nearest to each other
        place = min(range(1, len(steps) - 1), key=lambda place: steps[place + 1] - steps[place - 1])
        outdated.add(steps[place])
        left -= sizes[steps.pop(place)]
    for sample in samples:
        if sample.step in outdated:
            sample.uri = sample.clip = ""
    for sample in samples:  # of two steps that are too many already
        if left <= most:
            break
        left -= len(sample.uri) + len(sample.clip)
        sample.uri = sample.clip = ""
