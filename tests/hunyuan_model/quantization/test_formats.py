"""Codes and scales: what they hold, how close they are to the weights, and what is dequantized from them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hunyuan_model.quantization import formats
from hunyuan_model.quantization.formats import (
    FP8_DTYPE,
    GROUP,
    cast,
    cast_to_float8,
    dequantize,
    dequantize_stored,
    is_quantized_name,
    quantize_channels,
    quantize_groups,
)
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer

CODES = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE).float()
VALUES = CODES[~CODES.isnan()].unique()  # every number float8_e4m3fn can hold
WITH_SCALES = [quantize_groups, quantize_channels]


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def test_quantized_are_the_linears_of_the_blocks_but_modulation():
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
    assert torch.equal(distance, (VALUES[None] - x.float().clamp(-448, 448)[:, None]).abs().min(1).values)


def test_cast_between_other_dtypes_and_of_nothing():
    x = torch.tensor([1.0, 1000.0])
    assert torch.equal(cast(x, torch.bfloat16), x.bfloat16())
    assert cast(x, torch.float32) is x
    assert cast(torch.empty(0), FP8_DTYPE).shape == (0,)
    assert cast(torch.tensor([1e6, -1e6]), torch.float8_e5m2).float().tolist() == [57344.0, -57344.0]
    assert cast(torch.tensor([57344.0, 2.0]).to(torch.float8_e5m2), FP8_DTYPE).float().tolist() == [448.0, 2.0]
    assert cast(cast(x, FP8_DTYPE), FP8_DTYPE).float().tolist() == [1.0, 448.0]


def test_every_float8_code_is_dequantized_to_its_value():
    codes = torch.arange(256, dtype=torch.uint8)
    # Sign, 4 bits of exponent with bias 7, 3 bits of mantissa; exponent 0 is subnormal.
    sign, exponent, mantissa = 1 - 2.0 * (codes >> 7), ((codes >> 3) & 15).int(), (codes & 7).float()
    value = sign * torch.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6)
    numbers = (codes & 127) != 127  # the rest is NaN
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = dequantize(codes.view(FP8_DTYPE), dtype)
        assert found.dtype == dtype and torch.equal(found[numbers].float(), value[numbers])


def test_int8_is_within_half_a_step_of_the_weights():
    weight = torch.randn(300, 192, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 300)[:, None]
    weight[5] = 0
    weight[6, :64] = 0
    codes, scale = quantize_groups(weight)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (torch.int8, weight.shape, torch.bfloat16, (300, 3))
    steps = scale.float().repeat_interleave(GROUP, dim=1)
    distance = (weight - dequantize(codes, torch.float32, scale)).abs()
    assert bool((distance <= steps * 0.76).all())  # the largest of a group, whose scale may have been rounded down
    assert bool((distance <= steps * 0.501).float().mean() > 0.99)
    torch.testing.assert_close(scale.float() * 127, weight.abs().unflatten(1, (3, GROUP)).amax(2), rtol=2**-8, atol=0)
    assert not codes[5].any() and not codes[6, :64].any()
    codes, scale = quantize_groups(weight[:, :24])  # groups do not divide it: a scale for each channel
    assert scale.shape == (300, 1) and relative(dequantize(codes, torch.float32, scale), weight[:, :24]) < 0.01


def test_channel_scales_use_all_of_float8():
    weight = torch.randn(300, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 300)[:, None]
    weight[5] = 0
    codes, scale = quantize_channels(weight)
    assert (codes.dtype, scale.dtype, scale.shape) == (FP8_DTYPE, torch.float32, (300, 1))
    assert set(codes.float().abs().amax(1).tolist()) == {448.0, 0.0}
    distance = (weight - dequantize(codes, torch.float32, scale)).abs()
    assert bool((distance <= (weight.abs() / 16).clamp(min=2**-10 * scale) * 1.001).all())  # 3 bits, or below the smallest normal
    assert not codes[5].float().any()


@pytest.mark.parametrize("quantize", WITH_SCALES)
def test_what_is_not_finite_stays_visible(quantize):
    for broken in (torch.nan, torch.inf):
        weight = torch.ones(4, 64)
        weight[2, 3] = broken
        codes, scale = quantize(weight)
        assert not dequantize(codes, torch.float32, scale)[2].isfinite().all()


@pytest.mark.parametrize("spread", ["torch's initial weights", "normal, 0.02"])
def test_errors_of_a_layer_of_full_width(spread):
    """int8 is far closer than float8; scales bring float8 weights that are mostly subnormal back to its 3 bits."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.empty(768, 3072)
    if spread == "normal, 0.02":
        weight.normal_(0, 0.02, generator=generator)
    else:
        weight.uniform_(-(3072**-0.5), 3072**-0.5, generator=generator)
    plain, channels, groups = (
        relative(dequantize(codes, torch.float32, scale), weight)
        for codes, scale in (quantize(weight) for quantize in (cast_to_float8, quantize_channels, quantize_groups))
    )
    assert 0 < groups < 0.3 * channels and 0 < channels < 0.9 * plain


@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scales", [(1, 1), (40, 1), (40, 3)])
def test_stored_weights_are_dequantized_in_float32_and_rounded_once(codes, scales):
    generator = torch.Generator().manual_seed(2)
    weight = (100 * torch.randn(40, 1800, generator=generator)).clamp(-448, 448).to(codes)
    scale = torch.rand(scales, generator=generator)
    exact = weight.float() * scale.repeat_interleave(1800 // scales[1], 1)
    assert torch.equal(dequantize_stored(weight, torch.bfloat16, scale), exact.bfloat16())
    assert torch.equal(dequantize_stored(weight, torch.float32, scale), exact)


@pytest.mark.parametrize("quantize", WITH_SCALES)
def test_slices_change_nothing_and_are_few_on_devices(quantize, monkeypatch):
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    expected = quantize(weight)
    monkeypatch.setattr(formats, "_row_slices", lambda part, *_: [slice(0, 5), slice(5, 90), slice(90, len(part))])
    for one, other in zip(quantize(weight), expected):
        assert torch.equal(one.float(), other.float())


def test_devices_quantize_sixteen_million_values_at_once():
    shape = (21504, 3072)  # the largest weight of a block
    sliced = {device: list(formats._row_slices(torch.empty(shape, device=device))) for device in ("cpu", "meta")}
    for slices in sliced.values():
        assert [part.start for part in slices] == [0, *(part.stop for part in slices[:-1])] and slices[-1].stop >= shape[0]
        assert all(part.stop - part.start == slices[0].stop for part in slices)
    assert 2**24 - 3072 < sliced["meta"][0].stop * 3072 <= 2**24 and len(sliced["meta"]) == 4
    assert len(sliced["cpu"]) > 200


@pytest.mark.parametrize("inference", [False, True])
def test_threads_change_nothing_and_are_as_many_afterwards(inference):
    weight, before = torch.randn(3000, 640), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode(inference):
                found.append(quantize_groups(weight))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))
