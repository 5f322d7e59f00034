"""Weights in one byte with scales: how close they are, what is computed from them, and what is kept for backward."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from examples.toy.model_files import FOLDER, files_in
from hunyuan_model.quantization.formats import (
    FP8_DTYPE,
    WeightFormat,
    cast_to_float8,
    dequantize,
    is_quantized_name,
    quantize_channels,
    quantize_groups,
)
from hunyuan_model.quantization.formats import GROUP as BLOCK
from hunyuan_model.quantization.linear import dequantized_weight, enable_quantized_linears, replace_weight, weight_scale
from hunyuan_model.runtime.loading import load_transformer
from hunyuan_model.runtime.settings import RuntimeSettings
from networks.lora import create_network
from utils.errors import UserError

INPUTS, OUTPUTS = 128, 40


def one_scale(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As the published float8 file has them."""
    scale = weight.abs().max() / 448
    return (weight / scale).to(FP8_DTYPE), scale.reshape(1, 1)


QUANTISERS = {"blocks": quantize_groups, "channels": quantize_channels, "one scale": one_scale}


def linear(kind: str, bias: bool = True) -> nn.Linear:
    """A frozen narrow Linear 128 -> 40, whose output channels are of very different sizes."""
    torch.manual_seed(0)
    layer = nn.Linear(INPUTS, OUTPUTS, bias=bias).requires_grad_(False)
    codes, scale = QUANTISERS[kind](layer.weight * torch.logspace(-2, 1, OUTPUTS)[:, None])
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.weight_scale = nn.Parameter(scale, requires_grad=False)
    return layer


def values(layer: nn.Linear) -> torch.Tensor:
    """The weight by the definition of blocks: each code times the scale of its row and its block of inputs."""
    scale = layer.weight_scale.float()
    scale = scale.expand(OUTPUTS, scale.shape[1]).repeat_interleave(INPUTS // scale.shape[1], dim=1)
    return layer.weight.float() * scale


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def test_whole_numbers_are_within_half_a_step_of_the_weights():
    weight = torch.randn(300, 192, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 300)[:, None]
    weight[5] = 0
    weight[6, :64] = 0
    codes, scale = quantize_groups(weight)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (torch.int8, weight.shape, torch.bfloat16, (300, 3))
    steps = scale.float().repeat_interleave(BLOCK, dim=1)
    distance = (weight - dequantize(codes, torch.float32, scale)).abs()
    assert bool((distance <= steps * 0.76).all())  # the largest of a block, whose scale may have been rounded down
    assert bool((distance <= steps * 0.501).float().mean() > 0.99)
    largest = weight.abs().unflatten(1, (3, BLOCK)).amax(2)
    torch.testing.assert_close(scale.float() * 127, largest, rtol=2**-8, atol=0)
    assert not codes[5].any() and not codes[6, :64].any()


def test_channels_use_all_of_float8():
    weight = torch.randn(300, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 300)[:, None]
    weight[5] = 0
    codes, scale = quantize_channels(weight)
    assert (codes.dtype, scale.dtype, scale.shape) == (FP8_DTYPE, torch.float32, (300, 1))
    assert set(codes.float().abs().amax(1).tolist()) == {448.0, 0.0}
    distance = (weight - dequantize(codes, torch.float32, scale)).abs()
    assert bool((distance <= (weight.abs() / 16).clamp(min=2**-10 * scale) * 1.001).all())  # 3 bits, or below the smallest normal
    assert not codes[5].float().any()


def test_sides_that_blocks_do_not_divide_get_a_scale_per_channel():
    weight = torch.randn(20, 24, generator=torch.Generator().manual_seed(1))
    codes, scale = quantize_groups(weight)
    assert scale.shape == (20, 1) and relative(dequantize(codes, torch.float32, scale), weight) < 0.01


@pytest.mark.parametrize("quantise", [quantize_groups, quantize_channels])
def test_broken_weights_stay_visible(quantise):
    for broken in (torch.nan, torch.inf):
        weight = torch.ones(4, 64)
        weight[2, 3] = broken
        codes, scale = quantise(weight)
        assert not dequantize(codes, torch.float32, scale)[2].isfinite().all()


@pytest.mark.parametrize("slice_elements", [64, 1 << 22])
def test_slices_change_nothing(monkeypatch, slice_elements):
    weight = torch.randn(50, 128, generator=torch.Generator().manual_seed(1))
    expected = [quantise(weight) for quantise in (quantize_groups, quantize_channels)]
    monkeypatch.setattr("hunyuan_model.quantization.formats.SLICE_ELEMENTS", slice_elements)
    for quantise, (codes, scale) in zip((quantize_groups, quantize_channels), expected):
        again = quantise(weight)
        assert torch.equal(again[0].view(torch.uint8), codes.view(torch.uint8)) and torch.equal(again[1], scale)


@pytest.mark.parametrize("kind", QUANTISERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantised_values(kind, dtype):
    layer = linear(kind)
    wide = dequantize(layer.weight, dtype, layer.weight_scale)
    assert wide.dtype == dtype
    precision = {torch.float32: 1e-7, torch.bfloat16: 2**-7, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(wide.float(), values(layer), rtol=precision, atol=6e-8 if dtype == torch.float16 else 0)


@pytest.mark.parametrize("kind", QUANTISERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient_equal_a_wide_linear(kind, dtype):
    layer = linear(kind)
    layer.bias.requires_grad_(True)
    assert enable_quantized_linears(layer, dtype) == 1
    weight, bias = values(layer).to(dtype), layer.bias.detach().to(dtype).requires_grad_()
    x = torch.randn(2, 5, INPUTS, dtype=dtype).requires_grad_()
    x_twin = x.detach().clone().requires_grad_()
    out, expected = layer(x), F.linear(x_twin, weight, bias)
    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    most = 1e-6 if dtype == torch.float32 else 0.01
    assert out.dtype == dtype and relative(out.float(), expected.float()) < most
    assert relative(x.grad.float(), x_twin.grad.float()) < most
    assert relative(layer.bias.grad, bias.grad.float()) < most
    assert layer.weight.grad is None and layer.weight_scale.grad is None


@pytest.mark.parametrize("kind", QUANTISERS)
def test_only_codes_and_scale_are_kept_for_backward(kind):
    layer = linear(kind)
    enable_quantized_linears(layer, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 3, INPUTS, requires_grad=True))
    assert [tensor.data_ptr() for tensor in kept] == [layer.weight.data_ptr(), layer.weight_scale.data_ptr()]


@pytest.mark.parametrize("kind", QUANTISERS)
def test_codes_and_scale_are_read_at_every_call(kind):
    layer = linear(kind, bias=False)
    enable_quantized_linears(layer, torch.float32)
    x = torch.randn(3, INPUTS)
    plain = layer(x)
    copied = copy.deepcopy(layer)
    layer.weight_scale.data = layer.weight_scale.data * 2
    torch.testing.assert_close(layer(x), 2 * plain)
    layer.weight.data = torch.zeros_like(layer.weight, dtype=torch.float32).to(layer.weight.dtype)
    assert not layer(x).any()
    assert torch.equal(copied(x), plain)
    layer.weight = nn.Parameter(copied.weight.detach().clone(), requires_grad=False)  # as swapping may put others in place
    layer.weight_scale = nn.Parameter(copied.weight_scale.detach().clone(), requires_grad=False)
    assert torch.equal(layer(x), plain)


def test_autocast_and_checkpointing():
    layer = linear("blocks")
    enable_quantized_linears(layer, torch.float32)
    x = torch.randn(6, INPUTS, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    recomputed = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(recomputed.square().sum(), x)[0], plain)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16 and relative(out.float(), layer(x)) < 0.01


@pytest.mark.parametrize("spread", ["torch's initial weights", "normal, 0.02"])
def test_the_error_of_a_full_width_layer_is_at_most_half_of_the_plain_casts(spread):
    generator = torch.Generator().manual_seed(2)
    weight = torch.empty(3072, 3072)
    if spread == "normal, 0.02":
        weight.normal_(0, 0.02, generator=generator)
    else:
        weight.uniform_(-(3072**-0.5), 3072**-0.5, generator=generator)
    x = torch.randn(4, 3072, generator=generator)
    exact = x @ weight.T
    errors = [
        relative(x @ dequantize(codes, torch.float32, scale).T, exact)
        for codes, scale in (cast_to_float8(weight), quantize_groups(weight))
    ]
    assert 0 < errors[1] <= 0.25 * errors[0], errors


@pytest.fixture(scope="module")
def toy() -> dict[str, nn.Module]:
    path = files_in(FOLDER).dit
    formats = {"wide": WeightFormat.PLAIN, "plain": WeightFormat.FP8, "scaled": WeightFormat.INT8}
    options = {name: {"runtime": RuntimeSettings(weights)} for name, weights in formats.items()}
    return {name: load_transformer(path, device="cpu", dtype=torch.float32, **given) for name, given in options.items()}


def test_the_error_of_the_toy_model_is_at_most_half_of_the_plain_casts(toy):
    config, generator = toy["wide"].config, torch.Generator().manual_seed(3)
    inputs = (
        torch.randn(2, config.in_channels, 3, 8, 8, generator=generator),
        torch.tensor([900.0, 300.0]),
        torch.randn(2, 12, config.text_dim, generator=generator),
        torch.ones(2, 12),
        torch.randn(2, config.pooled_dim, generator=generator),
        torch.tensor([6000.0, 6000.0]),
    )
    with torch.no_grad():
        out = {name: transformer(*inputs) for name, transformer in toy.items()}
    plain, scaled = relative(out["plain"], out["wide"]), relative(out["scaled"], out["wide"])
    assert 0 < scaled <= 0.5 * plain, (plain, scaled)


def test_what_loading_stores(toy):
    stored, wide = dict(toy["scaled"].named_parameters()), dict(toy["wide"].named_parameters())
    assert {name for name in stored if name.endswith("_scale")} == {f"{name}_scale" for name in wide if is_quantized_name(name)}
    for name, value in wide.items():
        if is_quantized_name(name):
            codes, scale = quantize_groups(value)
            assert torch.equal(stored[name], codes) and torch.equal(stored[f"{name}_scale"], scale)
        else:
            assert torch.equal(stored[name], value)
    assert not any(parameter.requires_grad for parameter in stored.values())
    size = sum(parameter.nbytes for name, parameter in stored.items() if is_quantized_name(name.removesuffix("_scale")))
    weights = sum(value.numel() for name, value in wide.items() if is_quantized_name(name))
    assert size <= 1.04 * weights  # one byte each, and two for 64


def test_a_float8_file_keeps_its_bytes(tmp_path, toy):
    path = tmp_path / "m.pt"
    tensors = load_file(files_in(FOLDER).dit)
    stored = {name: tensor.to(FP8_DTYPE) if is_quantized_name(name) else tensor for name, tensor in tensors.items()}
    torch.save(stored, path)
    model = load_transformer(path, device="cpu", dtype=torch.float32, runtime=RuntimeSettings(WeightFormat.INT8))
    for name, parameter in model.named_parameters():
        assert not name.endswith("_scale")
        if is_quantized_name(name):
            assert torch.equal(parameter.view(torch.uint8), stored[name].view(torch.uint8))
    # A weight that is changed on the way is rounded anew, with a scale; the others stay.
    changed = "single_blocks.1.linear1"

    def patch(name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight + 0.001 if name == f"{changed}.weight" else weight

    model = load_transformer(path, device="cpu", dtype=torch.float32, runtime=RuntimeSettings(WeightFormat.INT8), patch=patch)
    assert [name for name, _ in model.named_parameters() if name.endswith("_scale")] == [f"{changed}.weight_scale"]
    expected = stored[f"{changed}.weight"].float() + 0.001
    assert relative(dequantized_weight(model.get_submodule(changed)), expected) < 0.01


def test_settings_that_miss_each_other_are_refused():
    for settings in ({"weights": WeightFormat.INT8, "fp8_fast": True}, {"gradient_checkpointing_cpu_offload": True}):
        with pytest.raises(UserError, match="or leave --"):
            RuntimeSettings(**settings)


def test_a_lora_is_merged_into_scaled_weights_and_trains_beside_them(toy):
    scaled = copy.deepcopy(toy["scaled"])

    torch.manual_seed(0)
    network = create_network(1.0, 2, 2.0, None, None, scaled)
    for lora in network.loras():
        nn.init.normal_(lora.lora_up.weight)
    path = "double_blocks.0.img_mlp.fc1"
    layer, lora = scaled.get_submodule(path), getattr(network, "lora_unet_" + path.replace(".", "_"))
    before = dequantized_weight(layer)
    network.merge_to(None, scaled)
    expected = before + lora.lora_up.weight.detach() @ lora.lora_down.weight.detach()
    assert layer.weight.dtype == torch.int8 and relative(dequantized_weight(layer), expected) < 0.01
    assert relative(before, expected) > 0.1

    network.merge_to(None, scaled, dtype=torch.float32)
    assert layer.weight.dtype == torch.float32 and weight_scale(layer) is None
    x = torch.randn(2, layer.in_features)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("kind", QUANTISERS)
def test_a_weight_is_replaced_in_the_way_in_which_it_is_stored(kind):
    layer = linear(kind)
    value = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(5))
    dtype = layer.weight.dtype
    replace_weight(layer, value)
    assert layer.weight.dtype == dtype
    assert relative(dequantized_weight(layer), value) < (0.008 if kind == "blocks" else 0.03)
