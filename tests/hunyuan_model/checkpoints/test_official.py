"""One set of weights in every layout: the tensors under the official names are the same, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.diffusers_twins import diffusers_transformer, to_diffusers
from hunyuan_model.checkpoints.layouts import TRANSFORMER_LAYOUTS
from hunyuan_model.checkpoints.loading import load_weights
from hunyuan_model.checkpoints.official import official_names
from hunyuan_model.checkpoints.reading import Checkpoint, open_checkpoint
from hunyuan_model.transformer.config import TransformerConfig, rope_dims_for
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from utils.errors import UserError

CONFIG = TransformerConfig(
    hidden_size=64,
    heads=2,
    head_dim=32,
    double_depth=2,
    single_depth=2,
    refiner_depth=1,
    mlp_size=256,
    text_dim=16,
    pooled_dim=8,
    rope_dims=rope_dims_for(32),
)
ANCHOR = "img_in.proj.weight"
# What ComfyUI does to each official name, in this order.
COMFYUI_RULES = (
    ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
    ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
    ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
    ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
    ("_mod.linear.", "_mod.lin."),
    ("_attn_qkv.", "_attn.qkv."),
    ("_attn_proj.", "_attn.proj."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.2."),
    ("_attn_q_norm.weight", "_attn.norm.query_norm.weight"),
    ("_attn_k_norm.weight", "_attn.norm.key_norm.weight"),
    (".q_norm.weight", ".norm.query_norm.weight"),
    (".k_norm.weight", ".norm.key_norm.weight"),
    ("_in.mlp.0.", "_in.in_layer."),
    ("_in.mlp.2.", "_in.out_layer."),
    (".modulation.linear.", ".modulation.lin."),
)


@pytest.fixture(scope="module")
def model() -> HYVideoDiffusionTransformer:
    torch.manual_seed(0)
    model = HYVideoDiffusionTransformer(CONFIG).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_()
    return model


def to_comfyui(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        for official, theirs in COMFYUI_RULES:
            name = name.replace(official, theirs)
        renamed[name] = tensor
    return renamed


def to_older_comfyui(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("_norm.weight", "_norm.scale"): tensor for name, tensor in to_comfyui(weights).items()}


WRITERS = {
    "official": lambda weights: weights,
    "ComfyUI": to_comfyui,
    "ComfyUI, older": to_older_comfyui,
    "diffusers": lambda weights: to_diffusers(weights, CONFIG.hidden_size),
}


def view(path: Path) -> tuple[Checkpoint, str]:
    checkpoint, layout = official_names(open_checkpoint(path, "model"), TRANSFORMER_LAYOUTS, ANCHOR)
    return checkpoint, layout.title


def require_equal(checkpoint: Checkpoint, weights: dict[str, Tensor]) -> None:
    assert checkpoint.shapes == {name: tuple(checkpoint.get(name).shape) for name in checkpoint.shapes}
    assert sorted(checkpoint.shapes) == sorted(weights)
    for name, tensor in weights.items():
        found = checkpoint.get(name)
        assert found.dtype == checkpoint.dtypes[name] == tensor.dtype
        assert torch.equal(found, tensor), name


@pytest.mark.parametrize("prefix", ["", "model.model.", "model.diffusion_model.", "net."])
@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_every_layout_gives_the_same_tensors(tmp_path, model, layout, prefix, suffix):
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    stored = {prefix + name: tensor.contiguous() for name, tensor in WRITERS[layout](weights).items()}
    if prefix == "model.diffusion_model.":  # a full checkpoint
        stored |= {"vae.decoder.conv_in.weight": torch.ones(2), "text_encoders.llama.transformer.norm.weight": torch.ones(2)}
    path = tmp_path / f"m{suffix}"
    save_file(stored, path) if suffix == ".safetensors" else torch.save({"module": stored}, path)
    checkpoint, title = view(path)
    assert title == layout.split(",")[0]
    require_equal(checkpoint, weights)


def test_the_folder_that_diffusers_writes(tmp_path, model):
    diffusers_transformer(model).save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 2
    checkpoint, title = view(tmp_path)
    assert title == "diffusers"
    require_equal(checkpoint, model.state_dict())
    with torch.device("meta"):
        loaded = HYVideoDiffusionTransformer(CONFIG)
    load_weights(loaded, checkpoint, device="cpu", dtype_of=lambda name: torch.float32)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("patched", [False, True])
def test_assembled_weights_end_in_memory_of_their_own(tmp_path, model, dtype, patched):
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    save_file(to_diffusers(weights, 64), tmp_path / "m.safetensors")
    with torch.device("meta"):
        loaded = HYVideoDiffusionTransformer(CONFIG)
    patch = (lambda name, tensor: tensor) if patched else None
    load_weights(loaded, view(tmp_path / "m.safetensors")[0], device="cpu", dtype_of=lambda name: dtype, patch=patch)
    parameters = dict(loaded.named_parameters())
    assert all(torch.equal(parameters[name].float(), tensor.to(dtype).float()) for name, tensor in weights.items())
    assert len({parameter.untyped_storage().data_ptr() for parameter in parameters.values()}) == len(parameters)


def test_unknown_names_stay_as_they_are(tmp_path, model):
    extra = {"transformer_blocks.0.attn.to_q.alpha": torch.ones(1), "other": torch.ones(2)}
    save_file(to_diffusers(model.state_dict(), 64) | extra, tmp_path / "m.safetensors")
    checkpoint, _ = view(tmp_path / "m.safetensors")
    assert set(checkpoint.shapes) - set(model.state_dict()) == set(extra)


FAULTS = {
    r"holds transformer_blocks\.0\.attn\.to_q\.weight, .*to_v\.weight without transformer_blocks\.0\.attn\.to_k\.": lambda found: (
        found.pop("transformer_blocks.0.attn.to_k.weight")
    ),
    r"holds parts of double_blocks\.0\.img_attn_qkv\.weight that .*to_k\.weight float32 \(64, 32\)": lambda found: found.update(
        {"transformer_blocks.0.attn.to_k.weight": torch.ones(64, 32)}
    ),
    r"holds parts of double_blocks\.0\.img_attn_qkv\.bias that do not fit together: .*to_k\.bias bfloat16": lambda found: (
        found.update({"transformer_blocks.0.attn.to_k.bias": torch.ones(64, dtype=torch.bfloat16)})
    ),
    r"holds parts of double_blocks\.0\.img_attn_qkv\.bias": lambda found: found.update(
        {f"transformer_blocks.0.attn.to_{part}.bias": torch.tensor(1.0) for part in "qkv"}
    ),
    r"holds img_in\.proj\.weight twice \(as (x_embedder|img_in)\.proj\.weight, ": lambda found: found.update(
        {"img_in.proj.weight": torch.ones(1)}
    ),
    r"holds norm_out\.linear\.weight with the shape \(\)": lambda found: found.update(
        {"norm_out.linear.weight": torch.tensor(1.0)}
    ),
    r"holds no tensor img_in\.proj\.weight in the layout of official, ComfyUI, diffusers": lambda found: found.pop(
        "x_embedder.proj.weight"
    ),
}


@pytest.mark.parametrize("says", FAULTS)
def test_files_with_faults_are_refused(tmp_path, model, says):
    stored = to_diffusers(model.state_dict(), 64)
    FAULTS[says](stored)
    torch.save(stored, tmp_path / "m.pt")
    with pytest.raises(UserError, match=says):
        view(tmp_path / "m.pt")


def test_a_name_in_two_layouts_is_refused(tmp_path, model):
    stored = to_comfyui(model.state_dict()) | {"single_blocks.0.q_norm.weight": torch.ones(32)}
    torch.save(stored, tmp_path / "m.pt")
    with pytest.raises(UserError, match=r"holds single_blocks\.0\.q_norm\.weight twice"):
        view(tmp_path / "m.pt")


def test_scales_go_along_with_the_rows_of_their_parts(tmp_path, model):
    save_file(to_diffusers(model.state_dict(), 64), tmp_path / "m.safetensors")
    block = "single_transformer_blocks.0."
    scales = {
        f"{block}attn.to_q.weight": torch.tensor([[2.0]]),
        f"{block}attn.to_k.weight": torch.rand(64, 1),
        f"{block}proj_mlp.weight": torch.rand(256, 4),
        f"{block}proj_out.weight": torch.tensor([[3.0]]),
        "norm_out.linear.weight": torch.rand(128, 1),
    }
    stored = open_checkpoint(tmp_path / "m.safetensors", "model")
    checkpoint, _ = official_names(stored.with_scales(scales), TRANSFORMER_LAYOUTS, ANCHOR)
    fused = checkpoint.scales["single_blocks.0.linear1.weight"]
    assert fused.shape == (3 * 64 + 256, 4)
    assert torch.equal(fused[:64], torch.full((64, 4), 2.0)) and torch.equal(fused[128:192], torch.ones(64, 4))
    assert torch.equal(fused[64:128], scales[f"{block}attn.to_k.weight"].expand(64, 4))
    assert torch.equal(fused[192:], scales[f"{block}proj_mlp.weight"])
    assert checkpoint.scales["single_blocks.0.linear2.weight"].tolist() == [[3.0]]
    swapped = scales["norm_out.linear.weight"]
    assert torch.equal(checkpoint.scales["final_layer.adaLN_modulation.1.weight"], torch.cat([swapped[64:], swapped[:64]]))
    assert len(checkpoint.scales) == 3
