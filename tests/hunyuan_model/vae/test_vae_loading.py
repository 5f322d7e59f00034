"""Loading the VAE from every layout in which it is published."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hunyuan_model
from hunyuan_model.vae.loading import vae_config_from_shapes
from hunyuan_model.vae.model import AutoencoderKLCausal3D, VAEConfig
from utils.errors import UserError

TINY_FILE = Path(__file__).resolve().parents[2] / "goldens" / "vae.safetensors"
TINY_CONFIG = {
    "block_out_channels": [8, 16, 16, 16],
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "scaling_factor": 0.476986,
    "time_compression_ratio": 4,
    "spatial_compression_ratio": 8,
}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(TINY_FILE)


def load(path: Path, dtype: torch.dtype = torch.float32) -> AutoencoderKLCausal3D:
    return hunyuan_model.load_vae(path, device="cpu", dtype=dtype)


def assert_holds(vae: AutoencoderKLCausal3D, weights: dict[str, torch.Tensor]) -> None:
    state = vae.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)


def test_safetensors_without_config(weights):
    vae = load(TINY_FILE)
    assert_holds(vae, weights)
    assert vae.config == VAEConfig(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=8)
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_pt_wrapped_in_state_dict_with_a_prefix(tmp_path, weights):
    torch.save({"state_dict": {f"vae.{name}": tensor for name, tensor in weights.items()}}, tmp_path / "vae.pt")
    assert_holds(load(tmp_path / "vae.pt"), weights)


@pytest.mark.parametrize("name", ["pytorch_model.pt", "diffusion_pytorch_model.safetensors"])
def test_folder_with_config(tmp_path, weights, name):
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG), encoding="utf-8")
    if name.endswith(".pt"):
        torch.save(weights, tmp_path / name)
    else:
        save_file(weights, tmp_path / name)
    vae = load(tmp_path)
    assert_holds(vae, weights)
    assert (vae.config.norm_num_groups, vae.scaling_factor) == (4, 0.476986)
    assert load(tmp_path / name).config == vae.config


def test_the_folder_that_diffusers_saves(tmp_path, weights):
    from diffusers import AutoencoderKLHunyuanVideo

    theirs = AutoencoderKLHunyuanVideo(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=8)
    theirs.save_pretrained(tmp_path)
    assert_holds(load(tmp_path), theirs.state_dict())


# What ComfyUI does to each official name, in this order.
COMFYUI_RULES = (
    (r"down_blocks\.(\d)\.resnets\.(\d)\.", r"down.\1.block.\2."),
    (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
    *((rf"up_blocks\.{index}\.resnets\.(\d)\.", rf"up.{3 - index}.block.\1.") for index in range(4)),
    *((rf"up_blocks\.{index}\.upsamplers\.0\.", f"up.{3 - index}.upsample.") for index in range(4)),
    *((rf"mid_block\.resnets\.{index}\.", f"mid.block_{index + 1}.") for index in range(2)),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    (r"group_norm\.", "norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)


def to_comfyui(weights: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        for official, theirs in COMFYUI_RULES:
            name = re.sub(official, theirs, name)
        convolution = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        renamed[prefix + name] = tensor[..., None, None, None] if convolution else tensor
    return renamed


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_the_layout_that_comfyui_saves(tmp_path, weights, prefix):
    stored = to_comfyui(weights, prefix)
    assert f"{prefix}decoder.up.3.block.0.conv1.conv.weight" in stored
    assert stored[f"{prefix}encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1, 1)
    save_file(stored, tmp_path / "vae.safetensors")
    assert_holds(load(tmp_path / "vae.safetensors"), weights)


def test_beside_other_models(tmp_path, weights):
    """In a checkpoint of ComfyUI, and in a folder of diffusers."""
    others = {
        "model.diffusion_model.txt_in.individual_token_refiner.blocks.0.norm1.weight",
        "model.diffusion_model.double_blocks.0.x",
    }
    full = to_comfyui(weights, "vae.") | dict.fromkeys(others, torch.ones(1)) | {"text_encoders.clip_l.logit_scale": torch.ones(1)}
    save_file({name: tensor.clone() for name, tensor in full.items()}, tmp_path / "full.safetensors")
    assert_holds(load(tmp_path / "full.safetensors"), weights)
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    (tmp_path / "vae" / "config.json").write_text(json.dumps(TINY_CONFIG), encoding="utf-8")
    save_file(weights, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    vae = load(tmp_path)
    assert_holds(vae, weights)
    assert vae.config.norm_num_groups == 4


def test_the_vae_of_hunyuanvideo_1_5_is_named(tmp_path):
    from diffusers import AutoencoderKLHunyuanVideo15

    widths = {"block_out_channels": (8, 8, 8, 8, 8), "layers_per_block": 1}
    AutoencoderKLHunyuanVideo15(**widths).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"looks like the VAE of HunyuanVideo 1\.5, which is not supported \(use the VAE of"):
        load(tmp_path)


def test_weights_are_cast(weights):
    vae = load(TINY_FILE, torch.bfloat16)
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.bfloat16}
    name = "decoder.conv_out.conv.weight"
    assert torch.equal(vae.state_dict()[name], weights[name].bfloat16())


def test_config_of_something_else_is_passed_over_and_logged(tmp_path, weights, caplog):
    save_file(weights, tmp_path / "vae.safetensors")
    other = TINY_CONFIG | {"block_out_channels": [128, 256, 512, 512]}
    (tmp_path / "config.json").write_text(json.dumps(other), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path / "vae.safetensors").config.norm_num_groups == 8
    assert "config.json does not describe the VAE" in caplog.text


@pytest.mark.parametrize(
    "text, message",
    [
        (json.dumps(TINY_CONFIG | {"norm_num_groups": 3}), "norm_num_groups 3"),
        (json.dumps(TINY_CONFIG | {"scaling_factor": 0.5}), "scaling_factor is 0.5"),
        ("{", r"config\.json is not readable JSON"),
    ],
)
def test_config_that_cannot_be_followed_is_refused(tmp_path, weights, text, message):
    save_file(weights, tmp_path / "vae.safetensors")
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "vae.safetensors")


def test_incomplete_and_foreign_files_are_refused(tmp_path, weights):
    fewer = {name: tensor for name, tensor in weights.items() if name != "decoder.conv_out.conv.bias"}
    save_file(fewer, tmp_path / "fewer.safetensors")
    with pytest.raises(UserError, match=r"decoder\.conv_out\.conv\.bias"):
        load(tmp_path / "fewer.safetensors")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 4)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"--vae .*LoRA"):
        load(tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nothing.safetensors")


def test_norm_groups_assumed_for_the_published_widths():
    with torch.device("meta"):
        published = AutoencoderKLCausal3D(VAEConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in published.state_dict().items()}
    assert vae_config_from_shapes(shapes) == VAEConfig()


def test_a_file_without_four_blocks_is_refused(weights):
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items() if "down_blocks.3" not in name}
    with pytest.raises(UserError, match="four encoder blocks"):
        vae_config_from_shapes(shapes)
