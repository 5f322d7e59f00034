"""Requests with a negative prompt: what is encoded, what memory they are planned with, and what has no effect."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hunyuan_model
from hunyuan_model.runtime.memory import BatchSize
from hunyuan_model.runtime.memory_plan import MemoryPlan
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.sampling.generation import SamplingSettings
from hunyuan_model.text.encoding import TextConditions
from networks.generation.requests import Request, without_effect
from networks.generation.sampler import largest_batch

PLAIN = Request("a ball", SamplingSettings(seed=1, video_size=(32, 48), video_length=5))
GUIDED = PLAIN.changed({"guidance_scale": 4.0, "negative_prompt": "red and blue"})


def test_the_negative_prompt_is_encoded_where_it_is_used():
    assert PLAIN.texts == ("a ball",)
    assert GUIDED.texts == ("a ball", "red and blue")
    assert PLAIN.changed({"guidance_scale": 4.0}).texts == ("a ball", "")
    assert GUIDED.changed({"guidance_scale": 1.0}).texts == ("a ball",)


@pytest.mark.parametrize(
    ("values", "samples", "tokens"),
    [({}, 2, 6), ({"split_uncond": True}, 1, 6), ({"step_cache": 0.1}, 1, 6), ({"guidance_scale": 1.0}, 1, 3)],
)
def test_memory_is_planned_for_the_batch(tiny_model, values, samples, tokens):
    class Settings:
        config = hunyuan_model.check_transformer_file(tiny_model.dit)

    texts = {
        text: TextConditions(torch.zeros(1, 8, 4), (torch.arange(8) < length)[None], torch.zeros(1, 4))
        for text, length in (("a ball", 3), ("red and blue", 6))
    }
    found = largest_batch(Settings, [PLAIN, GUIDED.changed(values)], texts)
    assert found == BatchSize(samples, (2, 4, 6), tokens)


def test_running_out_of_memory_with_a_batch_of_two_names_the_flag(tiny_model):
    config, float32 = hunyuan_model.check_transformer_file(tiny_model.dit), torch.float32
    batch = BatchSize(2, (33, 90, 160), 30)
    plan = MemoryPlan(config, torch.device("cpu"), RuntimeSettings(), batch, float32, float32, trains=False)
    flag, split, saved = plan.next_remedy()
    assert flag == "--split_uncond" and split.batch == replace(batch, samples=1) and saved > 0.4 * plan.need().on_device
    assert "--split_uncond" not in [flag for flag, _ in split.remedies()]


def test_what_has_no_effect_is_said():
    assert without_effect([PLAIN, GUIDED, GUIDED.changed({"guidance_range": (0.2, 1.0), "split_uncond": True})]) == []
    assert without_effect([PLAIN, replace(PLAIN, negative_prompt="")]) == [
        "--negative_prompt has no effect without classifier-free guidance; give --guidance_scale 4, for example."
    ]
    lines = [replace(PLAIN, negative_prompt="x", where=f"p.txt, line {number}") for number in (3, 5)]
    (sentence,) = without_effect([PLAIN, *lines])
    assert sentence.startswith("p.txt, line 3, p.txt, line 5: --negative_prompt has no effect")
    (sentence,) = without_effect([PLAIN.changed({"split_uncond": True})])
    assert sentence.startswith("--split_uncond has no effect")


def test_the_script_says_it_before_it_samples(bench, caplog):
    ended = bench.generate("--negative_prompt", "blue", "--output_type", "latent")
    assert ended.status == 0, ended.stderr
    assert caplog.text.count("--negative_prompt has no effect without classifier-free guidance") == 1
