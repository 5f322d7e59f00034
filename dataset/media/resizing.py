"""Fitting frames to a bucket: pixels in, pixels out.

A frame is an array (height, width, 3) of uint8 in RGB. A bucket is (width, height).
"""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image


def fit_to_bucket(frame: np.ndarray, bucket: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, 3) uint8 to cover ``bucket`` and crop the centre -> (bucket height, bucket width, 3) uint8.

    Lanczos when enlarging. When shrinking, each pixel is the mean of the exact area it covers.
    """
    height, width = frame.shape[:2]
    scale = max(bucket[0] / width, bucket[1] / height)
    covered_width, covered_height = min(width, bucket[0] / scale), min(height, bucket[1] / scale)
    left, top = (width - covered_width) / 2, (height - covered_height) / 2
    if scale == 1:
        left, top = int(left), int(top)
        return np.ascontiguousarray(frame[top : top + bucket[1], left : left + bucket[0]])
    if scale > 1:
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
