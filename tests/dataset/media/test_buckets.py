"""Bucket sizes against the reference trainer's choices, and the sizes it failed on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.media.buckets import bucket_resolutions, choose_bucket

REFERENCE = json.loads((Path(__file__).resolve().parents[2] / "goldens" / "buckets.json").read_text(encoding="utf-8"))

sides = st.integers(1, 5000)
resolutions = st.tuples(st.integers(16, 2048), st.integers(16, 2048))


@pytest.mark.parametrize(
    "config", REFERENCE["configs"], ids=lambda c: f"{c['resolution']}-{c['enable_bucket']}-{c['no_upscale']}".replace(" ", "")
)
def test_buckets_equal_the_reference(config):
    resolution, enabled = tuple(config["resolution"]), config["enable_bucket"]
    assert [list(size) for size in bucket_resolutions(resolution, enabled)] == config["bucket_resolutions"]
    chosen = [choose_bucket(tuple(size), resolution, enabled, config["no_upscale"]) for size in config["image_sizes"]]
    assert [list(size) for size in chosen] == config["chosen"]


@pytest.mark.parametrize("size", [(3000, 400), (20, 20), (960, 544)])
@pytest.mark.parametrize("no_upscale", [False, True])
def test_without_buckets_there_is_one_size(size, no_upscale):
    assert choose_bucket(size, (1000, 550), False, no_upscale) == (992, 544)
    assert bucket_resolutions((1000, 550), False) == ((992, 544),)


def test_smallest_resolution_and_sides_below_16():
    assert bucket_resolutions((16, 16), True) == ((16, 16),)
    assert choose_bucket((640, 480), (16, 16), True, False) == (16, 16)
    assert choose_bucket((9, 100), (256, 256), True, True) == (16, 96)


def test_the_last_step_may_lie_past_the_root_of_the_area():
    assert (112, 96) in bucket_resolutions((128, 96), True)  # the root is 110
    assert bucket_resolutions((16, 31), True) == ((16, 16),)  # 32 wide leaves no 16 rows


def test_a_tie_goes_to_the_narrower_bucket():
    buckets = bucket_resolutions((64, 64), True)
    assert buckets[:2] == ((32, 128), (48, 80))
    width, height = 17, 40  # 0.425, exactly between 32/128 = 0.25 and 48/80 = 0.6
    assert choose_bucket((width, height), (64, 64), True, False) == (32, 128)


@given(st.tuples(sides, sides), resolutions, st.booleans(), st.booleans())
def test_every_size_gets_a_bucket_of_whole_steps(size, resolution, enabled, no_upscale):
    bucket = choose_bucket(size, resolution, enabled, no_upscale)
    assert min(bucket) >= 16
    assert bucket[0] % 16 == 0 and bucket[1] % 16 == 0
    area = resolution[0] * resolution[1]
    keeps_own_size = enabled and no_upscale and size[0] * size[1] <= area
    if keeps_own_size and min(size) >= 16:
        assert bucket[0] <= size[0] and bucket[1] <= size[1]
    if not keeps_own_size:
        assert bucket in bucket_resolutions(resolution, enabled)
        assert bucket[0] * bucket[1] <= area
