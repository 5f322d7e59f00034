"""The memory of the VAE: counted tensor by tensor, against its estimate and its bounds; and the settings chosen by it."""

from __future__ import annotations

import argparse
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from variations import slow_but

import hunyuan_model.vae.convolution as vae_convolution
import hunyuan_model.vae.memory as vae_memory
from hunyuan_model.vae.arguments import vae_settings
from hunyuan_model.vae.memory import CHOICES, WHOLE, Clip, Splitting, VAEFit, VAESettings, working_bytes
from hunyuan_model.vae.model import AutoencoderKLCausal3D, VAEConfig
from utils.errors import UserError

SMALL = VAEConfig(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=8)
PIECE = 2**14
AUTOMATIC = VAESettings(None, torch.float32)
ENCODE = pytest.mark.parametrize("encode", [True, False], ids=["encode", "decode"])


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
    vae = AutoencoderKLCausal3D(SMALL).to(dtype).requires_grad_(False).eval()
    vae.reuse_buffers()
    return vae


def run(vae: AutoencoderKLCausal3D, clip: Clip, encode: bool) -> tuple[torch.Tensor, int]:
    """The mean of the latents of random pixels, or the pixels of random latents; and peak bytes of the tensors made on the way."""
    shape = (3, clip.frames, clip.height, clip.width) if encode else (16, clip.frames // 4 + 1, clip.height // 8, clip.width // 8)
    x = torch.randn(clip.batch, *shape, generator=torch.Generator().manual_seed(1)).to(next(vae.parameters()).dtype)
    with torch.no_grad(), CountedMemory() as memory:
        result = vae.encode(x).mean if encode else vae.decode(x)
    return result, memory.peak


@pytest.mark.parametrize(
    "splitting, clip, dtype, tolerance",
    [
        (WHOLE, Clip(1, 1, 64, 96), torch.float32, 0.15),
        (WHOLE, Clip(2, 9, 64, 48), torch.float32, 0.15),
        pytest.param(WHOLE, Clip(1, 33, 48, 64), torch.float32, 0.15, marks=pytest.mark.slow),
        (WHOLE, Clip(1, 17, 64, 64), torch.bfloat16, 0.2),
        pytest.param(Splitting(16), Clip(1, 33, 48, 64), torch.float32, 0.15, marks=pytest.mark.slow),
        (Splitting(None, 32), Clip(1, 1, 64, 96), torch.float32, 0.15),
        (Splitting(16, 32), Clip(1, 33, 48, 64), torch.float32, 0.15),
    ],
    ids=str,
)
@ENCODE
def test_the_estimate_is_what_is_counted(splitting, clip, dtype, tolerance, encode):
    vae = make_vae(dtype)
    vae.split(chunk_size=splitting.chunk_size, tile_size=splitting.tile_size)
    estimate = working_bytes(SMALL, clip, dtype, "cpu", splitting, encode=encode)
    assert estimate == pytest.approx(run(vae, clip, encode)[1], rel=tolerance)


# --- the settings


@ENCODE
def test_less_free_memory_never_chooses_a_heavier_setting(encode, monkeypatch):
    clip, chosen = Clip(1, 33, 544, 960), []
    with torch.device("meta"):
        vae = AutoencoderKLCausal3D(VAEConfig()).half()
    for free in (None, *range(40 * 10**9, 0, -(10**9))):
        monkeypatch.setattr(vae_memory, "free_device_memory", lambda device, free=free: free)
        splitting = VAEFit(vae, AUTOMATIC, encode=encode).fit(clip)
        needed = working_bytes(VAEConfig(), clip, torch.float16, "cuda", splitting, encode=encode)
        assert free is None or needed <= 0.8 * free or splitting == CHOICES[-1]
        chosen.append(CHOICES.index(splitting))
    assert chosen == sorted(chosen) and {0, len(CHOICES) - 1} <= set(chosen)


@ENCODE
def test_each_choice_takes_less_than_the_one_before(encode):
    clip = Clip(1, 33, 720, 1280)
    needs = [working_bytes(VAEConfig(), clip, torch.float16, "cuda", choice, encode=encode) for choice in CHOICES]
    assert needs == sorted(needs, reverse=True)


@ENCODE
@pytest.mark.parametrize(
    "splitting",
    slow_but([WHOLE, Splitting(8), Splitting(8, 32)], WHOLE, Splitting(8, 32)),
    ids=lambda given: str(given) or "whole",
)
def test_what_is_chosen_gives_what_its_flags_give(encode, splitting, monkeypatch, caplog):
    monkeypatch.setattr(vae_memory, "CHOICES", (WHOLE, Splitting(8), Splitting(8, 32)))
    clip = Clip(1, 5, 64, 64)
    needed = working_bytes(SMALL, clip, torch.float32, "cpu", splitting, encode=encode)
    monkeypatch.setattr(vae_memory, "free_device_memory", lambda device: needed / vae_memory.SHARE_OF_FREE + 1)
    vae, by_flags = make_vae(), make_vae()
    vae.split(tile_size=64)  # of an earlier clip
    with caplog.at_level("INFO"):
        fit = VAEFit(vae, AUTOMATIC, encode=encode)
        assert fit.fit(clip) == fit.fit(clip) == splitting
    assert len(caplog.messages) == (splitting != WHOLE)
    assert str(splitting) in caplog.text
    flags = VAESettings(None, torch.float32, splitting.chunk_size, splitting.tile_size)
    VAEFit(by_flags, flags, encode=encode).fit(clip)
    assert torch.equal(run(vae, clip, encode)[0], run(by_flags, clip, encode)[0])


def test_it_is_logged_when_nothing_is_light_enough(monkeypatch, caplog):
    monkeypatch.setattr(vae_memory, "free_device_memory", lambda device: 1e5)
    with caplog.at_level("INFO"):
        assert VAEFit(make_vae(), AUTOMATIC, encode=True).fit(Clip(1, 5, 64, 64)) == CHOICES[-1]
    assert "100.0 kB are free" in caplog.messages[0] and "even in the smallest tiles" in caplog.messages[1]


def test_the_size_of_a_clip_is_read_off_its_latents():
    assert Clip.of_latents(torch.empty(2, 16, 3, 4, 6)) == Clip(2, 9, 32, 48)


def settings(chunk_size: int | None = None, tile: int | None = None, tiling: bool = False) -> VAESettings:
    flags = {"vae": None, "vae_dtype": None, "vae_chunk_size": chunk_size, "vae_tiling": tiling}
    return vae_settings(argparse.Namespace(vae_spatial_tile_sample_min_size=tile, **flags), torch.device("cpu"))


@pytest.mark.parametrize(
    "given, lighter",
    [
        ({}, "--vae_chunk_size 32 and --vae_spatial_tile_sample_min_size 128"),
        ({"chunk_size": 32, "tiling": True}, "--vae_spatial_tile_sample_min_size 128"),
        ({"tile": 128}, "--vae_chunk_size 32 and --vae_spatial_tile_sample_min_size 64"),
        ({"chunk_size": 16, "tile": 64}, ""),
    ],
)
def test_the_next_flags_take_less_than_those_given(given, lighter):
    assert settings(**given).lighter_flags == lighter


@pytest.mark.parametrize("size", [16, 100])
def test_tile_sizes_that_are_no_multiple_of_32_are_refused(size):
    with pytest.raises(UserError, match=f"tile_sample_min_size {size} is not a multiple of 32"):
        settings(tile=size)


@pytest.mark.parametrize("given", [{"chunk_size": 8}, {"tile": 64}, {"tiling": True}], ids=str)
def test_any_flag_turns_the_choice_off(given, monkeypatch):
    monkeypatch.setattr(vae_memory, "free_device_memory", lambda device: 1)
    fit = VAEFit(make_vae(), settings(**given), encode=True)
    assert not fit.must_split(Clip(1, 5, 64, 64)) and fit.fit(Clip(1, 5, 64, 64)) not in CHOICES
