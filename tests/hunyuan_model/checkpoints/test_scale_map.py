"""The published float8 transformer: weights in one file, their scales in a second one beside it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hunyuan_model.quantization.formats import FP8_DTYPE, WeightFormat, is_quantized_name
from hunyuan_model.quantization.linear import dequantized_weight
from hunyuan_model.runtime.loading import check_transformer_file, load_transformer
from hunyuan_model.runtime.settings import RuntimeSettings
from networks.merging import merge_lora_into_file, merge_patch, read_lora_files
from utils.errors import UserError

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
LORA = GOLDENS / "lora.safetensors"
FILE, MAP = "mp_rank_00_model_states_fp8.pt", "mp_rank_00_model_states_fp8_map.pt"


def is_quantized(name: str) -> bool:
    """All Linear layers of the blocks, those of the modulation too."""
    return ("_blocks.0" in name and "norm" not in name and name.endswith(".weight")) or is_quantized_name(name)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "dit.safetensors")


@pytest.fixture
def pair(tmp_path, weights) -> Path:
    """The golden transformer as such a pair, wrapped as published."""
    scales = {name: weight.abs().max() / 448 for name, weight in weights.items() if is_quantized(name) and weight.dim() == 2}
    stored = {
        name: (weight / scales[name]).to(FP8_DTYPE) if name in scales else weight.bfloat16() for name, weight in weights.items()
    }
    torch.save({"module": stored}, tmp_path / FILE)
    torch.save({name.removesuffix(".weight"): scale for name, scale in scales.items()}, tmp_path / MAP)
    return tmp_path / FILE


def parts(pair: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return torch.load(pair, weights_only=True)["module"], torch.load(pair.with_name(MAP), weights_only=True)


def load(path: Path, **options) -> nn.Module:
    return load_transformer(path, device="cpu", dtype=torch.float32, **options)


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def test_dequantized_weights_are_multiplied_with_their_scales(pair, weights):
    stored, scales = parts(pair)
    for name, parameter in load(pair).named_parameters():
        if stored[name].dtype == FP8_DTYPE:
            assert torch.equal(parameter, stored[name].float() * scales[name.removesuffix(".weight")])
            assert 0 < relative(parameter, weights[name]) < 0.04
        else:
            assert torch.equal(parameter, stored[name].float())


@pytest.mark.parametrize("scaled", [False, True])
def test_bytes_and_scales_are_kept(pair, scaled):
    stored, scales = parts(pair)
    io = load_file(GOLDENS / "dit_io.safetensors")
    model, wide = load(pair, runtime=RuntimeSettings(WeightFormat.INT8 if scaled else WeightFormat.FP8)), load(pair)
    parameters = dict(model.named_parameters())
    for name in stored:
        if is_quantized_name(name):
            assert torch.equal(parameters[name].view(torch.uint8), stored[name].view(torch.uint8))
            assert parameters[f"{name}_scale"].item() == scales[name.removesuffix(".weight")]
        else:
            assert parameters[name].dtype == torch.float32
    inputs = [io[f"caseB.{name}"] for name in ("x", "t", "text", "text_mask", "text2", "guidance")]
    torch.testing.assert_close(model(*inputs), wide(*inputs), atol=2e-5, rtol=1e-4)
    assert relative(model(*inputs), io["caseB.out"]) < 0.2


@pytest.mark.parametrize("storage", WeightFormat)
def test_a_lora_is_merged_into_what_the_weights_mean(pair, storage):
    plain, patch = load(pair), merge_patch(read_lora_files([LORA]), pair)
    merged = load(pair, patch=patch, runtime=RuntimeSettings(storage))
    assert len(patch.names) == 22
    for name in patch.names:
        layer = name.removesuffix(".weight")
        expected = patch(name, plain.get_parameter(name))
        stored = merged.get_submodule(layer)
        kinds = {WeightFormat.PLAIN: torch.float32, WeightFormat.INT8: torch.int8}
        kind = kinds.get(storage, torch.float8_e4m3fn)
        assert stored.weight.dtype == kind
        most = {torch.float32: 1e-6, torch.float8_e4m3fn: 0.03, torch.int8: 0.02}[kind]
        assert relative(dequantized_weight(stored), expected) < most
        assert relative(plain.get_parameter(name), expected) > 1e-3


def test_a_merged_file_holds_the_weights_themselves(pair, tmp_path):
    merge_lora_into_file(pair, read_lora_files([LORA], [0.0]), tmp_path / "merged.safetensors")
    merged, wide = load_file(tmp_path / "merged.safetensors"), load(pair)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    for name, parameter in wide.named_parameters():
        assert torch.equal(merged[name], parameter.bfloat16())


def test_scales_per_row_and_full_names_and_prefixes(pair):
    stored, scales = parts(pair)
    rows = {f"module.{name}.weight": scale.expand(len(stored[f"{name}.weight"])).clone() for name, scale in scales.items()}
    expected = load(pair)
    torch.save({"state_dict": rows}, pair.with_name(MAP))
    for name, parameter in load(pair).named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name))


def test_without_its_map_the_file_is_refused(pair):
    pair.with_name(MAP).unlink()
    with pytest.raises(UserError, match=rf"--dit .*{FILE} holds float8 weights that mean .* has none\. Fetch {MAP} into"):
        check_transformer_file(pair)


def test_weights_that_are_merely_cast_need_no_map_and_take_no_shared_one(pair, weights):
    _, scales = parts(pair)
    pair.with_name(MAP).unlink()
    torch.save(scales, pair.with_name("fp8_map.pt"))
    torch.save({name: weight.to(FP8_DTYPE) if weight.dim() == 2 else weight for name, weight in weights.items()}, pair)
    for name, parameter in load(pair).named_parameters():
        assert torch.equal(parameter, weights[name].to(FP8_DTYPE).float() if parameter.dim() == 2 else weights[name])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", [Path(MAP).stem, "fp8_map"])
def test_where_the_map_may_be(pair, name, suffix):
    (stored, scales), expected = parts(pair), load(pair)
    pair.with_name(MAP).unlink()
    path, other = pair.with_suffix(suffix), ".pt" if suffix == ".safetensors" else ".safetensors"
    pair.unlink()
    save_file(stored, path) if suffix == ".safetensors" else torch.save(stored, path)
    for map_suffix in (suffix, other):
        beside = path.with_name(f"{name}{map_suffix}")
        save_file(scales, beside) if map_suffix == ".safetensors" else torch.save(scales, beside)
        for key, parameter in load(path).named_parameters():
            assert torch.equal(parameter, expected.get_parameter(key))
        beside.unlink()


def test_a_map_beside_wide_weights_is_not_read(pair, weights):
    torch.save(weights, pair)
    pair.with_name(MAP).write_bytes(b"anything")
    for name, parameter in load(pair).named_parameters():
        assert torch.equal(parameter, weights[name])


def test_maps_that_do_not_fit_are_refused_before_loading(pair):
    _, scales = parts(pair)
    layer = "single_blocks.1.linear2"
    faults = {
        r"_map\.pt lacks the scales of 1 float8 weights in --dit .*_fp8\.pt, such as single_blocks\.1\.linear2\.weight": None,
        r"under single_blocks\.1\.linear2 a tensor of the shape \(3,\) that is no scale": torch.ones(3),
        r"under single_blocks\.1\.linear2 a tensor of the shape \(\)": torch.tensor(torch.nan),
    }
    for says, scale in faults.items():
        changed = {name: value for name, value in scales.items() if name != layer} | ({} if scale is None else {layer: scale})
        torch.save(changed, pair.with_name(MAP))
        with pytest.raises(UserError, match=says):
            check_transformer_file(pair)
    pair.with_name(MAP).write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match=r"the map of scales beside --dit .*_map\.pt .*damaged"):
        check_transformer_file(pair)
