"""Loading the transformer, and telling users what they gave in its place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hunyuan_model
from benchmarks.loading import measure, write_checkpoint
from benchmarks.memory_watch import in_new_process
from hunyuan_model import check_text_encoder_files
from hunyuan_model.checkpoints.reading import open_checkpoint
from hunyuan_model.quantization.formats import WeightFormat, is_quantized_name
from hunyuan_model.runtime.loading import check_transformer_file, load_transformer
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.vae.loading import check_vae_file
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
GOLDENS = ROOT / "tests" / "goldens"
DIT = GOLDENS / "dit.safetensors"
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(DIT)


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "dit_io.safetensors")


def run(model: nn.Module, io: dict[str, torch.Tensor], case: str = "caseB", x: torch.Tensor | None = None) -> torch.Tensor:
    names = ("x", "t", "text", "text_mask", "text2", "guidance")
    values = [io[f"{case}.{name}"] for name in names]
    return model(values[0] if x is None else x, *values[1:])


def load(path: Path = DIT, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    return load_transformer(path, device="cpu", dtype=dtype, **options)


@pytest.mark.parametrize("name", ["dit.safetensors", "dit.pt"])
@pytest.mark.parametrize("case", ["caseA", "caseB", "caseC", "caseD"])
def test_outputs_are_the_reference_values(name, case, io):
    model = load(GOLDENS / name)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(run(model, io, case), io[f"{case}.out"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "transformer.", "model."])
def test_prefixed_names_and_bundles(tmp_path, prefix, weights, io):
    content = {prefix + name: tensor for name, tensor in weights.items()} | {"optimizer.step": torch.zeros(1)}
    save_file(content, tmp_path / "m.safetensors")
    torch.testing.assert_close(run(load(tmp_path / "m.safetensors"), io), io["caseB.out"], atol=2e-5, rtol=1e-4)


def test_dtype_and_attention_options(io):
    model = load(dtype=torch.bfloat16, attn_mode="sdpa", split_attn=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    half = {name: io[name].bfloat16() for name in ("caseC.x", "caseC.text", "caseC.text2")}
    out = run(model, io | half, "caseC")
    assert out.dtype == torch.bfloat16
    difference = out.float() - io["caseC.out"]
    assert difference.abs().max() < 0.08
    assert difference.square().mean().sqrt() < 0.02
    with pytest.raises(UserError, match="no attention mode"):
        load(attn_mode="fast")


def test_fp8_stores_block_linears_and_computes_with_their_values(tmp_path, weights, io):
    model = load(runtime=RuntimeSettings(WeightFormat.FP8))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (FP8 if is_quantized_name(name) else torch.float32)
    rounded = {name: tensor.to(FP8).float() if is_quantized_name(name) else tensor for name, tensor in weights.items()}
    save_file(rounded, tmp_path / "rounded.safetensors")
    twin = load(tmp_path / "rounded.safetensors")

    x = io["caseB.x"].clone().requires_grad_()
    x_twin = io["caseB.x"].clone().requires_grad_()
    out, expected = run(model, io, x=x), run(twin, io, x=x_twin)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
    assert (out - io["caseB.out"]).abs().max() > 1e-3  # the weights are rounded indeed
    out.square().mean().backward()
    expected.square().mean().backward()
    torch.testing.assert_close(x.grad, x_twin.grad, rtol=0, atol=1e-4 * float(x_twin.grad.abs().max()))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_float8_file_keeps_its_bytes_or_is_widened(tmp_path, suffix, weights, io):
    # Published float8 files hold more than the block weights as float8.
    stored = {name: tensor.to(FP8 if name.endswith(".weight") else torch.bfloat16) for name, tensor in weights.items()}
    path = tmp_path / f"m{suffix}"
    save_file(stored, path) if suffix == ".safetensors" else torch.save({"module": stored}, path)
    kept = load(path, runtime=RuntimeSettings(WeightFormat.FP8))
    for name, parameter in kept.named_parameters():
        if is_quantized_name(name):
            assert torch.equal(parameter.view(torch.uint8), stored[name].view(torch.uint8))
        else:
            assert torch.equal(parameter, stored[name].float())
    wide = load(path)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    torch.testing.assert_close(run(kept, io), run(wide, io), atol=2e-5, rtol=1e-4)


def test_fp8_under_autocast(io):
    model = load(runtime=RuntimeSettings(WeightFormat.FP8))
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model, io)
    assert out.isfinite().all()
    assert (out.float() - run(model, io)).square().mean().sqrt() < 0.02


def test_patch_merges_a_lora_while_loading(io):
    lora = load_file(GOLDENS / "lora.safetensors")

    def patch(name: str, weight: torch.Tensor) -> torch.Tensor:
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{key}.lora_up.weight" not in lora:
            return weight
        down, up = lora[f"{key}.lora_down.weight"], lora[f"{key}.lora_up.weight"]
        return weight + up @ down * (lora[f"{key}.alpha"] / len(down))

    expected = load_file(GOLDENS / "lora_io.safetensors")["out_merged_multiplier_1"]
    torch.testing.assert_close(run(load(patch=patch), io), expected, atol=3e-5, rtol=1e-4)


GIVEN_AS_DIT = {
    "vae.safetensors": "a HunyuanVideo VAE",
    "text_llm": "a Llama language model",
    "text_clip": "a CLIP text model",
    "lora.safetensors": "a LoRA in the layout of sd-scripts",
    "lora_other.safetensors": "a LoRA with lora_A/lora_B keys",
}


@pytest.mark.parametrize("name", GIVEN_AS_DIT)
def test_another_model_is_named(name):
    for check in (load, check_transformer_file):
        with pytest.raises(
            UserError, match=f"--dit needs a HunyuanVideo transformer, but .*{name}.* looks like {GIVEN_AS_DIT[name]}"
        ):
            check(GOLDENS / name)


def test_checks_of_the_right_files():
    config = check_transformer_file(DIT)
    assert (config.double_depth, config.single_depth, config.hidden_size) == (2, 3, 48)
    check_vae_file(GOLDENS / "vae.safetensors")
    check_text_encoder_files(GOLDENS / "text_llm", GOLDENS / "text_clip" / "model.safetensors")


def test_checks_of_the_wrong_files(tmp_path):
    with pytest.raises(UserError, match=r"--vae needs a HunyuanVideo VAE, but .* looks like a HunyuanVideo transformer"):
        check_vae_file(DIT)
    with pytest.raises(UserError, match=r"--text_encoder1 needs a Llama language model, but .* looks like a CLIP text model"):
        check_text_encoder_files(GOLDENS / "text_clip", GOLDENS / "text_llm")
    with pytest.raises(UserError, match=r"--text_encoder2 needs a CLIP text model, but .* looks like a Llama"):
        check_text_encoder_files(GOLDENS / "text_llm", GOLDENS / "text_llm")
    with pytest.raises(UserError, match="--vae not found"):
        check_vae_file(tmp_path / "none.pt")


def test_an_incomplete_transformer(tmp_path, weights):
    path = tmp_path / "part.safetensors"
    save_file({name: tensor for name, tensor in weights.items() if not name.startswith("double_blocks.0.")}, path)
    with pytest.raises(UserError, match=r"--dit .*part\.safetensors: .*double_blocks\.0"):
        check_transformer_file(path)
    save_file({name: tensor for name, tensor in weights.items() if name != "double_blocks.1.txt_attn_proj.bias"}, path)
    with pytest.raises(UserError, match=r"1 tensors are missing, such as double_blocks\.1\.txt_attn_proj\.bias"):
        load(path)


def test_unknown_files(tmp_path):
    save_file({"weight": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="looks like an unknown file; its first keys are weight"):
        load(tmp_path / "m.safetensors")


def test_package_exports_are_lazy():
    code = "import sys, hunyuan_model; print(sorted({'torch', 'transformers', 'diffusers'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8")
    assert out.stdout.strip() == "[]"
    for name in hunyuan_model.__all__:
        assert callable(getattr(hunyuan_model, name))
    with pytest.raises(AttributeError, match="no attribute 'load_everything'"):
        _ = hunyuan_model.load_everything


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_final_weights_and_a_little(tmp_path):
    config = TransformerConfig(hidden_size=512, heads=4, mlp_size=2048, double_depth=2, single_depth=18)
    for suffix, stored, dtype, kind in (
        (".pt", "bfloat16", "bfloat16", "fp8"),
        (".safetensors", "bfloat16", "bfloat16", "int8"),
        (".safetensors", "float32", "float32", "plain"),
    ):
        path = tmp_path / f"m{suffix}"
        write_checkpoint(path, config, stored)
        result, size = in_new_process(measure, path, dtype, kind), path.stat().st_size
        assert result["final"] <= 1.01 * size * (1 if kind == "plain" else 0.72)
        above_start = result["beyond"] + result["final"]
        assert above_start > 0.9 * result["final"]  # the weights are in memory, not in the mapped file
        assert result["beyond"] < 40 << 20
        path.unlink()


def test_checkpoints_of_several_files_load(tmp_path, weights, io):
    names = sorted(weights)
    halves = {"a.safetensors": names[:60], "b.safetensors": names[60:]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    assert len(open_checkpoint(tmp_path, "m").shapes) == 128
    torch.testing.assert_close(run(load(tmp_path), io), io["caseB.out"], atol=2e-5, rtol=1e-4)
