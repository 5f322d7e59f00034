"""hv_generate_video.py compares (--xy) and shows every batch in a contact sheet."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from bench import refused
from PIL import Image
from safetensors.torch import load_file

from networks.generation import sampler
from networks.generation.sheets import sheet as sheet_of_batch
from tiny.variants import write_lora


@pytest.fixture
def generate(call_script, tiny_model, tmp_path):
    """``generate(*flags, folder="out")`` makes PNG of 32 x 48 in 2 steps."""
    encoders = ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
    models = ("--dit", tiny_model.dit, "--vae", tiny_model.vae, *encoders)
    size = ("--video_size", 32, 48, "--video_length", 1, "--infer_steps", 2, "--seed", 5)
    write_lora(tiny_model.dit, tmp_path / "lora-000001.safetensors")
    write_lora(tiny_model.dit, tmp_path / "lora.safetensors", exclude_patterns="['.*single.*']")

    def run(*flags: object, folder: str = "out"):
        output = ("--save_path", tmp_path / folder, "--output_type", "images", "--device", "cpu")
        return call_script("hv_generate_video", *models, *size, *output, *flags)

    return run


def picture(folder: Path) -> np.ndarray:
    with Image.open(folder / "00000.png") as image:
        return np.asarray(image.convert("RGB"))


def holds(sheet: np.ndarray, frame: np.ndarray, zoom: int) -> tuple[int, int]:
    """Top and left of ``frame``, ``zoom`` times as large, in the sheet."""
    large = frame.repeat(zoom, 0).repeat(zoom, 1)
    for top, left in np.argwhere((sheet == large[0, 0]).all(-1)):
        part = sheet[top : top + len(large), left : left + large.shape[1]]
        if part.shape == large.shape and np.array_equal(part, large):
            return top, left
    raise AssertionError("the sheet does not hold the picture")


def test_a_comparison_is_what_single_runs_make_in_one_sheet(generate, tmp_path, monkeypatch, caplog) -> None:
    caplog.set_level("INFO")
    loads = []
    load = sampler.hunyuan_model.load_transformer
    monkeypatch.setattr(sampler.hunyuan_model, "load_transformer", lambda *a, **k: loads.append(1) or load(*a, **k))
    ended = generate("--prompt", "a red ball", "--xy", f"lora={tmp_path}/lora*.safetensors,none", "multiplier=0.5,1")
    assert ended.status == 0, ended.stderr
    assert loads == [1]
    *results, sheet_path, page = map(Path, ended.stdout.split())
    assert page == sheet_path.with_suffix(".html") and page.exists()
    assert [path.name for path in results] == ["xy_1_1_5", "xy_1_2_5", "xy_1_3_5", "xy_2_1_5", "xy_2_2_5"]
    assert "xy_2_3 is the same as xy_1_3" in caplog.text
    with Image.open(sheet_path) as sheet:
        assert sheet.text["prompt"] == "a red ball" and sheet.text["seed"] == "5" and "multiplier=0.5,1" in sheet.text["xy"]
        pixels = np.asarray(sheet)
    corners = [holds(pixels, picture(path), 4) for path in results]  # of 48 pixels, shown as at least 160
    tops, lefts = zip(*corners)
    assert tops[0] == tops[1] == tops[2] < tops[3] == tops[4]
    assert lefts[0] == lefts[3] < lefts[1] == lefts[4] < lefts[2]
    alone = ("--prompt", "a red ball", "--lora_mode", "inject")
    for place, flags in enumerate(
        [
            ("--lora_weight", tmp_path / "lora-000001.safetensors", "--lora_multiplier", 0.5),
            ("--lora_weight", tmp_path / "lora.safetensors", "--lora_multiplier", 0.5),
            (),
        ]
    ):
        assert generate(*alone, *flags, folder=f"alone{place}").status == 0
        (single,) = (tmp_path / f"alone{place}").iterdir()
        np.testing.assert_array_equal(picture(single), picture(results[place]))


def test_prompts_and_clips_become_a_sheet_and_a_video_in_step(generate, tmp_path) -> None:
    flags = ("--video_length", 5, "--fps", 12, "--output_type", "both", "--sheet", tmp_path / "sheets" / "all.png")
    ended = generate("--xy", 'prompt="a ball, red",猫が歩く 🐱', "seed=1,2", *flags)
    assert ended.status == 0, ended.stderr
    assert ended.stdout.split()[-3:] == [str(tmp_path / "sheets" / f"all.{ending}") for ending in ("png", "mp4", "html")]
    latents = [load_file(path)["latent"] for path in sorted((tmp_path / "out").glob("xy_*_latent.safetensors"))]
    assert len(latents) == 4 and not torch.equal(latents[0], latents[1])
    with av.open(str(tmp_path / "sheets" / "all.mp4")) as container, Image.open(tmp_path / "sheets" / "all.png") as sheet:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 5 and frames[0].shape[:2] == sheet.size[::-1]
        assert container.streams.video[0].average_rate == 12
        assert np.abs(frames[2].astype(int) - np.asarray(sheet)).mean() < 12


def test_a_config_file_compares_as_well(generate, tmp_path) -> None:
    config, sheet = tmp_path / "night.toml", tmp_path / "s.png"
    config.write_text(f"prompt = 'a ball'\nxy = ['steps=1', 'guidance=1,6']\nsheet = '{sheet}'\n", encoding="utf-8")
    ended = generate("--config_file", config)
    assert ended.status == 0 and ended.stdout.split()[-2] == str(sheet), ended.stderr


def test_every_prompt_file_gets_a_sheet_with_its_prompts(generate, tmp_path) -> None:
    prompts = tmp_path / "night.txt"
    prompts.write_text("a red ball\na blue cube --d 9 --w 32\n" + "a long prompt " * 12 + "\n", encoding="utf-8")
    for name in ("night_sheet.png", "night_sheet-2.png"):
        ended = generate("--from_file", prompts)
        assert ended.status == 0, ended.stderr
        *_, sheet, _ = ended.stdout.split()
        assert Path(sheet).name == name
        with Image.open(sheet) as image:
            assert image.text["infer_steps"] == "2" and "prompt" not in image.text
    restarted = generate("--from_file", prompts, "--skip_existing", "--no_metadata")
    assert restarted.status == 0 and not restarted.stdout
    (tmp_path / "out" / "night_sheet.png").rename(tmp_path / "first.png")
    (tmp_path / "out" / "night_sheet.html").unlink()
    again = generate("--from_file", prompts, "--skip_existing", "--no_metadata").stdout.split()
    assert again == [str(tmp_path / f"out/night_sheet.{ending}") for ending in ("png", "html")]
    assert "hv_generate_video" not in Path(again[1]).read_text(encoding="utf-8")
    with Image.open(tmp_path / "first.png") as first, Image.open(tmp_path / "out" / "night_sheet.png") as again:
        assert not getattr(again, "text", {}) and np.array_equal(np.asarray(first), np.asarray(again))
    ended = generate("--from_file", prompts, "--output_type", "latent", folder="latents")
    assert ended.status == 0 and not list((tmp_path / "latents").glob("*.png"))


def test_a_failed_cell_stays_empty_with_the_reason(generate, tmp_path, monkeypatch, caplog) -> None:
    sample = sampler.Sampler.sample
    said = []

    def failing(self, request, *arguments, **options):
        if request.sampling.seed == 2:
            raise RuntimeError("the driver fell asleep")
        return sample(self, request, *arguments, **options)

    monkeypatch.setattr(sampler.Sampler, "sample", failing)
    draw = sheet_of_batch.ContactSheet.picture
    monkeypatch.setattr(sheet_of_batch.ContactSheet, "picture", lambda sheet: said.append(sheet) or draw(sheet))
    ended = generate("--prompt", "a ball", "--xy", "seed=1,2", "steps=1,2")
    assert ended.status == 1 and "--xy, 'seed 2', 'steps 1' was not made: the driver fell asleep" in caplog.text
    (sheet,) = said
    assert [[(cell.caption, cell.failed, cell.frames is None) for cell in row] for row in sheet.rows] == [
        [("", False, False), ("the driver fell asleep", True, True)]
    ] * 2
    assert (sheet.column_labels, sheet.row_labels) == (["seed 1", "seed 2"], ["steps 1", "steps 2"])
    assert sheet.title == "a ball\n48 x 32 · guidance 6 · shift 7"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--prompt", "x", "--xy", "sead=1", "steps=1"), "compares no 'sead'. Did you mean 'seed'"),
        (("--prompt", "x", "--xy", "seed=1", "multiplier=1"), "there is none: give --lora_weight"),
        (("--xy", "seed=1", "steps=1"), "--xy needs --prompt, which is missing"),
        (("--prompt", "x", "--xy", "seed=1", "steps=1", "--from_file", "a.txt"), "--xy and --from_file both say what to sample"),
        (("--prompt", "x", "--xy", "seed=1", "steps=1", "--output_type", "latent"), "--output_type latent decodes nothing"),
        (("--prompt", "x", "--xy", "seed=1", "steps=1", "--sheet", "a.jpg"), "must end in .png"),
        (("--prompt", "x", "--xy", "seed=1", "lora=gone.safetensors"), "gone.safetensors does not exist"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_loading(generate, tmp_path, flags: tuple[str, ...], says: str) -> None:
    refused(generate(*flags), says)
    assert not (tmp_path / "out").exists()
