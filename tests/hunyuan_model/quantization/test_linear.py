"""Linear layers with quantized weights: what is computed, what is kept for the backward pass, and models loaded with them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from examples.toy.model_files import FOLDER, files_in
from hunyuan_model.quantization.formats import (
    FP8_DTYPE,
    Quantized,
    WeightFormat,
    cast_to_float8,
    dequantize,
    is_quantized_name,
    quantize_channels,
    quantize_groups,
)
from hunyuan_model.quantization.linear import dequantized_weight, enable_quantized_linears, replace_weight, weight_scale
from hunyuan_model.runtime.loading import load_transformer
from hunyuan_model.runtime.settings import RuntimeSettings
from networks.lora import create_network

INPUTS, OUTPUTS = 128, 40


def one_scale(weight: torch.Tensor) -> Quantized:
    """As the published float8 file has them."""
    scale = weight.abs().max() / 448
    return (weight / scale).to(FP8_DTYPE), scale.reshape(1, 1)


QUANTIZERS = {"fp8": cast_to_float8, "int8": quantize_groups, "fp8_scaled": quantize_channels, "one scale": one_scale}
PRECISION = {torch.float32: 1e-7, torch.bfloat16: 2**-7, torch.float16: 2**-11}


@pytest.fixture(params=QUANTIZERS)
def layer(request) -> nn.Linear:
    """A frozen quantized Linear 128 -> 40, whose output channels are of very different sizes."""
    return make_layer(request.param)


def make_layer(kind: str, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(INPUTS, OUTPUTS, bias=bias).requires_grad_(False)
    codes, scale = QUANTIZERS[kind](linear.weight * torch.logspace(-2, 1, OUTPUTS)[:, None])
    linear.weight = nn.Parameter(codes, requires_grad=False)
    if scale is not None:
        linear.weight_scale = nn.Parameter(scale, requires_grad=False)
    return linear


def values(layer: nn.Linear) -> torch.Tensor:
    """The weight by the definition: each code times the scale of its row and its group of inputs."""
    if weight_scale(layer) is None:
        return layer.weight.float()
    scale = layer.weight_scale.float()
    return layer.weight.float() * scale.expand(OUTPUTS, scale.shape[1]).repeat_interleave(INPUTS // scale.shape[1], dim=1)


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.float() - reference.float()).norm() / reference.float().norm()).item()


@pytest.mark.parametrize("learning", ["bias", "input", "both"])
@pytest.mark.parametrize("shape", [(INPUTS,), (2, 5, INPUTS)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_equal_those_of_a_full_precision_linear(layer, dtype, shape, learning):
    layer.bias.requires_grad_(learning != "input")
    assert enable_quantized_linears(layer, dtype) == 1
    weight, bias = values(layer).to(dtype), layer.bias.detach().to(dtype).requires_grad_()
    x = torch.randn(shape, dtype=dtype).requires_grad_(learning != "bias")
    twin = x.detach().clone().requires_grad_()
    out, expected = layer(x), F.linear(twin, weight, bias)
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.backward(direction)
    most = 1e-6 if dtype == torch.float32 else 0.01
    assert out.dtype == dtype and relative(out, expected) < most
    assert layer.weight.grad is None and (weight_scale(layer) is None or layer.weight_scale.grad is None)
    for one, other, learns in ((x, twin, "input"), (layer.bias, bias, "bias")):
        assert one.grad is None if learning not in (learns, "both") else relative(one.grad, other.grad) < most


def test_only_codes_and_scale_are_kept_for_backward(layer):
    enable_quantized_linears(layer, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 3, INPUTS, requires_grad=True))
    stored = [tensor for tensor in (layer.weight, weight_scale(layer)) if tensor is not None]
    assert [(tensor.dtype, tensor.data_ptr()) for tensor in kept] == [(tensor.dtype, tensor.data_ptr()) for tensor in stored]


def test_codes_and_scale_are_read_at_every_call(layer):
    enable_quantized_linears(layer, torch.float32)
    x = torch.randn(3, INPUTS)
    plain = layer(x)
    copied = copy.deepcopy(layer)
    layer.weight.data = torch.zeros_like(layer.weight, dtype=torch.float32).to(layer.weight.dtype)
    assert torch.equal(layer(x), layer.bias.expand(3, OUTPUTS)) and torch.equal(copied(x), plain)
    layer.weight = nn.Parameter(copied.weight.detach().clone(), requires_grad=False)  # as swapping may put others in place
    if weight_scale(layer) is not None:
        layer.weight_scale = nn.Parameter(2 * copied.weight_scale.detach(), requires_grad=False)
        torch.testing.assert_close(layer(x), 2 * plain - layer.bias)
    else:
        assert torch.equal(layer(x), plain)


def test_autocast_wins_and_without_it_the_answer_has_the_dtype_of_the_input(layer):
    enable_quantized_linears(layer, torch.bfloat16)
    x = torch.randn(6, INPUTS, requires_grad=True)
    expected = F.linear(x.bfloat16(), dequantize(layer.weight, torch.bfloat16, weight_scale(layer)), layer.bias.bfloat16())
    out = layer(x)
    assert out.dtype == torch.float32 and torch.equal(out, expected.float())
    with torch.autocast("cpu", torch.float16):
        assert layer(x).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert torch.equal(out, expected)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
    assert gradient.dtype == torch.float32 and relative(gradient, 2 * expected.float() @ values(layer)) < 0.02


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_weight_is_replaced_in_its_format_or_in_another_dtype(layer, dtype):
    value, stored = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(5)), layer.weight.dtype
    replace_weight(layer, value, dtype)
    assert layer.weight.dtype == (dtype or stored)
    if dtype is None:
        assert relative(dequantized_weight(layer), value) < (0.008 if stored == torch.int8 else 0.03)
    else:
        assert torch.equal(dequantized_weight(layer), value) and weight_scale(layer) is None


# ---------------------------------------------------------------------------------------------------------------------
# The toy model


@pytest.fixture(scope="module")
def toy() -> dict[WeightFormat, nn.Module]:
    path = files_in(FOLDER).dit
    return {
        weights: load_transformer(path, device="cpu", dtype=torch.float32, runtime=RuntimeSettings(weights))
        for weights in WeightFormat
    }


def test_the_error_of_the_toy_model_with_int8_is_at_most_half_of_that_with_float8(toy):
    config, generator = toy[WeightFormat.PLAIN].config, torch.Generator().manual_seed(3)
    inputs = (
        torch.randn(2, config.in_channels, 3, 8, 8, generator=generator),
        torch.tensor([900.0, 300.0]),
        torch.randn(2, 12, config.text_dim, generator=generator),
        torch.ones(2, 12),
        torch.randn(2, config.pooled_dim, generator=generator),
        torch.tensor([6000.0, 6000.0]),
    )
    with torch.no_grad():
        outputs = {weights: transformer(*inputs) for weights, transformer in toy.items()}
    errors = {weights: relative(output, outputs[WeightFormat.PLAIN]) for weights, output in outputs.items()}
    assert 0 < errors[WeightFormat.INT8] <= 0.5 * min(errors[WeightFormat.FP8], errors[WeightFormat.FP8_SCALED]), errors


@pytest.mark.parametrize(
    ("weights", "bytes_each"), [(WeightFormat.FP8, 1.0), (WeightFormat.FP8_SCALED, 1.04), (WeightFormat.INT8, 1.04)]
)
def test_what_loading_stores(toy, weights, bytes_each):
    stored, plain = dict(toy[weights].named_parameters()), dict(toy[WeightFormat.PLAIN].named_parameters())
    for name, value in plain.items():
        codes, scale = weights.quantizer(value) if is_quantized_name(name) else (value, None)
        assert torch.equal(stored[name].view(torch.uint8), codes.view(torch.uint8))
        assert (f"{name}_scale" in stored) == (scale is not None)
        assert scale is None or torch.equal(stored[f"{name}_scale"], scale)
    assert not any(parameter.requires_grad for parameter in stored.values())
    size = sum(parameter.nbytes for name, parameter in stored.items() if is_quantized_name(name.removesuffix("_scale")))
    assert size <= bytes_each * sum(value.numel() for name, value in plain.items() if is_quantized_name(name))


@pytest.mark.parametrize("weights", [WeightFormat.FP8_SCALED, WeightFormat.INT8])
def test_a_float8_file_keeps_its_bytes(tmp_path, weights):
    path = tmp_path / "m.pt"
    tensors = load_file(files_in(FOLDER).dit)
    stored = {name: tensor.to(FP8_DTYPE) if is_quantized_name(name) else tensor for name, tensor in tensors.items()}
    torch.save(stored, path)
    changed = "single_blocks.1.linear1"

    def patch(name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight + 0.001 if name == f"{changed}.weight" else weight

    model = load_transformer(path, device="cpu", dtype=torch.float32, runtime=RuntimeSettings(weights), patch=patch)
    # The weight that is changed on the way is quantized, with a scale; the others stay.
    assert [name for name, _ in model.named_parameters() if name.endswith("_scale")] == [f"{changed}.weight_scale"]
    assert relative(dequantized_weight(model.get_submodule(changed)), stored[f"{changed}.weight"].float() + 0.001) < 0.03
    for name, parameter in model.named_parameters():
        if is_quantized_name(name) and not name.startswith(changed):
            assert torch.equal(parameter.view(torch.uint8), stored[name].view(torch.uint8))


@pytest.mark.parametrize("weights", [WeightFormat.FP8_SCALED, WeightFormat.INT8])
def test_a_lora_is_merged_into_quantized_weights(toy, weights):
    model = copy.deepcopy(toy[weights])
    torch.manual_seed(0)
    network = create_network(1.0, 2, 2.0, None, None, model)
    for lora in network.loras():
        nn.init.normal_(lora.lora_up.weight)
    path = "double_blocks.0.img_mlp.fc1"
    layer, lora = model.get_submodule(path), getattr(network, "lora_unet_" + path.replace(".", "_"))
    before, stored = dequantized_weight(layer), layer.weight.dtype
    network.merge_to(None, model)
    expected = before + lora.lora_up.weight.detach() @ lora.lora_down.weight.detach()
    assert layer.weight.dtype == stored and relative(dequantized_weight(layer), expected) < 0.03 < 0.1 < relative(before, expected)

    network.merge_to(None, model, dtype=torch.float32)
    assert layer.weight.dtype == torch.float32 and weight_scale(layer) is None
    x = torch.randn(2, layer.in_features)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
