"""The toy model does what its README claims: it generates what captions say, in every way the scripts can run it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.toy import scoring, world
from examples.toy.model_files import FOLDER, files_in
from examples.toy.reading import read
from examples.toy.toy_model import ToyModel
from hunyuan_model import load_transformer
from hunyuan_model.checkpoints.reading import open_checkpoint
from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime.settings import RuntimeSettings
from networks.lora import create_network
from tiny.variants import write_lora_of_every_kind

LARGEST = 30e6  # bytes of the whole model
NUMBER = 24
WORDS = ("background", "colour", "shape", "motion")


@pytest.fixture(scope="module")
def prompts() -> list[scoring.Prompt]:
    return scoring.held_out_prompts(NUMBER, frames=9, first_seed=500)


def generated(model: ToyModel, prompts: list[scoring.Prompt], **settings) -> np.ndarray:
    return model.generate([prompt.text for prompt in prompts], [prompt.seed for prompt in prompts], **settings)


def right(clips: np.ndarray, prompts: list[scoring.Prompt]) -> dict[str, int]:
    """How many clips show each word of their prompts."""
    readings = [read(clip).right(prompt.attributes) for clip, prompt in zip(clips, prompts)]
    return {word: sum(reading[word] for reading in readings) for word in WORDS}


@pytest.fixture(scope="module")
def clips(prompts) -> np.ndarray:
    return generated(ToyModel.load(), prompts)


def test_the_model_is_small_and_has_the_published_key_names():
    files = files_in(FOLDER)
    parts = [files.dit, *files.vae.iterdir(), *files.text_encoder1.iterdir(), *files.text_encoder2.iterdir()]
    assert sum(path.stat().st_size for path in parts) <= LARGEST
    assert (files.vae / "config.json").is_file()
    names = set(open_checkpoint(files.dit, "--dit").shapes)
    assert {"img_in.proj.weight", "double_blocks.0.img_attn_qkv.weight", "single_blocks.0.linear1.weight"} <= names
    assert "guidance_in.mlp.0.weight" in names


def test_a_few_held_out_prompts_are_generated(prompts):
    scores = right(generated(ToyModel.load(), prompts[:6]), prompts[:6])
    assert scores["background"] >= 5 and sum(scores.values()) >= 18, scores


@pytest.mark.slow
def test_held_out_prompts_are_generated(clips, prompts):
    scores = right(clips, prompts)
    # What 200 prompts score (see the model's README), with room for chance on so few.
    assert scores["background"] >= 0.95 * NUMBER and scores["colour"] >= 0.85 * NUMBER and scores["motion"] >= 0.8 * NUMBER, scores
    assert scores["shape"] >= 0.7 * NUMBER, scores


@pytest.mark.slow
def test_it_is_the_prompt_that_decides(clips, prompts):
    scores = right(np.roll(clips, 1, axis=0), prompts)
    assert all(scores[word] <= 0.5 * NUMBER for word in WORDS), scores


@pytest.mark.slow
def test_pictures_and_longer_clips_are_generated_too():
    model = ToyModel.load()
    for frames, number in ((1, 16), (17, 6)):
        prompts = scoring.held_out_prompts(number, frames, first_seed=700)
        readings = [read(clip).right(prompt.attributes) for clip, prompt in zip(generated(model, prompts, frames=frames), prompts)]
        assert sum(reading["background"] for reading in readings) >= 0.9 * number
        assert sum(reading["colour"] for reading in readings) >= 0.8 * number
        assert frames > 1 or sum(reading["shape"] for reading in readings) >= 0.7 * number


@pytest.mark.slow
def test_float8_weights_give_as_good_clips(clips, prompts):
    full, quantized = (
        right(clips, prompts),
        right(generated(ToyModel.load(runtime=RuntimeSettings(WeightFormat.FP8)), prompts), prompts),
    )
    assert all(abs(full[word] - quantized[word]) <= 2 for word in WORDS), (full, quantized)


@pytest.mark.parametrize(("frames", "number"), [(1, 32), pytest.param(9, 24, marks=pytest.mark.slow)])
def test_the_vae_shows_held_out_drawings(frames, number):
    drawings = world.draw_batch(world.generator(501, frames), number, frames, held_out=True).clips
    assert scoring.decibels(drawings, ToyModel.load().through_vae(drawings)) >= 28.0


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """A LoRA with random weights, strong enough to change every picture."""
    transformer = load_transformer(files_in(FOLDER).dit, device="cpu", dtype=torch.float32)
    torch.manual_seed(0)
    network = create_network(1.0, 4, 2.0, None, None, transformer)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_up" in name:
                parameter.normal_(0.0, 0.4)
    path = tmp_path_factory.mktemp("lora") / "random.safetensors"
    network.save_weights(path, torch.float32, {})
    return path


@pytest.mark.slow
def test_a_lora_gives_the_same_merged_injected_and_converted_there_and_back(lora, prompts, clips, call_script, tmp_path):
    other, back, merged = (tmp_path / name for name in ("other.safetensors", "back.safetensors", "merged/dit.safetensors"))
    assert call_script("convert_lora", "--input", lora, "--output", other, "--target", "other").status == 0
    assert call_script("convert_lora", "--input", other, "--output", back, "--target", "default").status == 0
    dit = files_in(FOLDER).dit
    ended = call_script("hv_generate_video", "--dit", dit, "--lora_weight", lora, "--save_merged_model", merged)
    assert ended.status == 0, ended.stderr
    for part in ("vae", "text_encoder", "text_encoder_2"):
        shutil.copytree(FOLDER / part, merged.parent / part)
    some, settings = prompts[:3], {"frames": 5, "steps": 6}
    reference = generated(ToyModel.load(lora=[lora]), some, **settings).astype(int)
    assert np.abs(generated(ToyModel.load(), some, **settings) - reference).max() > 30
    ways = {
        "injected": ToyModel.load(lora=[lora], inject=True),
        "other keys": ToyModel.load(lora=[other]),
        "there and back": ToyModel.load(lora=[back]),
    }
    for way, model in ways.items():
        assert np.abs(generated(model, some, **settings) - reference).max() <= 2, way
    # The merged file is stored in bfloat16, as the transformer it was made from: its pictures differ, but hardly.
    assert np.abs(generated(ToyModel.load(merged.parent), some, **settings) - reference).mean() < 1.0


@pytest.mark.slow
def test_every_kind_of_lora_gives_the_same_picture_merged_and_injected(call_script, tmp_path):
    files, lora = files_in(FOLDER), tmp_path / "kinds.safetensors"
    write_lora_of_every_kind(files.dit, lora)
    models = (
        "--dit",
        files.dit,
        "--vae",
        files.vae,
        "--text_encoder1",
        files.text_encoder1,
        "--text_encoder2",
        files.text_encoder2,
    )
    picture = ("--video_size", 64, 64, "--video_length", 1, "--infer_steps", 6, "--seed", 1, "--output_type", "images")

    def pixels(name: str, *flags: object) -> np.ndarray:
        prompt = ("--prompt", "a yellow cross on a green background")
        ended = call_script("hv_generate_video", *models, *picture, *prompt, "--save_path", tmp_path / name, *flags)
        assert ended.status == 0, ended.stderr
        (path,) = (tmp_path / name).glob("*/00000.png")
        return np.asarray(Image.open(path)).astype(int)

    merged = pixels("merged", "--lora_weight", lora)
    assert np.abs(pixels("base") - merged).max() > 30
    assert np.abs(pixels("injected", "--lora_weight", lora, "--lora_mode", "inject") - merged).max() <= 1
