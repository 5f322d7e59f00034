"""Files are told apart by names and shapes, and models of other kinds are named."""

from __future__ import annotations

import pytest
import torch

from hunyuan_model.checkpoints.identify import Kind, check_is, describe_shapes, identify
from utils.errors import UserError


def shapes_of(state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(tensor.shape) for name, tensor in state.items()}


def hunyuan(channels: int, *others: str) -> dict[str, tuple[int, ...]]:
    """A few names of an official transformer with this many input channels."""
    names = ["img_in.proj.weight", "txt_in.individual_token_refiner.blocks.0.norm1.weight", "double_blocks.0.img_attn_qkv.weight"]
    return dict.fromkeys((*names, *others), (8,)) | {"img_in.proj.weight": (8, channels, 1, 2, 2)}


def named(*names: str) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, (1,))


EXAMPLES = [
    (Kind.LYCORIS, named("lycoris_double_blocks_0_img_attn_qkv.lokr_w1", "lycoris_double_blocks_0_img_attn_qkv.lokr_w2_a")),
    (Kind.LORA_AB, named("transformer.single_transformer_blocks.0.attn.to_q.lora_A.default.weight")),
    (Kind.LORA_SD_SCRIPTS, named("lora_unet_img_in_proj.lora_down.weight", "lora_unet_img_in_proj.lora_up.weight")),
    (Kind.LATENT_CACHE, named("latents_3x34x60_float16")),
    (Kind.TEXT_CACHE, named("clipL_float16", "llm_float16", "llm_mask")),
    (Kind.TRANSFORMER, hunyuan(16)),
    (Kind.TRANSFORMER, named("model.model.txt_in.individual_token_refiner.blocks.0.norm1.weight", "model.model.double_blocks.0.x")),
    (Kind.I2V, hunyuan(33)),
    (Kind.SKYREELS, hunyuan(32)),
    (Kind.HUNYUAN_15, hunyuan(65, "vision_in.proj.0.weight", "byt5_in.fc1.weight", "cond_type_embedding.weight")),
    (Kind.MEAN_FLOW, hunyuan(16, "time_r_in.mlp.0.weight")),
    (Kind.FLUX, named("double_blocks.0.img_attn.qkv.weight", "img_in.weight", "single_blocks.0.linear1.weight")),
    (Kind.WAN, named("patch_embedding.weight", "blocks.0.self_attn.q.weight", "blocks.0.cross_attn.norm_k.weight")),
    (Kind.VAE, named("vae.decoder.up.0.block.0.conv1.conv.weight", "vae.post_quant_conv.weight")),
    (Kind.VAE_TINY, named("encoder.0.weight", "encoder.12.conv.0.weight", "decoder.1.weight", "decoder.22.bias")),
    (Kind.VAE_WAN, named("encoder.conv1.weight", "decoder.middle.0.residual.0.gamma")),
    (Kind.VAE_OTHER, named("encoder.conv_in.weight", "decoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.conv1.weight")),
    (
        Kind.LYCORIS,
        named("diffusion_model.double_blocks.0.img_attn_qkv.diff", "diffusion_model.double_blocks.0.img_attn_qkv.diff_b"),
    ),
    (Kind.LLAMA, named("token_embd.weight", "blk.0.attn_q.weight", "output_norm.weight")),
    (Kind.OPEN_CLIP, named("transformer.resblocks.0.attn.in_proj_weight")),
    (Kind.T5, named("encoder.block.0.layer.0.SelfAttention.q.weight")),
]


@pytest.mark.parametrize("kind, shapes", EXAMPLES, ids=[kind.name for kind, _ in EXAMPLES])
def test_kinds_told_by_names_and_shapes(kind, shapes):
    assert identify(shapes) is kind
    wanted = Kind.CLIP_TEXT
    with pytest.raises(UserError) as refused:
        check_is(shapes, wanted, "x.pt", "--text_encoder2")
    assert str(refused.value).startswith(f"--text_encoder2 needs a CLIP text model, but x.pt looks like {kind.text}. ")


def test_kinds_of_the_models_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    small = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    single = small | {"num_single_layers": 1}
    i2v, frames = single | {"in_channels": 33}, single | {"has_image_proj": True, "has_clean_x_embedder": True}
    with torch.device("meta"):
        models = [
            (Kind.TRANSFORMER, diffusers.HunyuanVideoTransformer3DModel(**single)),
            (Kind.TRANSFORMER, diffusers.HunyuanVideoTransformer3DModel(**single, guidance_embeds=False)),
            (Kind.I2V, diffusers.HunyuanVideoTransformer3DModel(**i2v)),
            (Kind.FRAMEPACK, diffusers.HunyuanVideoFramepackTransformer3DModel(**frames)),
            (Kind.HUNYUAN_15, diffusers.HunyuanVideo15Transformer3DModel(**small)),
            (Kind.FLUX, diffusers.FluxTransformer2DModel(**single, axes_dims_rope=(2, 2, 4))),
            (Kind.WAN, diffusers.WanTransformer3DModel(**small)),
            (Kind.VAE, diffusers.AutoencoderKLHunyuanVideo()),
            (Kind.VAE_15, diffusers.AutoencoderKLHunyuanVideo15()),
            (Kind.VAE_WAN, diffusers.AutoencoderKLWan()),
            (Kind.VAE_OTHER, diffusers.AutoencoderKL()),
        ]
    for kind, model in models:
        assert identify(shapes_of(model.state_dict())) is kind, type(model).__name__


def test_kinds_of_the_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    with torch.device("meta"):
        t5 = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=8)
        models = [
            (Kind.LLAMA, transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, num_key_value_heads=2))),
            (Kind.QWEN, transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**small, num_key_value_heads=2))),
            (Kind.QWEN, transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**small, num_key_value_heads=2))),
            (Kind.CLIP_TEXT, transformers.CLIPTextModel(transformers.CLIPTextConfig(**small))),
            (Kind.T5, transformers.T5EncoderModel(t5)),
        ]
    for kind, model in models:
        assert identify(shapes_of(model.state_dict())) is kind, type(model).__name__


def test_unknown_files():
    assert describe_shapes({"a.b": (1,), "c": (2,)}) == "an unknown file; its first keys are a.b, c"
    assert describe_shapes({}) == "a file without tensors"
