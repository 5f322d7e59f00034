"""From pixels to samples: what is encoded together, what memory demands, and samples that depend on the item alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.cache import latents
from dataset.cache.latents import LatentEncoder
from dataset.cache.preparation import Failure, Prepared, Target
from dataset.config import DatasetConfig
from dataset.items import Item
from hunyuan_model.vae import memory
from hunyuan_model.vae.model import AutoencoderKLCausal3D, VAEConfig
from utils.errors import UserError

SMALL = VAEConfig(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=8)


def encoder(**settings: object) -> LatentEncoder:
    """A VAE with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLCausal3D(SMALL).eval().requires_grad_(False)
    return LatentEncoder(vae, memory.VAESettings(None, torch.float32, **settings), "")


def item(stem: str = "a") -> Item:
    return Item(DatasetConfig(0, "image", Path("x"), None, Path("x")), Path("x/a.png"), "", stem)


def prepared(item: Item, side: int) -> Prepared:
    return Prepared(Target(item, None, (side, side), (side, side)), np.zeros((1, side, side, 3), np.uint8), {})


def test_waiting_pixels_are_bounded(monkeypatch):
    monkeypatch.setattr(latents, "WAITING_BYTES", 4 * 32 * 32 * 3)
    sides = [16, 16, 32, 32, 32, 32, 64, 128, 16]
    batches = latents.collect_batches([prepared(item(), side) for side in sides], batch_size=8)
    # The fourth 32 is too much and all four go. 64 fills the budget alone, so that the two of 16 go, and it goes itself with
    # the last 16; 128 is more than the budget and goes at once.
    assert [[result.target.bucket[0] for result in batch] for batch in batches] == [[32] * 4, [16] * 2, [128], [64], [16]]


def test_full_batches_and_the_rest_without_pressure():
    failure = Failure(item(), "broken")
    results = [prepared(item(), 16), prepared(item(), 32), failure, prepared(item(), 16), prepared(item(), 16)]
    assert list(latents.collect_batches(results, batch_size=2)) == [
        failure,
        [results[0], results[3]],
        [results[1]],
        [results[4]],
    ]


def test_a_batch_goes_item_by_item_before_anything_is_cut(monkeypatch):
    sizes = []
    encode = AutoencoderKLCausal3D.encode
    monkeypatch.setattr(AutoencoderKLCausal3D, "encode", lambda self, x: sizes.append(len(x)) or encode(self, x))
    batch = [prepared(item(stem), 64) for stem in "ab"]
    together = encoder().encode(batch)
    alone = memory.working_bytes(SMALL, memory.Clip(1, 1, 64, 64), torch.float32, "cpu", memory.WHOLE, encode=True)
    monkeypatch.setattr(memory, "free_device_memory", lambda device: alone / memory.SHARE_OF_FREE + 1)
    short = encoder()
    one_by_one = short.encode(batch)
    assert sizes == [2, 1, 1] and short.vae.spatial_tile is None
    for first, second in zip(together, one_by_one):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("count", "tile", "advice"),
    [
        (2, 128, "2 x 1 frame.* of 64x64.*; use --vae_spatial_tile_sample_min_size 64 and --batch_size 1"),
        (1, 128, "use --vae_spatial_tile_sample_min_size 64\\."),
        (1, 64, "use a smaller resolution or fewer target_frames"),
    ],
)
def test_running_out_of_memory_names_the_next_flag(monkeypatch, count, tile, advice):
    def full(self, x):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(AutoencoderKLCausal3D, "encode", full)
    with pytest.raises(UserError, match=f"out of memory while encoding .*{advice}"):
        encoder(vae_chunk_size=8, vae_spatial_tile_sample_min_size=tile).encode([prepared(item(), 64)] * count)
