"""Matmuls of float8 by float8: their arithmetic on the CPU, which has a kernel of its own, and who is refused.

A stand-in for the kernel, written from its definition, also holds callers to the layout that GPUs need.
"""

import copy
import math
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hunyuan_model.quantization import scaled_mm
from hunyuan_model.quantization.formats import FP8_DTYPE, WeightFormat, cast_to_float8, quantize_channels, quantize_groups
from hunyuan_model.quantization.linear import enable_quantized_linears
from hunyuan_model.quantization.scaled_mm import Float8Matmuls, check_float8_matmuls, find_float8_matmuls, fits_float8_matmuls
from hunyuan_model.runtime.loading import load_transformer
from hunyuan_model.runtime.settings import RuntimeSettings
from utils.errors import UserError

INPUTS, OUTPUTS = 256, 96
WAYS = [pytest.param(Float8Matmuls(per_row=True), id="scale per row"), pytest.param(Float8Matmuls(per_row=False), id="one scale")]
KINDS = {"plain": cast_to_float8, "channels": quantize_channels}
ROUNDING = 0.035  # of what is multiplied with a weight, to 3 bits: 2.6 % (root mean square)


def linear(kind: str = "channels", bias: bool = True, inputs: int = INPUTS, outputs: int = OUTPUTS) -> nn.Linear:
    """A frozen float8 Linear; with scales its output channels are of very different sizes."""
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    weight = torch.randn(outputs, inputs)
    codes, scale = KINDS[kind](weight if kind == "plain" else weight * torch.logspace(-3, 1, outputs)[:, None])
    layer.weight = nn.Parameter(codes, requires_grad=False)
    if scale is not None:
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)
    return layer


def twins(layer: nn.Linear, matmuls: Float8Matmuls, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, nn.Linear]:
    """The layer with matmuls in float8, and a copy of it that dequantizes its weight."""
    exact = copy.deepcopy(layer)
    assert enable_quantized_linears(layer, dtype, matmuls) == enable_quantized_linears(exact, torch.float32) == 1
    return layer, exact


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.float() - reference.float()).norm() / reference.float().norm()).item()


def stand_in(left, right, *, scale_a, scale_b, bias=None, out_dtype=None, use_fast_accum=False):
    """What torch._scaled_mm computes, and what it asks for on GPUs."""
    assert left.dtype == right.dtype == FP8_DTYPE and scale_a.dtype == scale_b.dtype == torch.float32
    assert left.stride(1) == 1 and right.stride(0) == 1, "the left matrix must be row-major, the right one column-major"
    assert left.shape[1] % 16 == 0 and right.shape[0] % 16 == 0 and right.shape[1] % 16 == 0
    if scale_a.numel() == 1 and scale_b.numel() == 1:
        assert scale_a.dim() in (0, 1) or len(left) == 1
    else:
        assert scale_a.shape == (len(left), 1) and scale_b.shape == (1, right.shape[1])
        assert scale_a.is_contiguous() and scale_b.is_contiguous() and out_dtype == torch.bfloat16
    assert bias is None or bias.dtype == torch.bfloat16
    out = (left.float() * scale_a) @ (right.float() * scale_b)
    return (out if bias is None else out + bias.float()).to(out_dtype)


@pytest.fixture(params=["torch's kernel", "stand-in"])
def kernel(request, monkeypatch) -> None:
    """Once as it is, and once with the stand-in; both must pass the same tests."""
    if request.param == "stand-in":
        monkeypatch.setattr(torch, "_scaled_mm", stand_in)
        return
    try:
        find_float8_matmuls(torch.device("cpu"))
        scaled_mm._multiply(*(torch.ones(16, 16).to(FP8_DTYPE) for _ in range(2)), torch.ones(()), torch.ones(()))
    except (RuntimeError, NotImplementedError):
        pytest.skip("this torch multiplies no float8 on the CPU")


@pytest.mark.parametrize("matmuls", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("kernel")
def test_forward_and_gradient_are_those_of_the_weight_but_for_the_rounding(matmuls, kind, dtype):
    fast, exact = twins(linear(kind), matmuls, dtype)
    for layer in (fast, exact):
        layer.bias.requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 21, INPUTS, generator=generator).to(dtype).requires_grad_()
    x_exact = x.detach().float().requires_grad_()
    out, expected = fast(x), exact(x_exact)
    assert out.dtype == dtype and out.shape == (2, 21, OUTPUTS)
    for channel in range(0, OUTPUTS, 19):  # none is drowned by the large ones
        assert 0 < relative(out[..., channel], expected[..., channel]) < 1.4 * ROUNDING
    assert relative(out, expected) < ROUNDING

    direction = torch.randn(2, 21, OUTPUTS, generator=generator).to(dtype) / 100
    out.backward(direction)
    expected.backward(direction.float())
    assert x.grad.dtype == dtype and 0 < relative(x.grad, x_exact.grad) < ROUNDING
    assert relative(fast.bias.grad, exact.bias.grad) < 0.01
    assert fast.weight.grad is None


def test_it_can_be_compiled(monkeypatch):
    def multiply(left, right, left_scale, right_scale, bias=None):
        out = (left.float() * left_scale) @ (right.float() * right_scale)
        return (out if bias is None else out + bias).to(torch.bfloat16)

    monkeypatch.setattr(scaled_mm, "_multiply", multiply)
    fast, _ = twins(linear("plain"), Float8Matmuls(per_row=True))
    compiled = torch.compile(fast.forward, backend="aot_eager", dynamic=True)
    x = torch.randn(1, 5, INPUTS, requires_grad=True)
    gradients = [torch.autograd.grad(forward(x).sum(), x)[0] for forward in (fast.forward, compiled)]
    assert torch.equal(*gradients)


@pytest.mark.usefixtures("kernel")
def test_a_scale_per_row_keeps_small_rows():
    fast, exact = twins(linear("plain"), Float8Matmuls(per_row=True))
    x = torch.randn(8, INPUTS, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 6, 8)[:, None]
    x[3] = 0
    fast.bias.zero_()
    exact.bias.zero_()
    for row, (out, expected) in enumerate(zip(fast(x), exact(x))):
        assert not out.any() if row == 3 else 0 < relative(out, expected) < 1.4 * ROUNDING


@pytest.mark.parametrize("matmuls", WAYS)
def test_nothing_broken_is_hidden(matmuls):
    fast, _ = twins(linear(), matmuls)
    for broken in (torch.nan, torch.inf):
        x = torch.ones(4, INPUTS)
        x[2, 5] = broken
        assert not fast(x)[2].isfinite().any()
    assert torch.equal(fast(torch.zeros(2, INPUTS)), fast.bias.bfloat16().float().expand(2, -1))


@pytest.mark.parametrize("matmuls", WAYS)
def test_layers_that_the_kernels_do_not_take_dequantize_their_weight(matmuls, monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: pytest.fail("multiplied in float8"))
    blocks = linear(inputs=128)
    codes, scale = quantize_groups(torch.randn(OUTPUTS, 128))
    blocks.weight, blocks.weight_scale = nn.Parameter(codes, requires_grad=False), nn.Parameter(scale, requires_grad=False)
    for layer in (linear(inputs=24), linear(outputs=40), blocks):
        fast, exact = twins(layer, matmuls)
        x = torch.randn(3, layer.in_features)
        assert torch.equal(fast(x), exact(x))
    fast, _ = twins(linear(), matmuls)
    assert fast(torch.empty(2, 0, INPUTS)).shape == (2, 0, OUTPUTS)
    assert not fits_float8_matmuls(torch.ones(1, INPUTS), torch.zeros(OUTPUTS, INPUTS), None)  # a weight in full precision


def test_a_kernel_without_scales_per_row_is_found_out(monkeypatch):
    def older(left, right, *, scale_a, scale_b, **options):
        if scale_a.numel() > 1:
            raise RuntimeError("Only tensorwise scaling is supported")
        return stand_in(left, right, scale_a=scale_a, scale_b=scale_b, **options)

    def ignoring(left, right, *, scale_a, scale_b, **options):
        return stand_in(left, right, scale_a=scale_a[0], scale_b=scale_b[0, :1], **options)

    def overflowing(left, right, **options):
        return stand_in(left, right, **options).mul_(math.nan)

    monkeypatch.setattr(torch, "_scaled_mm", stand_in)
    assert find_float8_matmuls(torch.device("cpu")).per_row
    for kernel in (older, ignoring, overflowing):
        monkeypatch.setattr(torch, "_scaled_mm", kernel)
        assert not find_float8_matmuls(torch.device("cpu")).per_row, kernel.__name__


@pytest.mark.parametrize("scaled", [False, True])
def test_a_transformer_computes_with_them(tiny_model, monkeypatch, scaled):
    """As on a GPU that can, with the CPU's kernel."""
    monkeypatch.setattr("hunyuan_model.runtime.settings.check_float8_matmuls", lambda *_: None)
    monkeypatch.setattr(torch, "_scaled_mm", counted := Mock(side_effect=stand_in))
    options = {"device": "cpu", "dtype": torch.float32}
    fast = load_transformer(
        tiny_model.dit, runtime=RuntimeSettings(WeightFormat.FP8_SCALED if scaled else WeightFormat.FP8, fp8_fast=True), **options
    )
    scales = [value for name, value in fast.named_parameters() if name.endswith("_scale")]
    assert bool(scales) == scaled and all(value.shape[1] == 1 for value in scales)
    exact = load_transformer(tiny_model.dit, device="cpu", dtype=torch.float32)
    config, generator = exact.config, torch.Generator().manual_seed(3)
    inputs = [
        torch.randn(1, config.in_channels, 1, 4, 4, generator=generator),
        torch.tensor([500.0]),
        torch.randn(1, 7, config.text_dim, generator=generator),
        torch.ones(1, 7),
        torch.randn(1, config.pooled_dim, generator=generator),
        torch.tensor([6000.0]),
    ]
    counted.reset_mock()
    with torch.no_grad():
        assert 0 < relative(fast(*inputs), exact(*inputs)) < 0.15
    layers = sum(isinstance(layer, nn.Linear) and layer.weight.dtype == FP8_DTYPE for layer in fast.modules())
    assert counted.call_count == layers > 0


def test_the_function_of_the_whole_layer_is_that_of_linear():
    """The definition, without this repository's parts: rounded by hand."""
    layer, _ = twins(linear(), Float8Matmuls(per_row=True))
    x = torch.randn(9, INPUTS, generator=torch.Generator().manual_seed(4)).clamp(-6, 6).bfloat16()
    x[:, 0] = 7.0  # 448 is 64 times that
    rounded = (x.float() * 64).to(FP8_DTYPE).float() / 64
    expected = F.linear(rounded, layer.weight.float() * layer.weight_scale, layer.bias)
    assert relative(layer(x), expected) < 0.003  # the result is rounded to bfloat16


@pytest.mark.parametrize(
    ("capability", "hip", "said"),
    [((8, 9), None, None), ((8, 6), None, "RTX 3090 has 8.6; leave --fp8_fast out"), ((9, 4), "6.2", "built for AMD")],
)
def test_devices_without_float8_matmuls_are_refused(monkeypatch, capability, hip, said):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 3090")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        check_float8_matmuls(torch.device("cuda"), "--fp8_fast")
    with pytest.raises(UserError, match="this runs on cpu"):
        check_float8_matmuls(torch.device("cpu"), "--fp8_fast")
