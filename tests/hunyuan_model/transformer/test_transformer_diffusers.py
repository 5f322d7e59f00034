"""The same weights in the transformer of diffusers, an independent implementation."""

import pytest
import torch

from benchmarks.diffusers_twins import diffusers_transformer, run_diffusers
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer

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
    return ours, diffusers_transformer(ours)


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
