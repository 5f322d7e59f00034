"""LoRA files of other models: what they look like is said, and they are not applied."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from networks.formats.reading import fit_to_model, lora_of
from tests.lora_samples import sd_scripts_lora, transformer
from utils.errors import UserError


def pair(module: str, inputs: int = 8) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": torch.ones(4, inputs), f"{module}.lora_B.weight": torch.ones(16, 4)}


def of_blocks(
    double: int,
    single: int,
    names=("transformer.transformer_blocks.{}.attn.to_q", "transformer.single_transformer_blocks.{}.proj_mlp"),
):
    tensors = {}
    for name, count in zip(names, (double, single)):
        for number in range(count):
            tensors |= pair(name.format(number))
    return tensors


COMFY = ("diffusion_model.double_blocks.{}.img_attn.qkv", "diffusion_model.single_blocks.{}.linear1")
FLAT = ("lora_unet_double_blocks_{}_img_mod_lin", "lora_unet_single_blocks_{}_modulation_lin")


@pytest.mark.parametrize(
    ("tensors", "model"),
    [
        (pair("diffusion_model.blocks.0.self_attn.q"), "Wan"),
        (pair("lora_unet_blocks_12_cross_attn_k_img"), "Wan"),
        (pair("transformer.blocks.3.attn1.to_q"), "Wan"),
        (pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"), "Stable Diffusion"),
        (pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"), "Stable Diffusion"),
        (pair("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"), "Stable Diffusion"),
        (pair("diffusion_model.double_blocks.3.img_attn_q"), "HunyuanVideo 1.5"),
        (pair("lora_unet_byt5_in_fc1"), "HunyuanVideo 1.5"),
    ],
)
def test_keys_of_other_models_are_named(tensors, model):
    with pytest.raises(UserError, match=rf"none of its 2 keys match .* It looks like a LoRA for {model}\."):
        lora_of(tensors, {}, "file.safetensors")
    with pytest.raises(
        UserError, match=rf"only in part: 2 of its 4 keys .* It looks like a LoRA for {model}\. Give --lora_partial"
    ):
        lora_of(tensors | pair("diffusion_model.double_blocks.0.img_attn_qkv"), {}, "file.safetensors")


@pytest.mark.parametrize("names", [COMFY, FLAT, None])
@pytest.mark.parametrize(("double", "single", "model"), [(19, 38, "Flux"), (54, 0, "HunyuanVideo 1.5"), (60, 0, "Qwen-Image")])
def test_models_with_the_same_names_are_told_by_their_depth(names, double, single, model):
    """Flux even has the same widths: its LoRA would be merged without a word."""
    tensors = of_blocks(double, single, *([names] if names else []))
    for partial in (False, True):
        with pytest.raises(UserError, match=rf"not a LoRA for HunyuanVideo: by the numbers of its blocks it is one for {model}"):
            lora_of(tensors, {}, "file.safetensors", partial=partial)
    lora_of(tensors, {"modelspec.architecture": "hunyuan-video/lora"}, "file.safetensors")
    lora_of(of_blocks(20, 40), {}, "file.safetensors")
    lora_of(of_blocks(0, 38), {}, "file.safetensors")


@pytest.mark.parametrize(
    ("metadata", "warned"),
    [
        ({"ss_base_model_version": "flux1"}, True),
        ({"ss_base_model_version": "hunyuan_video"}, False),
        ({"ss_base_model_version": "hunyuan_video_1_5"}, True),
        ({"modelspec.architecture": "wan2.1/lora"}, True),
        ({"modelspec.architecture": "Hunyuan-Video-I2V/lora"}, False),
        ({"ss_base_model_version": "", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, True),
        ({"ss_network_dim": "4"}, False),
    ],
)
def test_metadata_that_names_another_model_is_warned_of(caplog, metadata, warned):
    with caplog.at_level(logging.WARNING):
        lora_of(pair("diffusion_model.double_blocks.0.img_attn_qkv"), metadata, "file.safetensors")
    assert ("was made for another model, by its metadata" in caplog.text) is warned


@pytest.mark.parametrize(("channels", "prefix"), [(32, "diffusion_model.img_in.proj"), (33, "transformer.x_embedder.proj")])
def test_another_number_of_input_channels_is_named_and_can_be_left_out(caplog, channels, prefix):
    model = transformer()
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    rest = sd_scripts_lora(model, lambda path: path == "double_blocks.0.img_attn_proj")
    image = {
        f"{prefix}.lora_A.weight": torch.ones(4, channels, 1, 2, 2),
        f"{prefix}.lora_B.weight": torch.ones(64, 4, 1, 1, 1),
    }
    lora = lora_of(image | rest, {}, "file.safetensors")
    with pytest.raises(
        UserError, match=rf"1 of 2 have another size .* with {channels} input channels, such as image to video, .* has 16"
    ):
        fit_to_model(lora, shapes)
    assert list(fit_to_model(lora, shapes, partial=True)) == ["double_blocks.0.img_attn_proj.weight"]
    assert f"{channels} input channels" in caplog.text


def test_nothing_is_guessed_of_other_keys():
    with pytest.raises(UserError, match=r"Keys such as lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight or .* are expected"):
        lora_of(pair("transformer.transformer_blocks.0.attn1.to_q"), {}, "file.safetensors")  # LTX-Video, PixArt, ...


def test_a_lora_of_text_encoders_alone_is_named(caplog):
    text = pair("lora_te1_text_model_encoder_layers_0_mlp_fc1") | {"bundle_emb.word.clip_l": torch.ones(2, 8)}
    with pytest.raises(UserError, match=r"none of its 3 keys .* They are of text encoders or embeddings, which are not changed"):
        lora_of(text, {}, "file.safetensors")
    lora = lora_of(text | pair("diffusion_model.double_blocks.0.img_attn_qkv"), {}, "file.safetensors")
    assert set(lora.left_out) == text.keys() and "3 keys of text encoders or embeddings are left out" in caplog.text
