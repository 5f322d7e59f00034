"""The step cache: which steps it computes, what it puts in place of the others, and how generation offers it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples.toy.toy_model import ToyModel
from hunyuan_model.runtime.loading import load_transformer
from hunyuan_model.runtime.offload.block_swap import max_blocks_to_swap
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.sampling import step_cache
from hunyuan_model.sampling.flow import flow_sigmas, initial_noise, sample_latents
from hunyuan_model.sampling.step_cache import StepCache
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from utils.errors import UserError
from utils.safetensors_io import read_header

CPU = torch.device("cpu")
STEPS = 10
SIGMAS = flow_sigmas(STEPS, 7.0)
HUGE = 1e6


@pytest.fixture(scope="module")
def transformer(tiny_model) -> HYVideoDiffusionTransformer:
    return load_transformer(tiny_model.dit, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def middling(transformer) -> float:
    """A threshold with which this model skips some of what may be skipped, and computes some."""
    inputs = conditions(transformer)
    for threshold in (0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0):
        cache = StepCache(transformer, STEPS, threshold)
        sample(cache, *inputs)
        if 4 <= len(cache.computed) <= 7:
            return threshold
    raise AssertionError("no threshold is middling")


def conditions(transformer: HYVideoDiffusionTransformer, seed: int = 0, batch: int = 1) -> tuple[torch.Tensor, ...]:
    """Noise (B, 16, 2, 4, 6) and the text of made-up prompts, all of one length."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.cat([initial_noise((2, 4, 6), generator) for _ in range(batch)]),
        torch.randn(batch, 7, transformer.config.text_dim, generator=generator),
        torch.ones(batch, 7),
        torch.randn(batch, transformer.config.pooled_dim, generator=generator),
    )


def sample(network, *noise_and_text: torch.Tensor, sigmas: torch.Tensor = SIGMAS) -> torch.Tensor:
    return sample_latents(network, *noise_and_text, sigmas=sigmas, guidance_scale=6.0, device=CPU, dtype=torch.float32)


@contextmanager
def forward_of(transformer: HYVideoDiffusionTransformer, velocity) -> Iterator[None]:
    """``velocity(x, t)`` in place of what the transformer computes."""
    transformer.forward = lambda x, t, *_: velocity(x, t.view(-1, 1, 1, 1, 1))
    try:
        yield
    finally:
        del transformer.forward


def test_threshold_0_computes_every_step_to_the_bit(transformer):
    inputs = conditions(transformer)
    cache = StepCache(transformer, STEPS, 0.0)
    assert torch.equal(sample(cache, *inputs), sample(transformer, *inputs))
    assert cache.computed == list(range(STEPS))


@pytest.mark.parametrize("steps", [4, 5, 10])
def test_a_huge_threshold_leaves_the_first_two_steps_and_the_last(transformer, steps):
    called = []
    with forward_of(transformer, lambda x, t: called.append(t) or x):
        cache = StepCache(transformer, steps, HUGE)
        sample(cache, *conditions(transformer), sigmas=flow_sigmas(steps, 7.0))
    assert cache.computed == [0, 1, steps - 1] and len(called) == 3


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.5])
def test_steps_and_velocities_are_those_of_the_formula(transformer, middling, factor):
    """Beside a loop in numpy, which reads the modulated input off the first block of the whole transformer."""
    threshold = factor * middling
    noise, *text = conditions(transformer)
    read = []
    hook = transformer.double_blocks[0].img_attn_qkv.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numpy()))
    x, times, velocities, computed, total = noise.numpy(), [], [], [], 0.0
    sigmas = SIGMAS.numpy()
    with torch.no_grad():
        for step, sigma in enumerate(sigmas[:-1]):
            t = torch.tensor([1000 * sigma])
            velocity = transformer(torch.from_numpy(x), t, *text, torch.tensor([6000.0])).numpy()
            if step:
                total += np.abs(read[-1] - read[-2]).sum() / np.abs(read[-2]).sum()
            if step in (0, 1, STEPS - 1) or total >= threshold:
                computed.append(step)
                times, velocities, total = [*times, sigma], [*velocities, velocity], 0.0
            else:
                slope = (velocities[-1] - velocities[-2]) / (times[-1] - times[-2])
                velocity = velocities[-1] + slope * (sigma - times[-1])
            x = x + (sigmas[step + 1] - sigma) * velocity
    hook.remove()
    assert 3 < len(computed) < STEPS or factor != 1.0
    cache = StepCache(transformer, STEPS, threshold)
    latents = sample(cache, noise, *text)
    assert cache.computed == computed
    np.testing.assert_allclose(latents.numpy(), x, atol=1e-3)


def test_one_sample_that_changes_has_the_batch_computed(transformer):
    """The other one, and the timestep, stay as they are; where two timesteps are the same there is no line to follow."""
    noise, states, mask, pooled = conditions(transformer, batch=2)
    moved = noise.clone()
    moved[1] *= -1

    def computed(rows: slice) -> list[int]:
        cache, x = StepCache(transformer, 6, 0.5), [noise, noise, noise, moved, moved, moved]
        with forward_of(transformer, lambda x, t: x), torch.no_grad():
            for one in x:
                t, guidance = torch.full((len(one[rows]),), 500.0), torch.full((len(one[rows]),), 6000.0)
                velocity = cache(one[rows], t, states[rows], mask[rows], pooled[rows], guidance)
                assert torch.isfinite(velocity).all()
        return cache.computed

    assert computed(slice(0, 1)) == [0, 1, 5]
    assert computed(slice(1, 2)) == computed(slice(0, 2)) == [0, 1, 3, 5]


def test_few_of_many_tokens_are_compared(transformer, monkeypatch, middling):
    noise, *text = conditions(transformer)  # of 2 x 2 x 3 tokens
    monkeypatch.setattr(step_cache, "MAX_TOKENS", 5)
    cache = StepCache(transformer, STEPS, middling)
    sample(cache, noise, *text)
    assert cache._last_input.shape == (1, 4, transformer.config.hidden_size)  # every third
    assert 3 < len(cache.computed) < STEPS


def test_swapped_blocks_change_no_bit_and_stay_away_in_skipped_steps(transformer, tiny_model, middling):
    most = max_blocks_to_swap(transformer.config)
    swapped = load_transformer(
        tiny_model.dit,
        device=CPU,
        dtype=torch.float32,
        runtime=RuntimeSettings(blocks_to_swap=most, img_in_txt_in_offloading=True, pinned_swap_memory=False),
    )
    begun = []
    plain = swapped.block_swap.begin
    swapped.block_swap.begin = lambda block: begun.append(block) or plain(block)
    for seed in (1, 2):  # in the second video the first block may be in a slot when it begins
        begun.clear()
        inputs = conditions(transformer, seed=seed)
        cache, beside = StepCache(swapped, STEPS, middling), StepCache(transformer, STEPS, middling)
        assert torch.equal(sample(cache, *inputs), sample(beside, *inputs))
        assert cache.computed == beside.computed and 3 < len(cache.computed) < STEPS
        assert begun.count(0) == begun.count(5) == len(cache.computed)


def test_a_network_that_computes_in_bfloat16(tiny_model, transformer, middling):
    half = load_transformer(tiny_model.dit, device=CPU, dtype=torch.bfloat16)
    noise, *text = conditions(transformer)
    cache, beside = StepCache(half, STEPS, middling), StepCache(transformer, STEPS, middling)
    latents = sample_latents(cache, noise, *text, sigmas=SIGMAS, guidance_scale=6.0, device=CPU, dtype=torch.bfloat16)
    reference = sample(beside, noise, *text)
    assert latents.dtype == torch.float32 and 3 < len(cache.computed) < STEPS
    assert (latents - reference).norm() < 0.3 * reference.norm()


# In generation


def test_generation_logs_how_many_steps_it_computed_and_the_error(bench, caplog):
    caplog.set_level("INFO")

    def generate(folder: str, *flags: object) -> tuple[torch.Tensor, str]:
        fixed = ("--video_size", 32, 48, "--infer_steps", 6, "--seed", 5, "--output_type", "latent")
        ended = bench.generate(*fixed, "--save_path", bench.folder / folder, *flags)
        assert ended.status == 0, ended.stderr
        (path,) = (bench.folder / folder).iterdir()
        return load_file(path)["latent"], read_header(path).metadata["step_cache"]

    plain, threshold = generate("plain")
    assert threshold == "0" and "step cache" not in caplog.text
    quick, threshold = generate("quick", "--step_cache", HUGE)
    assert threshold == "1e+06" and "3 of 6 steps computed" in caplog.text and "rms" not in caplog.text
    checked, _ = generate("checked", "--step_cache", HUGE, "--step_cache_check")
    assert torch.equal(checked, quick)
    error = 100 * ((quick - plain).norm() / plain.norm()).item()
    assert error > 0.1 and f"latents {error:.3g} % (rms) off those of all steps" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--step_cache", 0.1, "--infer_steps", 3], "--step_cache has nothing to skip in so few steps (3)"),
        (["--step_cache_check"], "--step_cache_check shows the error of --step_cache"),
    ],
    ids=["few steps", "check alone"],
)
def test_what_is_refused_before_anything_loads(bench, monkeypatch, flags, message):
    monkeypatch.setattr(HYVideoDiffusionTransformer, "__init__", lambda *_: pytest.fail("a model was loaded"))
    ended = bench.generate(*flags)
    assert ended.status == 2 and message in ended.stderr
    assert not (bench.folder / "out").exists()


def test_the_toy_model_samples_with_it(tiny_model):
    model = ToyModel.load(tiny_model.dit.parent)
    small = {"frames": 1, "steps": 6, "size": 32}
    called = []
    model.transformer.register_forward_pre_hook(lambda *_: called.append(1))
    plain = model.generate(["a ball", "two red balls"], [1, 2], **small)
    assert len(called) == 12  # two lengths of text, two batches
    quick = model.generate(["a ball", "two red balls"], [1, 2], step_cache=HUGE, **small)
    assert len(called) == 12 + 6 and quick.shape == plain.shape
    with pytest.raises(UserError, match="nothing to skip"):
        model.generate(["a ball"], [1], step_cache=0.1, frames=1, steps=2, size=32)
