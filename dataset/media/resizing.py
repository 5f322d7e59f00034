"""Fitting frames to a bucket: pixels in, pixels out.

A frame is an array (height, width, 3) of uint8 in RGB. A bucket is (width, height).
"""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image


def kept_box(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, width and height of what ``fit_to_bucket`` keeps of a frame of ``size`` (W, H), in its pixels."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    width, height = min(size[0], bucket[0] / scale), min(size[1], bucket[1] / scale)
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return (int(left), int(top), *bucket) if scale == 1 else (left, top, width, height)


def fit_to_bucket(frame: np.ndarray, bucket: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, 3) uint8 to cover ``bucket`` and crop the centre -> (bucket height, bucket width, 3) uint8.

    Lanczos when enlarging. When shrinking, each pixel is the mean of the exact area it covers.
    """
    height, width = frame.shape[:2]
    left, top, covered_width, covered_height = kept_box((width, height), bucket)
    if (covered_width, covered_height) == bucket:
        return np.ascontiguousarray(frame[top : top + bucket[1], left : left + bucket[0]])
    if covered_width < bucket[0]:
        box = (left, top, left + covered_width, top + covered_height)
        return np.array(Image.fromarray(frame).resize(bucket, Image.Resampling.LANCZOS, box=box))
    rows = _area_taps(height, top, covered_height, bucket[1])
    columns = _area_taps(width, left, covered_width, bucket[0])
    first, last = columns[0].min(), columns[0].max()  # what is cut off needs no arithmetic
    shrunk = _shrink_rows(frame[:, first : last + 1], *rows).transpose(1, 0, 2)
    shrunk = _shrink_rows(shrunk, columns[0] - first, columns[1])
    return np.ascontiguousarray(np.rint(shrunk).astype(np.uint8).transpose(1, 0, 2))


@functools.lru_cache(maxsize=64)
def _area_taps(size: int, first: float, covered: float, out_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of ``size`` pixels, with which weights, make each of ``out_size`` pixels spread over ``covered`` from ``first``.

    Returns:
        Indices and float32 weights, both (taps, out_size); the weights are the shares of the covered area and sum to 1.
    """
    step = covered / out_size
    starts = first + step * np.arange(out_size)
    ends = starts + step
    indices = np.floor(starts).astype(np.int64) + np.arange(math.ceil(step) + 1)[:, None]
    overlaps = np.minimum(indices + 1, ends) - np.maximum(indices, starts)
    weights = np.where(indices < size, np.maximum(overlaps, 0), 0)
    weights /= weights.sum(axis=0)
    return np.minimum(indices, size - 1), weights.astype(np.float32)


def _shrink_rows(pixels: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sums of rows: (H, W, 3) -> float32 (out_size, W, 3)."""
    result = np.zeros((indices.shape[1], *pixels.shape[1:]), dtype=np.float32)
    for rows, weight in zip(indices, weights):
        result += weight[:, None, None] * pixels[rows]
    return result
