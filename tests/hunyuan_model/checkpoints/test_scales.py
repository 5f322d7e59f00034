"""float8 weights with their scales in the file, in the spellings of the programs that write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hunyuan_model.checkpoints.fingerprint import fingerprint_weights
from hunyuan_model.checkpoints.loading import load_weights, true_value
from hunyuan_model.checkpoints.reading import Checkpoint, open_checkpoint
from hunyuan_model.checkpoints.scales import require_scales, take_scales
from hunyuan_model.quantization.formats import FP8_DTYPE, FP8_DTYPES
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
WHOLE_MODELS = (
    ROOT / "tests" / "goldens" / "dit.safetensors",
    ROOT / "examples" / "toy" / "dit.safetensors",
    ROOT / "tests" / "goldens" / "text_llm" / "model.safetensors",
    ROOT / "tests" / "goldens" / "text_clip" / "model.safetensors",
    ROOT / "examples" / "toy" / "text_encoder" / "model.safetensors",
)
LAYERS = ("blocks.0.fc1", "blocks.0.fc2")
ROWS, INPUTS = 24, 192


def weight(layer: str) -> Tensor:
    generator = torch.Generator().manual_seed(LAYERS.index(layer))
    return torch.randn(ROWS, INPUTS, generator=generator) * 0.02


def of_tensor(values: Tensor, dtype: torch.dtype = FP8_DTYPE) -> tuple[Tensor, Tensor]:
    scale = values.abs().max() / torch.finfo(dtype).max
    return (values / scale).to(dtype), scale


def of_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    scale = values.abs().amax(1, keepdim=True) / 448
    return (values / scale).to(FP8_DTYPE), scale


def of_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """A scale for each 64 inputs of a row: (rows, inputs / 64, 1)."""
    blocks = values.unflatten(1, (-1, 64))
    scale = blocks.abs().amax(2, keepdim=True) / 448
    return (blocks / scale).to(FP8_DTYPE).flatten(1), scale


def file_of(
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]],
    scale_name: str,
    beside: Callable[[str], dict[str, Tensor]] = lambda layer: {},
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a file, and the weights that they mean."""
    stored, meant = {"norm.weight": torch.ones(3, dtype=torch.bfloat16)}, {"norm.weight": torch.ones(3, dtype=torch.bfloat16)}
    for layer in LAYERS:
        codes, scale = quantize(weight(layer))
        stored |= {f"{layer}.weight": codes, f"{layer}.{scale_name}": scale} | beside(layer)
        groups = scale.reshape(-1, 1 if scale.dim() < 3 else scale.shape[1])
        meant[f"{layer}.weight"] = codes.float() * groups.repeat_interleave(INPUTS // groups.shape[1], 1)
    return stored, meant


def described(layer: str, kind: str = "float8_e4m3fn") -> dict[str, Tensor]:
    text = json.dumps({"format": kind, "full_precision_matrix_mult": True}).encode()
    return {f"{layer}.comfy_quant": torch.tensor(list(text), dtype=torch.uint8), f"{layer}.input_scale": torch.tensor(1.0)}


FILES = {
    "HunyuanVideo": file_of(of_tensor, "fp8_scale"),
    "HunyuanVideo, one number in a row": file_of(
        lambda values: (of_tensor(values)[0], of_tensor(values)[1].reshape(1)), "fp8_scale"
    ),
    "ComfyUI": file_of(of_tensor, "scale_weight", lambda layer: {f"{layer}.scale_input": torch.tensor(1.0)}),
    "ComfyUI, e5m2": file_of(lambda values: of_tensor(values, torch.float8_e5m2), "scale_weight"),
    "newer ComfyUI": file_of(of_tensor, "weight_scale", described),
    "musubi, blocks": file_of(of_blocks, "scale_weight"),
    "musubi, rows": file_of(of_rows, "scale_weight"),
    "musubi, tensor": file_of(lambda values: (of_tensor(values)[0], of_tensor(values)[1].reshape(1)), "scale_weight"),
}
MARKER = {"scaled_fp8": torch.zeros(2, dtype=FP8_DTYPE)}


def opened(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Checkpoint:
    save_file(tensors, folder / "m.safetensors", metadata)
    checkpoint = take_scales(open_checkpoint(folder / "m.safetensors", "model"))
    require_scales(checkpoint, "Fetch the scales.")
    return checkpoint


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", FILES)
def test_every_spelling(tmp_path, kind, prefix):
    stored, meant = FILES[kind]
    stored = stored | (MARKER if kind.startswith("ComfyUI") else {})
    checkpoint = opened(tmp_path, {prefix + name: tensor for name, tensor in stored.items()}).under_prefix(prefix)
    assert set(checkpoint.shapes) == set(meant)
    for name, expected in meant.items():
        assert torch.equal(true_value(checkpoint.get(name), checkpoint.scales.get(name)), expected)
        assert checkpoint.is_quantized(name) == (name != "norm.weight")


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3, bias=False)
        self.blocks = nn.ModuleList([nn.ModuleDict({name: nn.Linear(INPUTS, ROWS, bias=False) for name in ("fc1", "fc2")})])


@pytest.mark.parametrize("kind", FILES)
def test_codes_are_kept_where_the_run_stores_float8(tmp_path, kind):
    stored, meant = FILES[kind]
    checkpoint = opened(tmp_path, stored)
    for dtype in (torch.bfloat16, FP8_DTYPE):
        with torch.device("meta"):
            module = Layers()
        load_weights(
            module, checkpoint, device="cpu", dtype_of=lambda name, dtype=dtype: dtype if "blocks" in name else torch.float32
        )
        for layer in LAYERS:
            found, codes = module.get_submodule(layer), stored[f"{layer}.weight"]
            if dtype == torch.bfloat16:
                assert torch.equal(found.weight, meant[f"{layer}.weight"].bfloat16())
            elif codes.dtype == FP8_DTYPE:
                assert torch.equal(found.weight.view(torch.uint8), codes.view(torch.uint8))
                assert torch.equal(found.weight_scale, checkpoint.scales[f"{layer}.weight"])
            else:
                assert found.weight.dtype == FP8_DTYPE


def test_formats_in_the_metadata_are_read_and_not_passed_on(tmp_path):
    stored, _ = file_of(of_tensor, "weight_scale")
    layers = {layer: {"format": "float8_e4m3fn"} for layer in LAYERS}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers}), "title": "t"}
    assert opened(tmp_path, stored, metadata).metadata == {"title": "t"}
    metadata["_quantization_metadata"] = json.dumps({"layers": layers | {"blocks.0.fc2": {"format": "mxfp8"}}})
    with pytest.raises(UserError, match=r"model .* stores blocks\.0\.fc2 in the format mxfp8, which is not read\. Use"):
        opened(tmp_path, stored, metadata)
    for damaged in ("{", "[" * 100_000, "[]", '{"layers": 3}'):
        assert opened(tmp_path, stored, {"_quantization_metadata": damaged}).scales


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8", "int8_tensorwise"])
def test_other_formats_are_refused_by_name(tmp_path, kind):
    stored, _ = file_of(of_tensor, "weight_scale", lambda layer: described(layer, kind))
    with pytest.raises(UserError, match=rf"stores blocks\.0\.fc1 in the format {kind}, which is not read\. Use .*float8"):
        opened(tmp_path, stored)


FIRST = "blocks.0.fc1"
FAULTS: dict[str, dict[str, Tensor | None]] = {
    r"holds blocks\.0\.fc1\.scale_weight \(5,\), which is no scale of .*weight \(24, 192\)": {
        f"{FIRST}.scale_weight": torch.ones(5)
    },
    r"fc1\.scale_weight \(24, 5, 1\), which": {f"{FIRST}.scale_weight": torch.ones(24, 5, 1)},
    r"fc1\.scale_weight \(24, 0\), which": {f"{FIRST}.scale_weight": torch.ones(24, 0)},
    r"fc1\.scale_weight \(\), which is no": {f"{FIRST}.scale_weight": torch.tensor(torch.inf)},
    r"fc1\.scale_weight \(1, 1\), which": {f"{FIRST}.scale_weight": -torch.ones(1, 1)},
    r"fc1\.scale_weight \(24, 1\), which": {f"{FIRST}.scale_weight": torch.zeros(24, 1)},
    r"fc1\.scale_weight \(1,\), which": {f"{FIRST}.scale_weight": torch.ones(1, dtype=torch.int32)},
    r"is no scale of blocks\.0\.fc1\.weight \(24, 192\) \(int8\)": {f"{FIRST}.weight": torch.ones(ROWS, INPUTS, dtype=torch.int8)},
    r"holds other\.scale_weight without a weight": {"other.scale_weight": torch.tensor(1.0)},
    r"holds two scales of blocks\.0\.fc1\.weight": {f"{FIRST}.fp8_scale": torch.tensor(1.0)},
    r"lacks the scale of blocks\.0\.fc1\.weight.*Copy or": {f"{FIRST}.scale_weight": None},
    r"stores blocks\.0\.fc1 in the format nvfp4": {f"{FIRST}.weight_scale_2": torch.tensor(1.0)},
    r"stores blocks\.0\.fc1 in the format unknown": {f"{FIRST}.comfy_quant": torch.ones(3, dtype=torch.uint8)},
}


@pytest.mark.parametrize("says", FAULTS)
def test_scales_that_cannot_be_right_are_refused(tmp_path, says):
    stored = {name: tensor for name, tensor in (FILES["ComfyUI"][0] | FAULTS[says]).items() if tensor is not None}
    with pytest.raises(UserError, match=says):
        opened(tmp_path, stored)


def test_a_layer_that_is_merely_cast_needs_no_scale(tmp_path):
    stored = FILES["ComfyUI"][0] | {"blocks.0.mod.weight": weight(FIRST).to(FP8_DTYPE)}
    assert set(opened(tmp_path, stored).scales) == {f"{layer}.weight" for layer in LAYERS}


def test_scales_count_in_the_fingerprint(tmp_path):
    stored, _ = FILES["ComfyUI"]
    first = fingerprint_weights(opened(tmp_path, stored))
    assert first == fingerprint_weights(opened(tmp_path, stored))
    assert first != fingerprint_weights(opened(tmp_path, stored | {f"{FIRST}.scale_weight": torch.tensor(0.5)}))


def cast_or_scaled(path: Path, dtype: torch.dtype, scaled: bool) -> dict[str, Tensor]:
    tensors = load_file(path)
    matrices = {name: tensor.float() for name, tensor in tensors.items() if tensor.dim() == 2}
    return tensors | {
        name: of_tensor(tensor, dtype)[0] if scaled else tensor.clamp(-448, 448).to(dtype) for name, tensor in matrices.items()
    }


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("path", WHOLE_MODELS, ids=lambda path: "/".join(path.parts[-3:]))
def test_missing_scales_are_noticed_by_the_values(tmp_path, path, dtype):
    assert not opened(tmp_path, cast_or_scaled(path, dtype, scaled=False)).scales
    with pytest.raises(UserError, match=r"model .*m\.safetensors holds float8 weights that mean .* has none\. Fetch the scales\."):
        opened(tmp_path, cast_or_scaled(path, dtype, scaled=True))
