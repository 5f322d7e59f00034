"""The VAE against reference values, and against diffusers with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors.torch import load_file

import hunyuan_model.vae.convolution as vae_convolution
from hunyuan_model.vae.model import AutoencoderKLCausal3D, DiagonalGaussian, VAEConfig
from utils.errors import UserError

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
TINY = VAEConfig(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=8)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "vae_io.safetensors")


@pytest.fixture
def vae() -> AutoencoderKLCausal3D:
    model = AutoencoderKLCausal3D(TINY)
    model.load_state_dict(load_file(GOLDENS / "vae.safetensors"))
    model.reuse_buffers()
    return model.requires_grad_(False).eval()


def close_moments(actual: DiagonalGaussian, expected: dict[str, torch.Tensor], prefix: str) -> None:
    torch.testing.assert_close(actual.mean, expected[f"{prefix}.mean"], atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(actual.logvar, expected[f"{prefix}.logvar"], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("reuse", [True, False], ids=["reused buffers", "new buffers"])
@pytest.mark.parametrize(
    "case, run, tile", [("image", "", None), ("video", "", None), ("tile_image", ".spatial", 32), ("tile_video", ".spatial", 32)]
)
def test_matches_the_reference(vae, expected, case, run, tile, reuse):
    vae.reuse_buffers(reuse)
    vae.split(tile_size=tile)
    close_moments(vae.encode(expected[f"{case}.x"]), expected, f"{case}{run}")
    decoded = vae.decode(expected[f"{case}.z" if tile else f"{case}.mean"])
    torch.testing.assert_close(decoded, expected[f"{case}{run}.decoded"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [3, 8])
def test_chunks_and_small_pieces_change_nothing(vae, expected, chunk_size, monkeypatch):
    monkeypatch.setitem(vae_convolution.PIECE_ELEMENTS, "cpu", 3000)  # one to three frames a piece
    vae.split(chunk_size=chunk_size)
    with torch.no_grad():
        close_moments(vae.encode(expected["video.x"]), expected, "video")
        decoded = vae.decode(expected["video.mean"])
    torch.testing.assert_close(decoded, expected["video.decoded"], atol=1e-4, rtol=1e-4)


def test_encoding_leaves_its_input_alone(vae, expected):
    x, z = expected["video.x"].clone(), expected["video.mean"].clone()
    with torch.no_grad():
        vae.encode(x)
        vae.decode(z)
    assert torch.equal(x, expected["video.x"])
    assert torch.equal(z, expected["video.mean"])


def test_a_batch_is_its_single_clips(vae, expected):
    x = torch.cat([expected["video.x"], expected["video.x"].flip(3)])
    with torch.no_grad():
        both = vae.encode(x).mean
        second = vae.encode(x[1:]).mean
    torch.testing.assert_close(both[1:], second, atol=5e-5, rtol=1e-4)


def test_the_published_size_is_the_default():
    with torch.device("meta"):
        vae = AutoencoderKLCausal3D(VAEConfig())
    assert sum(parameter.numel() for parameter in vae.parameters()) == 246_478_803
    assert vae.scaling_factor == 0.476986


# --- against diffusers


def diffusers_twin(layers_per_block: int = 2) -> tuple[AutoencoderKLCausal3D, AutoencoderKLHunyuanVideo]:
    """One set of random weights in both implementations, diffusers' own tiling switched off."""
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 16, 16, 32), "layers_per_block": layers_per_block, "norm_num_groups": 4}
    theirs, ours = AutoencoderKLHunyuanVideo(**sizes), AutoencoderKLCausal3D(VAEConfig(**sizes))
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = False
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


def assert_equal_up_to_rounding(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("frames, height, width", [(1, 48, 64), (9, 32, 40)])
@pytest.mark.parametrize("reuse", [True, False], ids=["reused buffers", "new buffers"])
@torch.no_grad()
def test_matches_diffusers(frames, height, width, reuse):
    ours, theirs = diffusers_twin()
    ours.reuse_buffers(reuse)
    x = torch.rand(1, 3, frames, height, width) * 2 - 1
    posterior, reference = ours.encode(x), theirs.encode(x).latent_dist
    assert_equal_up_to_rounding(posterior.mean, reference.mean)
    assert_equal_up_to_rounding(posterior.logvar, reference.logvar)
    z = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    assert_equal_up_to_rounding(ours.decode(z), theirs.decode(z).sample)


def test_tiles_match_diffusers():
    ours, theirs = diffusers_twin(layers_per_block=1)
    ours.split(tile_size=32)
    theirs.enable_tiling(32, 32, None, 24, 24)
    x, z = torch.rand(1, 3, 5, 56, 40) * 2 - 1, torch.randn(1, 16, 2, 7, 5)
    with torch.no_grad():
        assert_equal_up_to_rounding(ours.encode(x).mean, theirs.encode(x).latent_dist.mean)
        assert_equal_up_to_rounding(ours.decode(z), theirs.decode(z).sample)


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_gradients_match_diffusers(frames, direction):
    twins = diffusers_twin(layers_per_block=1)
    if direction == "encode":
        x = torch.rand(1, 3, frames, 32, 32) * 2 - 1
        names = ["encoder.conv_in.conv.weight", "encoder.mid_block.attentions.0.to_k.weight"]
        runs = (lambda x: twins[0].encode(x).mean, lambda x: twins[1].encode(x).latent_dist.mean)
    else:
        x = torch.randn(1, 16, (frames - 1) // 4 + 1, 4, 4)
        names = ["decoder.up_blocks.1.upsamplers.0.conv.conv.weight", "decoder.up_blocks.3.resnets.0.norm1.weight"]
        runs = (twins[0].decode, lambda z: twins[1].decode(z).sample)
    gradients = []
    for model, run in zip(twins, runs):
        leaf = x.clone().requires_grad_()
        parameters = [model.get_parameter(name) for name in names]
        gradients.append(torch.autograd.grad(run(leaf).square().mean(), [leaf, *parameters]))
    for actual, reference in zip(*gradients):
        assert (actual - reference).abs().max() <= 1e-4 * reference.abs().max()


# --- other dtypes, sampling, refusals


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["image", "video"])
def test_half_precision_runs_close_to_float32(vae, expected, dtype, case):
    vae.to(dtype)
    with torch.no_grad():
        mean = vae.encode(expected[f"{case}.x"].to(dtype)).mean
        decoded = vae.decode(expected[f"{case}.mean"].to(dtype))
    assert mean.dtype == decoded.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.01
    for actual, reference in ((mean, expected[f"{case}.mean"]), (decoded, expected[f"{case}.decoded"])):
        rms = (actual.float() - reference).square().mean().sqrt()
        assert rms < tolerance * reference.std()


def test_group_statistics_survive_a_large_mean():
    torch.manual_seed(0)
    x = 300 + torch.randn(2, 8, 5, 16, 16)
    mean, variance = vae_convolution.group_statistics(x, groups=4)
    wide = x.double().unflatten(1, (4, 2)).flatten(2)
    torch.testing.assert_close(mean.double(), wide.mean(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), wide.var(-1, unbiased=False), rtol=1e-4, atol=0)


def test_samples_have_the_mean_and_spread_of_the_posterior():
    posterior = DiagonalGaussian(torch.full((1, 16, 1, 64, 64), 2.0), torch.full((1, 16, 1, 64, 64), -2.0))
    sample = posterior.sample(torch.Generator().manual_seed(1))
    assert torch.equal(sample, posterior.sample(torch.Generator().manual_seed(1)))
    assert sample.mean().item() == pytest.approx(2.0, abs=0.01)
    assert sample.std().item() == pytest.approx(torch.exp(torch.tensor(-1.0)).item(), rel=0.01)


def test_logvar_is_clamped(vae):
    vae.quant_conv.bias[16:] = torch.tensor([-99.0, 99.0]).repeat(8)
    assert vae.encode(torch.zeros(1, 3, 1, 8, 8)).logvar.flatten().tolist() == [-30.0, 20.0] * 8


@pytest.mark.parametrize(
    "shape, said",
    [((1, 3, 4, 32, 32), "4n \\+ 1"), ((1, 3, 1, 36, 32), "32x36"), ((1, 3, 1, 32, 20), "20x32")],
)
def test_sizes_that_cannot_be_encoded_are_refused(vae, shape, said):
    with pytest.raises(UserError, match=said):
        vae.encode(torch.zeros(shape))
