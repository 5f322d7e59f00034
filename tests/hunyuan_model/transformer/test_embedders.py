"""Embedders against reference values and against the operations they replace."""

from pathlib import Path

import torch

from hunyuan_model.transformer.embedders import PatchEmbed, TimestepEmbedder, timestep_embedding
from utils.safetensors_io import read_tensors


def test_timestep_embedding():
    reference = read_tensors(Path(__file__).resolve().parents[2] / "goldens" / "timestep_embedding.safetensors").tensors
    t = reference["t"]
    difference = (timestep_embedding(t, 256) - reference["embedding"]).abs().amax(1)
    allowed = torch.where(t <= 1, 1e-6, torch.where(t <= 1000, 1e-4, 1e-3))
    assert (difference <= allowed).all(), difference
    torch.testing.assert_close(timestep_embedding(reference["t_dim64"], 64), reference["embedding_dim64"], atol=1e-4, rtol=0)


def test_half_precision_weights_do_not_round_the_timestep():
    embedder = TimestepEmbedder(32, 256).to(torch.bfloat16)
    near = embedder(torch.tensor([900.0, 901.0]))
    assert near.dtype == torch.bfloat16
    assert not torch.equal(near[0], near[1])  # bfloat16 would round both timesteps to 900


def test_patches_are_the_strided_convolution():
    torch.manual_seed(0)
    embed = PatchEmbed((1, 2, 2), 16, 24)
    x = torch.randn(2, 16, 3, 6, 4, requires_grad=True)
    tokens = embed(x)
    expected = embed.proj(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)
    weight = torch.randn_like(tokens)
    ours = torch.autograd.grad((tokens * weight).sum(), [x, embed.proj.weight])
    theirs = torch.autograd.grad((expected * weight).sum(), [x, embed.proj.weight])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
