"""Making many clips with the toy model, and scoring them; the model here has random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from examples.toy import scoring, world
from examples.toy.evaluate import film_strip
from examples.toy.model_files import require_model
from examples.toy.reading import Reading, read
from examples.toy.toy_model import ToyModel
from utils.errors import UserError

PROMPTS = ["a red circle on a blue background", "zorp", "a blue ring on a red background, falling", "zorp"]
SEEDS = [5, 6, 7, 8]
SMALL = {"frames": 5, "steps": 2, "size": 32}


@pytest.fixture(scope="module")
def folder(tiny_model) -> Path:
    return tiny_model.dit.parent


@pytest.fixture(scope="module")
def model(folder: Path) -> ToyModel:
    return ToyModel.load(folder)


def differences(clips: np.ndarray, others: np.ndarray) -> int:
    """The largest, in 8-bit steps: batches of other sizes round otherwise."""
    return int(np.abs(clips.astype(int) - others).max())


def test_a_clip_does_not_depend_on_the_batch_it_is_in(model: ToyModel) -> None:
    together = model.generate(PROMPTS, SEEDS, **SMALL)
    assert together.shape == (4, 5, 32, 32, 3) and together.dtype == np.uint8
    alone = np.concatenate([model.generate([prompt], [seed], **SMALL) for prompt, seed in zip(PROMPTS, SEEDS)])
    assert differences(together, alone) <= 1
    backwards = model.generate(PROMPTS[::-1], SEEDS[::-1], batch_size=3, **SMALL)
    assert differences(together, backwards[::-1]) <= 1
    assert differences(together[1], together[3]) > 10  # the same prompt with another seed


def test_the_clip_is_that_of_the_generating_script(model: ToyModel, folder: Path, tmp_path: Path, call_script) -> None:
    files = require_model(folder)
    flags = {"--dit": files.dit, "--vae": files.vae, "--text_encoder1": files.text_encoder1, "--text_encoder2": files.text_encoder2}
    flags |= {"--prompt": PROMPTS[0], "--seed": 5, "--video_length": 5, "--infer_steps": 2, "--save_path": tmp_path}
    words = [word for pair in flags.items() for word in pair]
    ended = call_script("hv_generate_video", *words, "--device", "cpu", "--video_size", 32, 32, "--output_type", "images")
    assert ended.status == 0, ended.stderr
    frames = np.stack([np.array(Image.open(path)) for path in sorted(tmp_path.glob("*/*.png"))])
    assert differences(model.generate(PROMPTS[:1], [5], **SMALL)[0], frames) <= 1


def test_loras_are_merged_with_their_multipliers(model: ToyModel, folder: Path, tmp_path: Path) -> None:
    weights = load_file(require_model(folder).dit)
    name = "double_blocks.0.img_mlp.fc1"
    outputs, inputs = weights[f"{name}.weight"].shape
    module = "lora_unet_" + name.replace(".", "_")
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, inputs, generator=generator), torch.randn(outputs, 2, generator=generator)
    tensors = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up, f"{module}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "lora.safetensors")
    merged = ToyModel.load(folder, lora=[tmp_path / "lora.safetensors"], multipliers=[0.5])
    change = merged.transformer.get_parameter(f"{name}.weight") - model.transformer.get_parameter(f"{name}.weight")
    torch.testing.assert_close(change, 0.5 * up @ down, rtol=1e-4, atol=1e-4)


def test_a_folder_without_a_model_is_refused_before_anything_else(call_script, tmp_path: Path) -> None:
    ended = call_script("examples.toy.evaluate", "--model", tmp_path / "none", "--output", tmp_path / "out")
    assert ended.status == 2
    assert "dit.safetensors, vae, text_encoder, text_encoder_2 are missing" in ended.stderr
    with pytest.raises(UserError, match=r"text_encoder_2 is missing"):
        for name in ("dit.safetensors", "vae", "text_encoder"):
            (tmp_path / name).mkdir()
        require_model(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--frames", 8), "not 4n + 1"),
        (("--lora_weight", "none.safetensors"), "none.safetensors"),
        (("--photographs", "none"), "--photographs none is not a folder"),
        (("--photographs", "."), "holds no pictures"),
        (("--concept_samples", -1), "negative"),
        (("--fp8_fast",), "give --fp8 as well"),
        (("--step_cache", 0.1, "--infer_steps", 2), "nothing to skip"),
        (("--inject_lora",), "name one with --lora_weight"),
    ],
)
def test_impossible_flags_are_refused(call_script, folder: Path, tmp_path: Path, monkeypatch, flags: tuple, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    ended = call_script("examples.toy.evaluate", "--model", folder, "--output", tmp_path / "out", *flags)
    assert ended.status == 2
    assert message in ended.stderr
    assert not (tmp_path / "out").exists()


def test_the_script_writes_tables_scores_and_a_contact_sheet(call_script, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "VAE_PICTURES", 2)
    monkeypatch.setattr(scoring, "VAE_CLIPS", 1)
    Image.fromarray(world.generator(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)).save(tmp_path / "photograph.png")
    flags = ("--prompts", 3, "--concept_samples", 3, "--frames", 5, "--infer_steps", 1, "--device", "cpu", "--seed", 4)
    places = ("--model", folder, "--output", tmp_path / "out", "--photographs", tmp_path)
    ended = call_script("examples.toy.evaluate", *flags, *places)
    assert ended.status == 0, ended.stderr
    for heading in (
        "### Prompts held out from training",
        "### Zorps",
        "### VAE: what comes back",
        "seconds for one clip of 5 frames",
    ):
        assert heading in ended.stdout
    scores = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert set(scores["prompts"]) == {"background", "colour", "shape", "motion", "all of them"}
    assert scores["prompts"]["shape"]["chance"] == pytest.approx(1 / 5)
    assert scores["prompts"]["all of them"]["right_of_drawn"] == 1.0
    assert scores["zorps"]["zorp, a picture"]["zorps_of_drawn"] == scores["zorps"]["zorp, a picture"]["number"] == 2
    assert scores["zorps"]["zorp, a clip"]["zorps_of_drawn"] == 1 and scores["zorps"]["no zorp"]["zorps_of_drawn"] == 0
    assert scores["vae"]["photographs"]["number"] == 1
    assert len(scores["clips"]) == 6 and scores["settings"]["seed"] == 4
    assert Image.open(tmp_path / "out" / "contact_sheet.png").width > 3 * 64


def test_held_out_prompts_come_once_before_any_comes_again() -> None:
    everything = world.all_attributes(held_out=True)
    prompts = scoring.held_out_prompts(len(everything) + 3, 5, first_seed=1)
    assert all(prompt.attributes.held_out for prompt in prompts)
    assert len({prompt.attributes for prompt in prompts[: len(everything)]}) == len(everything)
    assert len({prompt.seed for prompt in prompts}) == len(prompts)
    again, other = (scoring.held_out_prompts(5, 5, first_seed=seed) for seed in (1, 2))
    assert [prompt.text for prompt in again] == [prompt.text for prompt in prompts[:5]] != [prompt.text for prompt in other]
    assert all(all(read(prompt.drawn).right(prompt.attributes).values()) for prompt in prompts[:5])


def test_scores_count_what_is_right() -> None:
    attributes = world.Attributes("circle", "red", "blue", "left")
    prompts = [scoring.Prompt("a red circle", attributes, seed, np.empty(0)) for seed in range(4)]
    right, wrong = Reading("circle", "red", "blue", "left"), Reading("square", "red", "blue", None)
    group = scoring.Generated(prompts, np.empty(0), 1.0, [right, wrong, wrong, wrong], [right] * 4, [right, right, wrong, wrong])
    scores = scoring.score_prompts(group).scores
    assert (scores["shape"]["right"], scores["colour"]["right"], scores["all of them"]["right"]) == (0.25, 1.0, 0.25)
    assert (scores["motion"]["right_of_drawn"], scores["motion"]["right_of_drawn_through_vae"]) == (1.0, 0.5)
    assert scores["all of them"]["chance"] == pytest.approx(1 / (8 * 7 * 5 * 7))


def test_a_clip_is_shown_by_its_first_middle_and_last_frame() -> None:
    red, blue = (np.full((64, 64, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    strip = film_strip(np.stack([red, blue, red]))
    assert strip.shape == (64, 3 * 64 + 4, 3) and np.array_equal(film_strip(red[None]), red)
    assert [tuple(strip[0, column]) for column in (0, 66, 132)] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
