"""A transformer in every layout that circulates, opened as scripts open it: the same model, or a sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_writing import as_stored, write_gguf
from safetensors.torch import load_file, save_file
from small_transformer import CONFIG
from torch import Tensor

from benchmarks.diffusers_twins import diffusers_transformer, to_diffusers
from hunyuan_model.quantization.formats import FP8_DTYPE, WeightFormat, is_quantized_name
from hunyuan_model.quantization.linear import dequantized_weight
from hunyuan_model.runtime.loading import check_transformer_file, load_transformer
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from networks.merging import merge_lora_into_file, merge_patch, read_lora_files
from utils.errors import UserError

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
LORA = GOLDENS / "lora.safetensors"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_file(GOLDENS / "dit.safetensors")


def load(path: Path, **options: object) -> dict[str, Tensor]:
    return load_transformer(path, device="cpu", dtype=torch.float32, **options).state_dict()


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def single_file(folder: Path, weights: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "m.safetensors")
    return folder / "m.safetensors"


def diffusers_shards(folder: Path, size: str = "100KB") -> Path:
    diffusers_transformer(load_transformer(GOLDENS / "dit.safetensors", device="cpu", dtype=torch.float32)).save_pretrained(
        folder, max_shard_size=size
    )
    return folder


def full_checkpoint(folder: Path, weights: dict[str, Tensor]) -> Path:
    others = {"vae.decoder.conv_in.conv.weight": torch.ones(1), "text_encoders.llama.transformer.model.norm.weight": torch.ones(1)}
    return single_file(folder, {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()} | others)


def pipeline_folder(folder: Path, weights: dict[str, Tensor]) -> Path:
    diffusers_shards(folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "HunyuanVideoPipeline"}', encoding="utf-8")
    return folder


WRITERS: dict[str, Callable[[Path, dict[str, Tensor]], Path]] = {
    "diffusers' own folder of shards": lambda folder, weights: diffusers_shards(folder),
    "diffusers' file": lambda folder, weights: single_file(folder, to_diffusers(weights, 48)),
    "pipeline of diffusers": pipeline_folder,
    "full checkpoint": full_checkpoint,
}


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_is_the_same_model(tmp_path, weights, layout):
    path = WRITERS[layout](tmp_path, weights)
    assert check_transformer_file(path).hidden_size == 48
    require_same(load(path), weights)


def test_lora_are_merged_into_every_layout(tmp_path, weights):
    """While loading, and from file to file."""
    loras = read_lora_files([str(LORA)], [1.0])
    official = GOLDENS / "dit.safetensors"
    expected = load(official, patch=merge_patch(loras, official))
    assert any(not torch.equal(expected[name], weights[name]) for name in weights)
    folder = diffusers_shards(tmp_path / "theirs")
    require_same(load(folder, patch=merge_patch(loras, folder)), expected)
    merge_lora_into_file(folder, loras, tmp_path / "merged.safetensors")
    require_same(load_file(tmp_path / "merged.safetensors"), expected)


def scaled(weights: dict[str, Tensor], spelling: str, blocks: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the blocks as float8 with scales, one or for each 8 inputs, and the values that they mean."""
    stored, values = {}, {}
    for name, weight in weights.items():
        if not is_quantized_name(name):
            stored[name] = values[name] = weight
            continue
        groups = weight.unflatten(1, (-1, 8)) if blocks else weight[:, None]  # (rows, groups, inputs)
        scale = (groups.abs().amax(-1, keepdim=True) if blocks else groups.abs().max()) / 448
        codes = (groups / scale).to(FP8_DTYPE)
        stored[name] = codes.flatten(1)
        stored[name.removesuffix("weight") + spelling] = scale
        values[name] = (codes.float() * scale).flatten(1)
    return stored, values


SPELLINGS = ("scale_weight", "weight_scale", "fp8_scale", "scale_weight for each 8 inputs")


@pytest.mark.parametrize("given", SPELLINGS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_float8_with_scales_in_the_file(tmp_path, weights, given, prefix):
    spelling, _, blocks = given.partition(" ")
    stored, values = scaled(weights, spelling, bool(blocks))
    path = single_file(tmp_path, {prefix + name: tensor for name, tensor in (stored | {"scaled_fp8": torch.ones(2)}).items()})
    require_same(load(path), values)
    kept = load_transformer(path, device="cpu", dtype=torch.float32, runtime=RuntimeSettings(WeightFormat.FP8))
    for name, parameter in kept.named_parameters():
        if is_quantized_name(name):
            assert torch.equal(parameter.view(torch.uint8), stored[name].view(torch.uint8))
            layer = kept.get_submodule(name.removesuffix(".weight"))
            torch.testing.assert_close(dequantized_weight(layer, torch.float32), values[name], rtol=1e-6, atol=0)


def test_float8_without_its_scales_is_refused(tmp_path, weights):
    stored, _ = scaled(weights, "scale_weight")
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith("scale_weight")}
    with pytest.raises(UserError, match="mean something only with scales"):
        check_transformer_file(single_file(tmp_path, stored))


def test_a_pipeline_folder_without_the_part(tmp_path):
    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"--dit not found|--dit .*transformer"):
        check_transformer_file(tmp_path)
    shutil.copytree(GOLDENS / "text_llm", tmp_path / "transformer")
    with pytest.raises(UserError, match="looks like a Llama language model"):
        check_transformer_file(tmp_path)


def widened(weights: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    patch = weights["img_in.proj.weight"]
    return weights | {"img_in.proj.weight": torch.cat([patch] * 3, 1)[:, :channels]}


OTHERS = {
    "I2V": (lambda t: widened(t, 33), "I2V transformer with 33 input channels, which is not supported"),
    "SkyReels": (lambda t: widened(t, 32), "32 input channels (SkyReels I2V or keyframes), which is not supported"),
    "more channels": (lambda t: widened(t, 20), "takes 20 channels and predicts 16"),
    "1.5": (lambda t: t | {"byt5_in.fc1.weight": torch.ones(4, 4)}, "HunyuanVideo 1.5, which is not supported"),
    "MeanFlow": (lambda t: t | {"time_r_in.mlp.0.weight": torch.ones(4, 4)}, "MeanFlow transformer, which is not supported"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_models_of_other_kinds_are_named(tmp_path, weights, name, layout):
    change, says = OTHERS[name]
    changed = change(weights)
    if layout == "diffusers" and len(changed) == len(weights):
        changed = to_diffusers(changed, 48)
    with pytest.raises(UserError) as refused:
        check_transformer_file(single_file(tmp_path, changed))
    assert says in str(refused.value)
    assert ("HunyuanVideo 1.0" if name == "1.5" else "text-to-video model") in str(refused.value)  # what to use


@pytest.mark.parametrize("arch", ["hyvid", "pig", ""])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_gguf(tmp_path, arch, prefix):
    """The values that its codes mean, under official names; what is not quantized keeps its bits."""
    torch.manual_seed(0)
    state = HYVideoDiffusionTransformer(CONFIG).state_dict()
    quantized = {prefix + name for name in state if is_quantized_name(name)}
    write_gguf(tmp_path / "m.gguf", arch, {prefix + name: tensor for name, tensor in state.items()}, quantized, "Q8_0")
    assert check_transformer_file(tmp_path / "m.gguf").hidden_size == 64
    expected = {name: as_stored(tensor, "Q8_0") if prefix + name in quantized else tensor for name, tensor in state.items()}
    require_same(load(tmp_path / "m.gguf"), expected)
