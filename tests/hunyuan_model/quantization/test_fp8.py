"""Float8 Linear layers: what is stored, what is computed, what is kept for backward."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hunyuan_model.quantization.formats import FP8_DTYPE, cast, dequantize, is_quantized_name
from hunyuan_model.quantization.linear import enable_quantized_linears
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer

CODES = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE).float()
VALUES = CODES[~CODES.isnan()].unique()  # every number float8_e4m3fn can hold


def linear(bias: bool = True, seed: int = 0) -> nn.Linear:
    """A frozen float8 Linear 24 -> 40."""
    torch.manual_seed(seed)
    layer = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    layer.weight = nn.Parameter(cast(layer.weight, FP8_DTYPE), requires_grad=False)
    return layer


def wide_twin(layer: nn.Linear, dtype: torch.dtype = torch.float32) -> nn.Linear:
    twin = nn.Linear(24, 40, bias=layer.bias is not None, dtype=dtype).requires_grad_(False)
    twin.weight.copy_(layer.weight.to(dtype))
    if layer.bias is not None:
        twin.bias.copy_(layer.bias)
    return twin


def test_targets_are_the_block_linears_but_modulation():
    config = TransformerConfig(
        hidden_size=64, heads=2, head_dim=32, double_depth=2, single_depth=11, mlp_size=128, text_dim=16, pooled_dim=8
    )
    with torch.device("meta"):
        model = HYVideoDiffusionTransformer(config)
    expected = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and ("double_blocks" in name or "single_blocks" in name)
        and not any(part in name for part in ("img_mod", "txt_mod", "modulation"))
    }
    assert len(expected) == 2 * 8 + 11 * 2
    assert {name for name, _ in model.named_parameters() if is_quantized_name(name)} == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cast_rounds_to_the_nearest_float8_and_saturates(dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.cat([torch.randn(500, generator=generator) * scale for scale in (1e-3, 0.02, 1, 200)]).to(dtype)
    x = torch.cat([x, torch.tensor([0.0, 449, -500, 1e4, float("inf"), -float("inf")], dtype=dtype)])
    stored = cast(x, FP8_DTYPE)
    assert stored.dtype == FP8_DTYPE
    distance = (stored.float() - x.float().clamp(-448, 448)).abs()
    nearest = (VALUES[None] - x.float().clamp(-448, 448)[:, None]).abs().min(1).values
    assert torch.equal(distance, nearest)


def test_cast_between_other_dtypes_and_of_nothing():
    x = torch.tensor([1.0, 1000.0])
    assert torch.equal(cast(x, torch.bfloat16), x.bfloat16())
    assert cast(x, torch.float32) is x
    assert cast(torch.empty(0), FP8_DTYPE).shape == (0,)
    assert cast(torch.tensor([1e6, -1e6]), torch.float8_e5m2).float().tolist() == [57344.0, -57344.0]
    large = torch.tensor([57344.0, 2.0]).to(torch.float8_e5m2)
    assert cast(large, FP8_DTYPE).float().tolist() == [448.0, 2.0]
    assert cast(cast(x, FP8_DTYPE), FP8_DTYPE).float().tolist() == [1.0, 448.0]


def test_dequantise_gives_every_code_its_value():
    codes = torch.arange(256, dtype=torch.uint8)
    # Sign, 4 bits of exponent with bias 7, 3 bits of mantissa; exponent 0 is subnormal.
    sign, exponent, mantissa = 1 - 2.0 * (codes >> 7), ((codes >> 3) & 15).int(), (codes & 7).float()
    value = sign * torch.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6)
    numbers = (codes & 127) != 127  # the rest is NaN
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wide = dequantize(codes.view(FP8_DTYPE), dtype)
        assert wide.dtype == dtype
        assert torch.equal(wide[numbers].float(), value[numbers])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 5, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient_equal_a_wide_linear(bias, shape, dtype):
    layer = linear(bias)
    twin = wide_twin(layer, dtype)
    assert enable_quantized_linears(layer, dtype) == 1
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    x_twin = x.detach().clone().requires_grad_()
    if bias:
        layer.bias.requires_grad_(True)
        twin.bias.requires_grad_(True)
    out, expected = layer(x), twin(x_twin)
    assert out.dtype == dtype
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(out, expected, **tolerance)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, x_twin.grad, **tolerance)
    assert layer.weight.grad is None
    if bias:
        torch.testing.assert_close(layer.bias.grad.to(dtype), twin.bias.grad, **tolerance)


def test_only_the_float8_weight_is_kept_for_backward():
    model = nn.Sequential(linear(), nn.SiLU(), nn.Linear(40, 4))
    enable_quantized_linears(model, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model[0](torch.randn(2, 3, 24, requires_grad=True))
    assert [(tensor.dtype, tensor.data_ptr()) for tensor in kept] == [(FP8_DTYPE, model[0].weight.data_ptr())]


def test_autocast_wins_over_the_compute_dtype():
    layer = linear()
    twin = wide_twin(layer)
    enable_quantized_linears(layer, torch.float32)
    x = torch.randn(6, 24, requires_grad=True)
    x_twin = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = layer(x), twin(x_twin)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, x_twin.grad, atol=0.1, rtol=0.05)


def test_without_autocast_the_answer_has_the_dtype_of_the_input():
    layer = linear()
    enable_quantized_linears(layer, torch.bfloat16)
    x = torch.randn(6, 24)
    out = layer(x)
    assert out.dtype == torch.float32
    expected = F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16())
    assert torch.equal(out, expected.float())


def test_layers_stay_linear_and_can_be_wrapped_and_copied():
    model = nn.Sequential(linear(seed=1), nn.Linear(40, 4))
    before = model[1].forward
    assert enable_quantized_linears(model, torch.float32) == 1
    assert type(model[0]) is nn.Linear
    assert model[1].forward == before
    x = torch.randn(3, 24)
    plain = model[0](x)

    copied = copy.deepcopy(model)
    copied[0].weight.data = torch.zeros(40, 24).to(FP8_DTYPE)
    assert torch.equal(copied[0](x), model[0].bias.expand(3, 40))
    assert torch.equal(model[0](x), plain)

    inner = model[0].forward
    model[0].forward = lambda x: inner(x) + 1
    assert torch.equal(model[0](x), plain + 1)


def test_swapped_weights_are_used():
    layer = linear()
    enable_quantized_linears(layer, torch.float32)
    layer.weight.data = torch.ones(40, 24).to(FP8_DTYPE)
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), x.sum(1, keepdim=True) + layer.bias)


def test_checkpointed_gradients_are_the_same():
    layer = linear()
    enable_quantized_linears(layer, torch.float32)
    x = torch.randn(3, 24, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    recomputed = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(recomputed.square().sum(), x)[0], plain)
