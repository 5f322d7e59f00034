"""The memory of the VAE: counted tensor by tensor, against its estimate and its bounds; and the settings chosen by it."""

from __future__ import annotations

import argparse
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hunyuan_model.vae.convolution as vae_convolution
import hunyuan_model.vae.memory as vae_memory
from hunyuan_model.vae.arguments import vae_settings
from hunyuan_model.vae.loading import configure_vae
from hunyuan_model.vae.memory import CHOICES, WHOLE, Clip, Splitting, VAEFit, choose_splitting, working_bytes
from hunyuan_model.vae.model import AutoencoderKLCausal3D, VAEConfig
from utils.errors import UserError

NARROW = VAEConfig(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=8)
PIECE = 2**14
TILED = Splitting(None, 32)


class CountedMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made under it, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, torch.Tensor)}
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.known:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: weakref.ref) -> None:
            self.live -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces as small beside the clips of these tests as the usual ones are beside real clips."""
    monkeypatch.setitem(vae_convolution.PIECE_ELEMENTS, "cpu", PIECE)


def make_vae(dtype: torch.dtype = torch.float32) -> AutoencoderKLCausal3D:
    torch.manual_seed(0)
    vae = AutoencoderKLCausal3D(NARROW).to(dtype).requires_grad_(False).eval()
    vae.reuse_buffers()
    return vae


def counted(vae: AutoencoderKLCausal3D, clip: Clip, encode: bool) -> int:
    """Peak bytes of the tensors made on the way, the result included, the input not."""
    dtype = next(vae.parameters()).dtype
    if encode:
        x = torch.zeros(clip.batch, 3, clip.frames, clip.height, clip.width, dtype=dtype)
    else:
        x = torch.zeros(clip.batch, 16, (clip.frames - 1) // 4 + 1, clip.height // 8, clip.width // 8, dtype=dtype)
    with torch.no_grad(), CountedMemory() as memory:
        vae.encode(x) if encode else vae.decode(x)
    return memory.peak


def test_what_counts_is_what_lives():
    with CountedMemory() as memory:
        first = torch.zeros(1000)
        first.view(10, 100).add_(1)
        second = first + 1
        del first
        third = second + 1
    assert (memory.live, memory.peak) == (8000, 8000)
    del second, third
    assert memory.live == 0


@pytest.mark.parametrize("settings", [WHOLE, Splitting(16), TILED, Splitting(16, 32)], ids=lambda given: given.flags or "whole")
@pytest.mark.parametrize("clip", [Clip(1, 1, 64, 96), Clip(2, 9, 64, 48), Clip(1, 33, 48, 64)], ids=str)
@pytest.mark.parametrize("encode", [True, False], ids=["encode", "decode"])
def test_the_estimate_is_what_is_counted(settings, clip, encode):
    vae = make_vae()
    configure_vae(vae, chunk_size=settings.chunk_size, tile_size=settings.tile_size)
    estimate = working_bytes(NARROW, clip, torch.float32, "cpu", settings, encode=encode)
    assert estimate == pytest.approx(counted(vae, clip, encode), rel=0.15)


@pytest.mark.parametrize("encode", [True, False], ids=["encode", "decode"])
def test_the_estimate_for_half_precision(encode):
    clip = Clip(1, 17, 64, 64)
    estimate = working_bytes(NARROW, clip, torch.bfloat16, "cpu", WHOLE, encode=encode)
    assert estimate == pytest.approx(counted(make_vae(torch.bfloat16), clip, encode), rel=0.2)


# --- the settings


def test_a_machine_with_room_or_that_does_not_say_tiles_nothing():
    clip = Clip(1, 33, 544, 960)
    for free in (None, 2**50):
        assert choose_splitting(VAEConfig(), clip, torch.float16, "cuda", free, encode=False) == WHOLE


@pytest.mark.parametrize("encode", [True, False], ids=["encode", "decode"])
def test_less_free_memory_never_chooses_a_heavier_setting(encode):
    clip, chosen = Clip(1, 33, 544, 960), []
    for free in range(40, 0, -1):
        settings = choose_splitting(VAEConfig(), clip, torch.float16, "cuda", free * 10**9, encode=encode)
        needed = working_bytes(VAEConfig(), clip, torch.float16, "cuda", settings, encode=encode)
        assert needed <= 0.8 * free * 10**9 or settings == CHOICES[-1]
        chosen.append(CHOICES.index(settings))
    assert chosen == sorted(chosen)
    assert {0, len(CHOICES) - 1} <= set(chosen)


def test_each_choice_takes_less_than_the_one_before():
    clip = Clip(1, 33, 720, 1280)
    for encode in (True, False):
        needs = [working_bytes(VAEConfig(), clip, torch.float16, "cuda", choice, encode=encode) for choice in CHOICES]
        assert needs == sorted(needs, reverse=True)


@pytest.mark.parametrize("encode", [True, False], ids=["encode", "decode"])
@pytest.mark.parametrize("settings", [WHOLE, Splitting(8), Splitting(8, 32)], ids=lambda given: given.flags or "whole")
def test_what_is_chosen_gives_what_its_flags_give(encode, settings, monkeypatch, caplog):
    monkeypatch.setattr(vae_memory, "CHOICES", (WHOLE, Splitting(8), Splitting(8, 32)))
    clip = Clip(1, 5, 64, 64)
    needed = working_bytes(NARROW, clip, torch.float32, "cpu", settings, encode=encode)
    monkeypatch.setattr(vae_memory, "free_device_memory", lambda device: needed / vae_memory.SHARE_OF_FREE + 1)
    vae, by_flags = make_vae(), make_vae()
    vae.enable_spatial_tiling(64)  # of an earlier clip
    with caplog.at_level("INFO"):
        fit = VAEFit(vae, encode=encode)
        assert fit.fit(clip) == fit.fit(clip) == settings
    assert len(caplog.messages) == (settings != WHOLE)
    assert not caplog.messages or settings.flags in caplog.messages[0]
    configure_vae(by_flags, chunk_size=settings.chunk_size, tile_size=settings.tile_size)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if encode:
            x = torch.randn(1, 3, 5, 64, 64, generator=generator)
            assert torch.equal(vae.encode(x).mean, by_flags.encode(x).mean)
        else:
            z = torch.randn(1, 16, 2, 8, 8, generator=generator)
            assert torch.equal(vae.decode(z), by_flags.decode(z))


def test_it_is_said_when_nothing_is_light_enough(monkeypatch, caplog):
    monkeypatch.setattr(vae_memory, "free_device_memory", lambda device: 1e5)
    with caplog.at_level("INFO"):
        assert VAEFit(make_vae(), encode=True).fit(Clip(1, 5, 64, 64)) == CHOICES[-1]
    assert "0.1 MB are free" in caplog.messages[0] and "even in the smallest tiles" in caplog.messages[1]


def test_the_size_of_a_clip_is_read_off_its_latents():
    assert Clip.of_latents(torch.empty(2, 16, 3, 4, 6)) == Clip(2, 9, 32, 48)


def flags(chunk_size: int | None = None, tile: int | None = None, tiling: bool = False) -> argparse.Namespace:
    return argparse.Namespace(
        vae=None, vae_dtype=None, vae_chunk_size=chunk_size, vae_spatial_tile_sample_min_size=tile, vae_tiling=tiling
    )


@pytest.mark.parametrize(
    "given, says",
    [
        (flags(), "--vae_chunk_size 32 and --vae_spatial_tile_sample_min_size 128"),
        (flags(chunk_size=32), "--vae_spatial_tile_sample_min_size 128"),
        (flags(chunk_size=32, tiling=True), "--vae_spatial_tile_sample_min_size 128"),
        (flags(tile=128), "--vae_chunk_size 32 and --vae_spatial_tile_sample_min_size 64"),
        (flags(chunk_size=16, tile=64), ""),
    ],
    ids=lambda value: value or "nothing" if isinstance(value, str) else "",
)
def test_the_next_flags_take_less_than_those_given(given, says):
    assert vae_settings(given, torch.device("cpu")).lighter_flags == says


def test_a_tile_that_no_latent_fits_is_refused():
    with pytest.raises(UserError, match=r"tile_sample_min_size 100 is not a multiple of 32 pixels.* use 96 or 128"):
        vae_settings(flags(tile=100), torch.device("cpu"))


def test_any_flag_turns_the_choice_off():
    cpu = torch.device("cpu")
    assert vae_settings(flags(), cpu).automatic
    assert not any(vae_settings(given, cpu).automatic for given in (flags(chunk_size=8), flags(tile=64), flags(tiling=True)))
