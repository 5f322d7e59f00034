"""The same weights in diffusers' transformer: names and layouts translated. For comparisons of results and of speed."""

from __future__ import annotations

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import nn

from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer

# In diffusers' names; what stands here is renamed as a prefix, the rest is handled block by block.
OUTER_NAMES = {
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
REFINER_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}
DOUBLE_NAMES = {
    "img_mod.linear": "norm1.linear",
    "txt_mod.linear": "norm1_context.linear",
    "img_attn_q_norm": "attn.norm_q",
    "img_attn_k_norm": "attn.norm_k",
    "txt_attn_q_norm": "attn.norm_added_q",
    "txt_attn_k_norm": "attn.norm_added_k",
    "img_attn_proj": "attn.to_out.0",
    "txt_attn_proj": "attn.to_add_out",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
}
SINGLE_NAMES = {
    "modulation.linear": "norm.linear",
    "q_norm": "attn.norm_q",
    "k_norm": "attn.norm_k",
    "linear2": "proj_out",
}
QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
BLOCKS = {
    "txt_in.individual_token_refiner.blocks.": ("context_embedder.token_refiner.refiner_blocks.", REFINER_NAMES),
    "double_blocks.": ("transformer_blocks.", DOUBLE_NAMES),
    "single_blocks.": ("single_transformer_blocks.", SINGLE_NAMES),
}


def to_diffusers(weights: dict[str, torch.Tensor], hidden_size: int) -> dict[str, torch.Tensor]:
    """Official names and layouts -> those of diffusers."""
    converted = {}
    for name, tensor in weights.items():
        module, parameter = name.rsplit(".", 1)
        if module in OUTER_NAMES:
            converted[f"{OUTER_NAMES[module]}.{parameter}"] = tensor
            continue
        if module == "final_layer.adaLN_modulation.1":  # diffusers takes the scale first
            converted[f"norm_out.linear.{parameter}"] = torch.cat(tensor.chunk(2)[::-1])
            continue
        prefix = next(prefix for prefix in BLOCKS if name.startswith(prefix))
        target, names = BLOCKS[prefix]
        index, inner = module.removeprefix(prefix).split(".", 1)
        target = f"{target}{index}."
        if inner in names:
            converted[f"{target}{names[inner]}.{parameter}"] = tensor
        elif inner == "linear1":
            *parts, mlp = tensor.split([hidden_size] * 3 + [tensor.shape[0] - 3 * hidden_size])
            converted |= {f"{target}attn.{key}.{parameter}": part for key, part in zip(QKV, parts)}
            converted[f"{target}proj_mlp.{parameter}"] = mlp
        else:
            keys = ADDED_QKV if inner.startswith("txt_") else QKV
            converted |= {f"{target}attn.{key}.{parameter}": part for key, part in zip(keys, tensor.chunk(3))}
    return converted


def diffusers_model(config: TransformerConfig) -> HunyuanVideoTransformer3DModel:
    """A transformer of diffusers with these sizes."""
    return HunyuanVideoTransformer3DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        num_layers=config.double_depth,
        num_single_layers=config.single_depth,
        num_refiner_layers=config.refiner_depth,
        text_embed_dim=config.text_dim,
        pooled_projection_dim=config.pooled_dim,
        rope_axes_dim=config.rope_dims,
    )


def diffusers_transformer(ours: HYVideoDiffusionTransformer) -> HunyuanVideoTransformer3DModel:
    """A transformer of diffusers with the sizes and the weights of ours."""
    theirs = diffusers_model(ours.config)
    theirs.load_state_dict(to_diffusers(ours.state_dict(), ours.config.hidden_size))
    return theirs.eval()


def linears_of_blocks(model: nn.Module) -> list[str]:
    """The names of diffusers' layers that our LoRA is on by default."""
    return sorted(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks." in name and ".norm" not in name
    )


def run_diffusers(model: HunyuanVideoTransformer3DModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The velocity, of inputs named as our transformer's ``forward`` names them."""
    return model(
        hidden_states=inputs["x"],
        timestep=inputs["t"],
        encoder_hidden_states=inputs["text_states"],
        encoder_attention_mask=inputs["text_mask"],
        pooled_projections=inputs["text_states_2"],
        guidance=inputs["guidance"],
        return_dict=False,
    )[0]
