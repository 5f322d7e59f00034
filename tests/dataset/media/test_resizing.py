"""Frames are fitted to their bucket: cropped to the centre, enlarged with Lanczos, shrunk by exact means."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from dataset.media.resizing import fit_to_bucket, kept_box


@pytest.fixture
def noise() -> np.random.Generator:
    return np.random.default_rng(7)


def test_a_frame_of_the_bucket_size_is_unchanged(noise):
    frame = noise.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit_to_bucket(frame, (48, 32)), frame)


def test_one_equal_side_crops_the_centre_of_the_other(noise):
    frame = noise.integers(0, 256, (32, 60, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit_to_bucket(frame, (48, 32)), frame[:, 6:54])
    np.testing.assert_array_equal(fit_to_bucket(frame.transpose(1, 0, 2), (32, 48)), frame.transpose(1, 0, 2)[6:54])


def test_one_equal_side_and_a_smaller_other_side_is_enlarged():
    frame = np.linspace(0, 255, 48).astype(np.uint8)[None, :, None].repeat(16, axis=0).repeat(3, axis=2)
    fitted = fit_to_bucket(frame, (48, 32))
    assert fitted.shape == (32, 48, 3)
    # enlarged by two: the middle half of the width fills the bucket
    assert abs(int(fitted[0, 0, 0]) - 64) < 4
    assert abs(int(fitted[0, -1, 0]) - 191) < 4


@pytest.mark.parametrize(
    ("size", "bucket", "ratio"), [((96, 64), (48, 32), (2, 1)), ((72, 48), (48, 32), (3, 2)), ((84, 56), (48, 32), (7, 4))]
)
def test_shrinking_is_the_mean_of_the_covered_area(noise, size, bucket, ratio):
    """A picture whose pixels are repeated n times and averaged in blocks of m is shrunk by m / n exactly."""
    frame = noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    block, repeat = ratio
    fine = frame.repeat(repeat, axis=0).repeat(repeat, axis=1).astype(np.float64)
    means = fine.reshape(bucket[1], block, bucket[0], block, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(fit_to_bucket(frame, bucket), means, atol=0.501)


def test_shrinking_crops_the_centre(noise):
    frame = noise.integers(0, 256, (64, 120, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit_to_bucket(frame, (48, 32)), fit_to_bucket(np.ascontiguousarray(frame[:, 12:108]), (48, 32)))


def test_enlarging_is_lanczos_of_the_centre(noise):
    frame = noise.integers(0, 256, (16, 40, 3), dtype=np.uint8)
    enlarged = Image.fromarray(frame).resize((80, 32), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(fit_to_bucket(frame, (48, 32)), np.asarray(enlarged)[:, 16:64])


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (47, 31), (49, 33), (1000, 33), (49, 1000), (639, 481)])
def test_any_size_covers_the_bucket_without_a_border(size):
    frame = np.full((size[1], size[0], 3), 200, dtype=np.uint8)
    fitted = fit_to_bucket(frame, (48, 32))
    assert fitted.shape == (32, 48, 3)
    assert (fitted == 200).all()


@pytest.mark.parametrize(("size", "bucket"), [((120, 40), (32, 16)), ((40, 120), (16, 32)), ((70, 33), (32, 16))])
def test_the_kept_box_is_what_is_seen(size, bucket):
    left, top, width, height = kept_box(size, bucket)
    frame = np.zeros((size[1], size[0], 3), np.uint8)
    frame[math.floor(top) : math.ceil(top + height), math.floor(left) : math.ceil(left + width)] = 255
    assert fit_to_bucket(frame, bucket).min() == 255
    frame[math.ceil(top) : math.floor(top + height), math.ceil(left) : math.floor(left + width)] = 0
    assert fit_to_bucket(frame, bucket)[1:-1, 1:-1].max() == 0
