"""Aspect-ratio buckets: at which size an image or a clip is trained.

Every size is (width, height) in pixels. Sides are multiples of 16: the VAE shrinks by 8, the transformer's patches by 2.
"""

from __future__ import annotations

import math
from functools import lru_cache

BUCKET_STEP = 16

Size = tuple[int, int]


def _round_down(side: int) -> int:
    return max(BUCKET_STEP, side - side % BUCKET_STEP)


@lru_cache(maxsize=256)
def bucket_resolutions(resolution: Size, enable_bucket: bool) -> tuple[Size, ...]:
    """Every size that items of a dataset of this ``resolution`` (sides of at least 16) can get, sorted.

    With buckets: widths in steps of 16 from half the square root of the area to the first step at or past the root, each with
    the tallest height that keeps the area, and the transposes. Without: the one resolution, rounded down to steps of 16.
    """
    width, height = resolution
    if not enable_bucket:
        return ((_round_down(width), _round_down(height)),)
    area = width * height
    root = math.isqrt(area)
    widths = range(_round_down(root // 2), root + BUCKET_STEP, BUCKET_STEP)
    sizes = {(width, area // width // BUCKET_STEP * BUCKET_STEP) for width in widths if area // width >= BUCKET_STEP}
    return tuple(sorted(sizes | {(height, width) for width, height in sizes}))


def choose_bucket(size: Size, resolution: Size, enable_bucket: bool, no_upscale: bool) -> Size:
    """The bucket for an image or a video of ``size``: the one whose width / height is nearest; on a tie the narrower.

    With ``no_upscale`` (and buckets) a picture whose area is at most that of ``resolution`` keeps its own size, each
    side rounded down to a multiple of 16 and at least 16.
    """
    width, height = size
    buckets = bucket_resolutions(tuple(resolution), enable_bucket)
    if not enable_bucket:
        return buckets[0]
    if no_upscale and width * height <= resolution[0] * resolution[1]:
        return _round_down(width), _round_down(height)
    aspect_ratio = width / height
    return min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - aspect_ratio))
