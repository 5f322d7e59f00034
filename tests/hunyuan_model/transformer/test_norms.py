"""Norms in float32 of half-precision activations, and what a training block keeps for its backward pass because of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_transformer import CONFIG, add_lora, make_transformer
from torch import nn

from hunyuan_model.transformer.norms import NORM_EPS, RMSNorm, modulated_norm, rotated_norms
from hunyuan_model.transformer.rope import apply_rope, rotation_table

IMAGE, TEXT = 480, 20  # tokens
HIDDEN = CONFIG.hidden_size


def tokens(rows: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(1, rows, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
    return list(torch.autograd.grad(output, inputs, gradient))


@pytest.mark.parametrize("rotated", [False, True], ids=["", "rotated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rms_norms_are_those_of_float32_in_both_directions(dtype, rotated):
    norms = nn.ModuleList(RMSNorm(32) for _ in range(2)).to(dtype)
    with torch.no_grad():
        for norm, lowest in zip(norms, (0.5, 0.7)):
            norm.weight.copy_(torch.linspace(lowest, 2, 32))
    rope = rotation_table((1, 2, 3), CONFIG.rope_dims, CONFIG.rope_theta, torch.device("cpu")) if rotated else None
    inputs = [tokens(6, seed, dtype).detach().unflatten(-1, (2, 32)).requires_grad_() for seed in range(2)]

    def expected() -> torch.Tensor:
        normed = [F.rms_norm(x.float(), (32,), norm.weight.float(), NORM_EPS) for x, norm in zip(inputs, norms)]
        return torch.stack([(x if rope is None else apply_rope(x, rope)).to(dtype) for x in normed])

    def found() -> torch.Tensor:
        return torch.stack(rotated_norms(*inputs, *norms, rope))

    rounded = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-6}[dtype]
    assert found().dtype == dtype
    torch.testing.assert_close(found(), expected(), rtol=rounded, atol=1e-6)
    with torch.no_grad():
        without = found()
    assert torch.equal(found(), without)
    wanted = [*inputs, *norms.parameters()]
    for one, other in zip(gradients(found(), *wanted), gradients(expected(), *wanted), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=max(rounded, 1e-5), atol=1e-5)
    norms.requires_grad_(False)
    for one, other in zip(gradients(found(), *inputs), gradients(expected(), *inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=max(rounded, 1e-5), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_modulation_under_autocast_rounds_once(dtype):
    x, shift, scale = tokens(6, 0, dtype), tokens(1, 1, dtype), tokens(1, 2, dtype)
    exact = [one.detach().double().requires_grad_() for one in (x, shift, scale)]
    expected = F.layer_norm(exact[0], (HIDDEN,), eps=NORM_EPS) * (1 + exact[2]) + exact[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = modulated_norm(x, shift, scale)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)  # half a place of bfloat16, rounded once
    for one, other in zip(gradients(found, x, shift, scale), gradients(expected, *exact)):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_modulation_without_autocast_stays_in_the_dtype(dtype, samples):
    seeds = iter(range(9))
    x, shift, scale = (torch.cat([tokens(rows, next(seeds), dtype) for _ in range(samples)]) for rows in (6, 1, 1))
    exact = [one.detach().double().requires_grad_() for one in (x, shift, scale)]
    expected = F.layer_norm(exact[0], (HIDDEN,), eps=NORM_EPS) * (1 + exact[2]) + exact[1]
    found = modulated_norm(x, shift, scale)
    within = {"rtol": 2**-6, "atol": 2**-4} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, **within)
    for one, other in zip(gradients(found, x, shift, scale), gradients(expected, *exact)):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, **within)


def saved_by(compute: Callable[[], object], apart_from: set[int]) -> dict[int, torch.Tensor]:
    """What autograd keeps of a computation, by the address of its memory; each piece of memory once."""
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in apart_from:
            saved[address] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = compute()
    del kept
    return saved


# What a block keeps of its tokens, in vectors of the hidden size (the MLP of this model is twice as wide) for each token.
# Both: the input; the modulated one, for LoRA; q and k as attention takes them, its answer.
# Double: q, k and v before the norms, v in one piece with text; the middle of the residual stream; that modulated, for LoRA;
# the MLP before and after its activation. Single: q, k, v and the MLP in one piece; the last layer's input, for LoRA.
DOUBLE_VECTORS = 2 + 3 + 3 + 1 + 1 + 1 + 4
SINGLE_VECTORS = 2 + 3 + 5 + 3


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("kind", ["double", "single"])
def test_a_block_in_training_keeps_no_float32_copy_of_its_tokens(kind, autocast):
    transformer = make_transformer().to(torch.bfloat16)
    network = add_lora(transformer)
    image_rope = rotation_table((1, 20, 24), CONFIG.rope_dims, CONFIG.rope_theta, torch.device("cpu"))
    rope = torch.cat((image_rope, image_rope[:TEXT]))
    vec = torch.zeros(1, HIDDEN, dtype=torch.bfloat16)
    own = {weight.untyped_storage().data_ptr() for weight in (*transformer.parameters(), *network.parameters())}

    def compute() -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if kind == "double":
                return transformer.double_blocks[1](tokens(IMAGE), tokens(TEXT), vec, image_rope, None)
            return transformer.single_blocks[1](tokens(IMAGE + TEXT), vec, rope, None)

    saved = saved_by(compute, own | {image_rope.untyped_storage().data_ptr(), rope.untyped_storage().data_ptr()})
    wide = [tensor for tensor in saved.values() if tensor.dtype == torch.float32 and tensor.numel() >= TEXT * HIDDEN]
    assert not wide, [tuple(tensor.shape) for tensor in wide]
    vectors = sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) / ((IMAGE + TEXT) * HIDDEN * 2)
    expected = DOUBLE_VECTORS if kind == "double" else SINGLE_VECTORS
    # Beside them: weights of the LoRA in bfloat16, its hidden values, what norms and attention know of each token.
    assert expected <= vectors <= expected + 1
