"""--from_file: many results from one load, each as flags alone make it; what --prompt and prompt files may not be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from bench import refused
from safetensors.torch import load_file

import hunyuan_model
from networks.generation import sampler
from tiny.variants import write_lora

LINES = """# three of them
a red ball --w 48 --h 32 --d 7 --am 0.5
a blue cube

a red ball --f 5 --s 3 --g 3 --fs 5 --am 0
"""
OFF = ("--lora_multiplier", 0)
SHIFT = ("--flow_shift", 5)
BY_FLAGS = (
    ("a red ball", "--seed", 7, "--video_size", 32, 48, "--lora_multiplier", 0.5),
    ("a blue cube", "--seed", 21),
    ("a red ball", "--seed", 22, "--video_length", 5, "--infer_steps", 3, "--embedded_cfg_scale", 3, *SHIFT, *OFF),
)


@pytest.fixture
def generate(call_script, tiny_model, tmp_path):
    """``generate("--prompt", "x", *flags, folder="out")`` makes a picture of 32 x 32 in 2 steps."""
    encoders = ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
    models = ("--dit", tiny_model.dit, "--vae", tiny_model.vae, *encoders)
    size = ("--video_size", 32, 32, "--video_length", 1, "--infer_steps", 2)
    write_lora(tiny_model.dit, tmp_path / "lora.safetensors")

    def run(*flags: object, folder: str = "out"):
        return call_script("hv_generate_video", *models, *size, "--save_path", tmp_path / folder, *flags)

    return run


@pytest.fixture
def write(tmp_path):
    """``write("prompts.txt", text)`` -> its path."""

    def run(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return run


def latents(folder: Path) -> list[torch.Tensor]:
    return [load_file(path)["latent"] for path in sorted(folder.glob("*_latent.safetensors"))]


def test_each_result_of_a_file_is_that_of_a_run_of_its_own(generate, write, tmp_path):
    lora = ("--lora_weight", tmp_path / "lora.safetensors", "--lora_mode", "inject", "--output_type", "latent")
    ended = generate("--from_file", write("night.txt", LINES), "--seed", 20, *lora)
    assert ended.status == 0, ended.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"night_000{number}_{seed}_latent.safetensors" for number, seed in ((1, 7), (2, 21), (3, 22))]
    for number, (prompt, *flags) in enumerate(BY_FLAGS):
        assert generate("--prompt", prompt, *flags, *lora, folder=f"alone{number}").status == 0
        (alone,) = latents(tmp_path / f"alone{number}")
        assert torch.equal(alone, latents(tmp_path / "out")[number])


def test_one_load_and_each_text_once(generate, write, tmp_path, monkeypatch):
    seen: Counter[str] = Counter()
    plain_load, plain_encode = hunyuan_model.load_transformer, hunyuan_model.encode_prompts

    def encode(texts, *arguments):
        seen.update(texts)
        return plain_encode(texts, *arguments)

    monkeypatch.setattr(hunyuan_model, "encode_prompts", encode)
    monkeypatch.setattr(hunyuan_model, "load_transformer", lambda *a, **k: seen.update(["load"]) or plain_load(*a, **k))
    ended = generate(
        "--from_file", write("p.json", '["a cat", "a dog --d 3", {"prompt": "a cat", "seed": 4}]'), "--output_type", "images"
    )
    assert ended.status == 0, ended.stderr
    assert seen == {"a cat": 1, "a dog": 1, "load": 1}
    folders = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert folders[1:] == ["p_0002_3", "p_0003_4"] and folders[0].startswith("p_0001_")
    assert not list((tmp_path / "out").glob("*_latent.safetensors"))


def test_a_prompt_that_fails_costs_one_prompt(generate, write, tmp_path, monkeypatch):
    plain = sampler.generate_latents

    def generate_latents(transformer, text, settings, **options):
        if settings.seed == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(transformer, text, settings, **options)

    monkeypatch.setattr(sampler, "generate_latents", generate_latents)
    path = write("p.txt", "a cat --d 1\na dog --d 2\na cow --d 3\n")
    ended = generate("--from_file", path, "--output_type", "images")
    assert ended.status == 1 and sorted(path.name for path in (tmp_path / "out").glob("p_0*")) == ["p_0001_1", "p_0003_3"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--prompt", "a cat", "--prompt", "a dog"), ("--prompt is given twice", "--from_file")),
        (("--prompt", "a cat", "--from_file", "p.txt"), ("--prompt and --from_file both say what to sample",)),
        (("--prompt", "{folder}/p.txt"), ("p.txt is a file. Give it to --from_file",)),
        (("--prompt", "a cat --n ugly --w 512"), ("'a cat --n ugly --w 512' holds --n, --w", "--negative_prompt, --video_size")),
        (("--prompt", "a cat --l 3 --d 4"), ("use --guidance_scale, --seed behind the prompt",)),
        (("--from_file", "none.txt"), ("none.txt does not exist",)),
        (("--from_file", "{folder}/p.txt", "--lora_weight", "none.safetensors"), ("none.safetensors",)),
    ],
)
def test_what_is_meant_as_something_else(generate, write, tmp_path, monkeypatch, flags, says):
    forbid_loading(monkeypatch)
    write("p.txt", "a cat\n")
    refused(generate(*(str(word).format(folder=tmp_path) for word in flags)), *says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a dog --width 64", "--width is no option of a prompt line. Did you mean --w?"),
        ("a dog --w 100", "32 x 100 (height x width) is not divisible by 16; use 32 x 96"),
        ("a dog --f 4", "the video length 4 is not 4n + 1"),
        ("a dog --am 1,1", "--am has more values (2) than --lora_weight has files (1)"),
        ("a dog --step_cache 0.1", "nothing to skip in so few steps (2)"),
    ],
)
def test_a_line_that_cannot_be_made_is_named_before_loading(generate, write, tmp_path, monkeypatch, line, says):
    forbid_loading(monkeypatch)
    path = write("p.txt", f"a cat\n{line}\n")
    refused(generate("--from_file", path, "--lora_weight", tmp_path / "lora.safetensors"), f"{path}, line 2: ", says)
    assert not (tmp_path / "out").exists()


def test_prompts_with_dashes_are_prompts(generate):
    assert generate("--prompt", "day -- night, well--known --very fast", "--output_type", "latent").status == 0


def test_a_negative_prompt_without_guidance_is_said(generate, write, caplog):
    path = write("p.txt", "a cat\na dog --n dark\na cow --n dark --l 2\n")
    assert generate("--from_file", path, "--output_type", "latent", "--infer_steps", 1).status == 0
    assert f"{path}, line 2: --negative_prompt has no effect without classifier-free guidance; give --l 4" in caplog.text
    assert "line 3" not in caplog.text


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load_transformer", "load_vae", "load_text_encoder_1", "load_text_encoder_2", "encode_prompts"):
        monkeypatch.setattr(hunyuan_model, name, lambda *_a, **_k: pytest.fail("a model was loaded before the flags were checked"))
