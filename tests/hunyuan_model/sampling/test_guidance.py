"""Classifier-free guidance: off to the bit, in one batch and in two passes, in its steps only, and as diffusers has it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.diffusers_twins import diffusers_transformer
from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime.compilation import CompileSettings
from hunyuan_model.runtime.loading import load_transformer
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.sampling.flow import flow_sigmas, initial_noise, sample_latents
from hunyuan_model.sampling.generation import SamplingSettings, generate_latents
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from utils.errors import UserError

CPU = torch.device("cpu")
ROWS = 12
PLAIN = SamplingSettings(seed=3, video_size=(32, 48), video_length=5, infer_steps=6)
GUIDED = replace(PLAIN, guidance_scale=4.0)
SPLIT = replace(GUIDED, split_uncond=True)


def load(tiny_model, **runtime: object) -> HYVideoDiffusionTransformer:
    return load_transformer(tiny_model.dit, device=CPU, dtype=torch.float32, runtime=RuntimeSettings(**runtime))


@pytest.fixture(scope="module")
def transformer(tiny_model) -> HYVideoDiffusionTransformer:
    return load(tiny_model)


def text(transformer: HYVideoDiffusionTransformer, length: int) -> tuple[torch.Tensor, ...]:
    """Of a made-up prompt of ``length`` tokens."""
    generator = torch.Generator().manual_seed(length)
    return (
        torch.randn(1, ROWS, transformer.config.text_dim, generator=generator),
        (torch.arange(ROWS) < length).long()[None],
        torch.randn(1, transformer.config.pooled_dim, generator=generator),
    )


def generate(transformer: HYVideoDiffusionTransformer, settings: SamplingSettings, **options: object) -> torch.Tensor:
    """A prompt of nine tokens, away from one of two."""
    negative = text(transformer, 2)
    return generate_latents(
        transformer, text(transformer, 9), settings, device=CPU, dtype=torch.float32, negative=negative, **options
    )


def calls(transformer: HYVideoDiffusionTransformer, settings: SamplingSettings, **options: object) -> list[int]:
    """How many samples the transformer is given in each of its passes."""
    seen = []
    handle = transformer.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    generate(transformer, settings, **options)
    handle.remove()
    return seen


def test_scale_1_is_no_guidance_to_the_bit(transformer):
    alone = sample_latents(
        transformer,
        initial_noise(PLAIN.latent_size, torch.Generator().manual_seed(3)),
        *text(transformer, 9),
        sigmas=flow_sigmas(6, 7.0),
        guidance_scale=6.0,
        device=CPU,
        dtype=torch.float32,
    )
    assert torch.equal(generate(transformer, PLAIN), alone)
    assert torch.equal(generate(transformer, replace(PLAIN, split_uncond=True, guidance_range=(0.2, 0.4))), alone)
    assert calls(transformer, PLAIN) == [1] * 6
    assert (generate(transformer, GUIDED) - alone).abs().max() > 0.1


PATHS = {
    "torch": {},
    "sdpa": {"attn_mode": "sdpa"},
    "split_attn": {"split_attn": True},
    "int8": {"weights": WeightFormat.INT8},
    "fp8": {"weights": WeightFormat.FP8},
    "swap": {"blocks_to_swap": 2, "img_in_txt_in_offloading": True},
}


@pytest.mark.parametrize("path", PATHS)
def test_two_passes_equal_a_batch_of_two(tiny_model, path):
    transformer = load(tiny_model, **PATHS[path])
    batched = generate(transformer, GUIDED)
    torch.testing.assert_close(generate(transformer, SPLIT), batched, atol=1e-5, rtol=0)
    assert calls(transformer, GUIDED) == [2] * 6 and calls(transformer, SPLIT) == [1] * 12


@pytest.mark.slow
def test_compiled_blocks_give_the_same(tiny_model, transformer):
    expected = generate(transformer, GUIDED)
    compiled = load(tiny_model, compile=CompileSettings())
    batched = generate(compiled, GUIDED)
    torch.testing.assert_close(batched, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(generate(compiled, SPLIT), batched, atol=1e-5, rtol=0)


def test_a_step_cache_is_of_one_prompt(transformer):
    """So there are two, and no batch; a threshold that nothing stays below computes every step."""
    cached = replace(GUIDED, step_cache=1e-9)
    assert torch.equal(generate(transformer, cached), generate(transformer, SPLIT))
    assert calls(transformer, cached) == [1] * 12
    assert calls(transformer, replace(cached, step_cache=1e6)) == [1] * 6  # the first two and the last of each
    half = replace(cached, step_cache=1e6, guidance_range=(0.0, 0.5))  # three steps of the negative prompt: nothing to skip
    assert calls(transformer, half) == [1] * 6
    checked = replace(cached, step_cache_check=True)
    assert calls(transformer, checked) == [1] * 24


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ((0.0, 1.0), [0, 1, 2, 3, 4, 5]),
        ((0.0, 0.5), [0, 1, 2]),
        ((0.5, 1.0), [3, 4, 5]),
        ((1 / 3, 2 / 3), [2, 3]),
        ((0.1, 0.11), [1]),  # at least one
        ((0.99, 1.0), [5]),
    ],
)
def test_guidance_applies_in_its_steps_and_no_others(transformer, given, steps):
    expected = [2 if step in steps else 1 for step in range(6)]
    assert calls(transformer, replace(GUIDED, guidance_range=given)) == expected
    split = [count for number in expected for count in [1] * number]
    assert calls(transformer, replace(SPLIT, guidance_range=given)) == split


def test_a_range_counts_all_steps_also_those_that_a_start_leaves_out(transformer):
    start = torch.zeros(1, 16, *PLAIN.latent_size)
    half = replace(GUIDED, strength=0.5)
    assert calls(transformer, half, start=start) == [2, 2, 2]
    assert calls(transformer, replace(half, guidance_range=(0.0, 2 / 3)), start=start) == [2, 1, 1]
    assert calls(transformer, replace(half, guidance_range=(0.0, 0.5)), start=start) == [1, 1, 1]


def test_the_steps_outside_of_the_range_are_those_without_guidance(transformer):
    estimates: dict[str, list[torch.Tensor]] = {"plain": [], "late": []}
    late = replace(GUIDED, guidance_range=(0.5, 1.0))
    for name, settings in (("plain", PLAIN), ("late", late)):
        generate(transformer, settings, on_estimate=lambda _, latents, name=name: estimates[name].append(latents))
    same = [torch.equal(plain, guided) for plain, guided in zip(estimates["plain"], estimates["late"])]
    assert same == [True, True, True, False, False, False]


def test_the_pipeline_of_diffusers_gives_the_same(transformer):
    """With its own loop, scheduler and formula: noise, steps, shift, both prompts and both guidances are those of ours."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    pipeline = HunyuanVideoPipeline(
        transformer=diffusers_transformer(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        **dict.fromkeys(("text_encoder", "tokenizer", "vae", "text_encoder_2", "tokenizer_2")),
    )
    pipeline.set_progress_bar_config(disable=True)

    def names(prefix: str, length: int) -> dict[str, torch.Tensor]:
        states, mask, pooled = text(transformer, length)
        return {
            f"{prefix}prompt_embeds": states,
            f"{prefix}prompt_attention_mask": mask,
            f"{prefix}pooled_prompt_embeds": pooled,
        }

    with torch.no_grad():
        theirs = pipeline(
            **names("", 9),
            **names("negative_", 2),
            true_cfg_scale=4.0,
            guidance_scale=6.0,
            height=32,
            width=48,
            num_frames=5,
            num_inference_steps=6,
            latents=initial_noise(PLAIN.latent_size, torch.Generator().manual_seed(3)),
            output_type="latent",
            return_dict=False,
        )[0]
    theirs = torch.as_tensor(np.asarray(theirs))
    for settings in (GUIDED, SPLIT):
        torch.testing.assert_close(generate(transformer, settings), theirs, atol=1e-4, rtol=1e-4)
    assert (generate(transformer, PLAIN) - theirs).abs().max() > 0.1


@pytest.mark.parametrize("given", [(0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_ranges_that_cannot_be_are_refused(given):
    with pytest.raises(UserError, match="--guidance_range must be two numbers from 0 to 1, the smaller one first"):
        replace(GUIDED, guidance_range=given)
