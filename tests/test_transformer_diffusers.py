"""The same weights in the transformer of diffusers, an independent implementation."""

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

from hunyuan_model.architecture import TransformerConfig
from hunyuan_model.transformer import HYVideoDiffusionTransformer

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

CONFIG = TransformerConfig(
    hidden_size=128,
    heads=4,
    head_dim=32,
    double_depth=2,
    single_depth=2,
    mlp_size=512,
    text_dim=72,
    pooled_dim=40,
    rope_dims=(4, 14, 14),
)


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


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(3)
    ours = HYVideoDiffusionTransformer(CONFIG)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(noise * (0.1 if name.endswith("bias") else 0.8 / parameter[0].numel() ** 0.5))
    theirs = HunyuanVideoTransformer3DModel(
        num_attention_heads=CONFIG.heads,
        attention_head_dim=CONFIG.head_dim,
        num_layers=CONFIG.double_depth,
        num_single_layers=CONFIG.single_depth,
        num_refiner_layers=CONFIG.refiner_depth,
        text_embed_dim=CONFIG.text_dim,
        pooled_projection_dim=CONFIG.pooled_dim,
        rope_axes_dim=CONFIG.rope_dims,
    )
    theirs.load_state_dict(to_diffusers(ours.state_dict(), CONFIG.hidden_size))
    return ours, theirs


def make_inputs(size, lengths, rows=20):
    generator = torch.Generator().manual_seed(4)
    batch = len(lengths)
    return {
        "x": torch.randn(batch, 16, *size, generator=generator),
        "t": torch.rand(batch, generator=generator) * 1000,
        "text_states": torch.randn(batch, rows, CONFIG.text_dim, generator=generator),
        "text_mask": (torch.arange(rows) < torch.tensor(lengths)[:, None]).long(),
        "text_states_2": torch.randn(batch, CONFIG.pooled_dim, generator=generator),
        "guidance": torch.full((batch,), 6000.0),
    }


def run_diffusers(model, inputs):
    return model(
        hidden_states=inputs["x"],
        timestep=inputs["t"],
        encoder_hidden_states=inputs["text_states"],
        encoder_attention_mask=inputs["text_mask"],
        pooled_projections=inputs["text_states_2"],
        guidance=inputs["guidance"],
        return_dict=False,
    )[0]


CASES = {
    "image": ((1, 8, 12), [9]),
    "clip": ((3, 6, 8), [20]),
    "two text lengths": ((2, 4, 6), [4, 15]),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(models, case):
    ours, theirs = models
    inputs = make_inputs(*CASES[case])
    for name in ("x", "text_states", "text_states_2"):
        inputs[name].requires_grad_()
    out, expected = ours(**inputs), run_diffusers(theirs, inputs)
    assert (out - expected).abs().max() < 1e-4 * expected.std()

    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    leaves = [inputs["x"], inputs["text_states"], inputs["text_states_2"]]
    our_parameters = [
        ours.img_in.proj.weight,
        ours.txt_in.input_embedder.weight,
        ours.double_blocks[0].img_attn_proj.weight,
        ours.double_blocks[0].txt_mlp.fc1.weight,
        ours.single_blocks[1].linear2.weight,
        ours.time_in.mlp[0].weight,
    ]
    their_parameters = [
        theirs.x_embedder.proj.weight,
        theirs.context_embedder.proj_in.weight,
        theirs.transformer_blocks[0].attn.to_out[0].weight,
        theirs.transformer_blocks[0].ff_context.net[0].proj.weight,
        theirs.single_transformer_blocks[1].proj_out.weight,
        theirs.time_text_embed.timestep_embedder.linear_1.weight,
    ]
    our_gradients = torch.autograd.grad((out * weight).sum(), leaves + our_parameters)
    their_gradients = torch.autograd.grad((expected * weight).sum(), leaves + their_parameters)
    for index, (ours_, theirs_) in enumerate(zip(our_gradients, their_gradients)):
        assert theirs_.any(), index
        assert (ours_ - theirs_).abs().max() < 1e-4 * theirs_.abs().max(), index


def test_the_comparison_notices_a_difference(models):
    ours, theirs = models
    inputs = make_inputs(*CASES["image"])
    with torch.no_grad():
        expected = run_diffusers(theirs, inputs)
        inputs["text_mask"][:, 8] = 0
        assert (ours(**inputs) - expected).abs().max() > 1e-2 * expected.std()
