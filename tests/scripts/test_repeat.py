"""--show and --repeat: a result says how it was made, and is made again to the bit."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from variations import slow_but

from tiny.variants import write_lora
from utils.media.reading import read_frames

SIZE = ("--video_size", 32, 48, "--infer_steps", 2)


@pytest.fixture
def script(call_script, tiny_model, tmp_path, monkeypatch):
    """``script(*flags)`` runs generation in tmp_path, with the tiny model where that is asked for, and must succeed."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: object, models: bool = True, folder: str = "out", status: int = 0):
        encoders = ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
        given = ("--dit", tiny_model.dit, "--vae", tiny_model.vae, *encoders, *SIZE, "--save_path", folder) if models else ()
        ended = call_script("hv_generate_video", *given, *flags)
        assert ended.status == status, ended.stderr
        return ended

    return run


@pytest.fixture
def loras(tiny_model, tmp_path) -> None:
    """a.safetensors and b.safetensors."""
    for seed, name in enumerate("ab"):
        write_lora(tiny_model.dit, tmp_path / f"{name}.safetensors", seed=seed)


def frames(path: Path) -> bytes:
    if path.suffix == ".safetensors":
        return load_file(path)["latent"].numpy().tobytes()
    return read_frames(path).tobytes()


def results(folder: str = "out") -> list[Path]:
    return sorted(path for path in Path(folder).iterdir() if "sheet" not in path.name and not path.name.startswith("xy_20"))


def is_made_again(script, path: Path, *flags: object) -> bool:
    """In a folder of its own."""
    again = Path(f"again_{path.name}")
    script("--repeat", path, "--save_path", again, *flags, models=False)
    (made,) = [other for other in again.iterdir() if other.suffix == path.suffix]
    return frames(made) == frames(path)


@pytest.mark.parametrize("kind", slow_but(["video", "images", "latent", "both", "webp", "gif"], "both"))
@pytest.mark.parametrize("length", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_every_kind_of_file_is_made_again(script, kind, length):
    script("--prompt", "a red ball", "--video_length", length, "--output_type", kind)
    for path in results():
        assert is_made_again(script, path)


def test_a_picture_of_a_folder_stands_for_it_and_the_folder_is_that_of_the_result(script):
    script("--prompt", "a red ball", "--video_length", 1, "--output_type", "images", "--seed", 1)
    (folder,) = results()
    script("--repeat", folder / "00000.png", models=False)
    first, second = results()
    assert first.parent == second.parent and frames(first) == frames(second)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--guidance_scale", 3, "--negative_prompt=--no\n'blue' \"cubes\" 日本\U0001f600", "--guidance_range", 0, 0.5],
        ["--guidance_scale", 3, "--split_uncond"],
        ["--lora_weight", "a.safetensors", "b.safetensors", "--lora_multiplier", 0.7, -0.4],
        ["--lora_weight", "a.safetensors", "--lora_multiplier", 0.3, "--lora_mode", "inject"],
        ["--image_path", "start.png", "--strength", 0.6],
        ["--dit_dtype", "bfloat16", "--fp8", "--flow_shift", 3.5, "--fps", 7],
    ],
    ids=["cfg", "split cfg", "merged", "injected", "start", "precision"],
)
def test_every_setting_comes_back(script, loras, flags):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)).save("start.png")
    script("--prompt=-a red ball", "--video_length", 1, *flags)
    (path,) = results()
    assert is_made_again(script, path)


def test_a_result_of_a_prompt_file_is_made_again_alone(script, loras):
    Path("p.txt").write_text("a red ball --am 0.5 --s 3 --fs 3.5\na blue cube --am 1 --w 32 --n dark --l 2\n", encoding="utf-8")
    script("--from_file", "p.txt", "--lora_weight", "a.safetensors", "--video_length", 1)
    assert len(results()) == 2
    for path in results():
        assert is_made_again(script, path)


def test_a_cell_of_a_comparison_and_the_whole_are_made_again(script, loras):
    script("--prompt", "a red ball", "--xy", "lora=a.safetensors,none", "multiplier=0.5,1", "--video_length", 1)
    assert len(results()) == 3, "without LoRA the multiplier makes no difference"
    for path in results():
        assert is_made_again(script, path)
    (sheet,) = [path for path in Path("out").iterdir() if path.name.startswith("xy_20") and path.suffix == ".png"]
    script("--repeat", sheet, "--save_path", "whole", models=False)
    assert [frames(path) for path in results("whole")] == [frames(path) for path in results()]


def test_latents_that_are_decoded_later_are_made_again_as_what_they_became(script, tiny_model):
    script("--prompt", "a red ball", "--video_length", 5, "--output_type", "latent")
    script("--latent_path", *results(), "--vae", tiny_model.vae, "--save_path", "later", "--output_type", "gif", models=False)
    assert is_made_again(script, *results("later"))


def test_the_command_line_wins(script, loras):
    lora = ("--lora_weight", "a.safetensors")
    script("--prompt", "a red ball", "--video_length", 1, "--seed", 1, "--output_type", "latent", *lora)
    (path,) = results()
    assert not is_made_again(script, path, "--seed", 2)
    script("--prompt", "a red ball", "--video_length", 1, "--seed", 2, "--output_type", "latent", *lora, folder="plain")
    assert frames(*results(f"again_{path.name}")) == frames(*results("plain"))
    Path("other.toml").write_text("infer_steps = 1\n")
    script("--repeat", path, "--config_file", "other.toml", "--save_path", "toml", models=False)
    assert "  infer_steps: 1\n" in script("--show", *results("toml"), models=False).stdout


def test_another_start_takes_the_place_of_the_recorded_one(script):
    Image.new("RGB", (48, 32), "red").save("start.png")
    script("--prompt", "a red ball", "--video_length", 1, "--image_path", "start.png", "--output_type", "both", "--seed", 3)
    latents, _ = sorted(results(), key=lambda path: path.suffix, reverse=True)
    script(
        "--repeat",
        latents,
        "--latent_path",
        latents,
        "--strength",
        0,
        "--output_type",
        "latent",
        "--save_path",
        "same",
        models=False,
    )
    assert frames(*results("same")) == frames(latents)


def test_changed_files_are_named_and_missing_ones_refused(script, loras, tiny_model, caplog):
    script("--prompt", "a red ball", "--video_length", 1, "--lora_weight", "a.safetensors", "--output_type", "latent")
    (path,) = results()
    assert is_made_again(script, path) and "has changed" not in caplog.text
    write_lora(tiny_model.dit, Path("a.safetensors"), seed=9)
    script("--repeat", path, "--save_path", "changed", models=False)
    assert "a.safetensors has changed since it made" in caplog.text and frames(*results("changed")) != frames(path)
    Path("a.safetensors").unlink()
    ended = script("--repeat", path, "--save_path", "missing", models=False, status=2)
    assert "a.safetensors" in ended.stderr and not Path("missing").exists()


def test_other_versions_are_named(script, monkeypatch, caplog):
    script("--prompt", "a red ball", "--video_length", 1, "--output_type", "latent")
    monkeypatch.setattr("torch.__version__", "99.0")
    script("--repeat", *results(), "--save_path", "other", models=False)
    assert "here 99.0" in caplog.text


def test_show_prints_everything_and_a_command_that_works(script, loras, call_script):
    prompt = 'it\'s a "red" ball; --not a flag, 日本語 \U0001f600'
    flags = ("--guidance_scale", 2, "--lora_weight", "a.safetensors", "--lora_multiplier", -0.5, "--seed", 7)
    script("--prompt", prompt, "--video_length", 1, "--output_type", "gif", *flags)
    (path,) = results()
    shown = script("--show", path, models=False).stdout
    assert f"  prompt: {prompt}\n" in shown and "a.safetensors: multiplier -0.5, SHA-256" in shown and "torch" in shown
    words = shlex.split(shown.strip().splitlines()[-1])
    assert words[:2] == ["python", "hv_generate_video.py"]
    script(*words[2:], models=False)
    first, second = results()
    assert frames(first) == frames(second)


def test_the_environment_and_secrets_are_not_recorded(script, monkeypatch):
    script("--prompt", "a red ball", "--video_length", 1, "--output_type", "latent", "--seed", 1)
    (path,) = results()
    shown = script("--show", path, models=False).stdout
    assert "--save_path out" in shown
    for absent in ("--show", "--config_file", "token", "no_metadata", "skip_existing"):
        assert absent not in shown


@pytest.mark.parametrize("flag", ["--show", "--repeat"])
def test_files_that_say_nothing_are_refused_in_a_sentence(script, flag):
    script("--prompt", "a red ball", "--video_length", 1, "--output_type", "images", "--no_metadata")
    (folder,) = results()
    assert "holds no metadata" in script(flag, folder, models=False, status=2).stderr
    Image.new("RGB", (8, 8)).save("plain.webp")
    Path("text.txt").write_text("hello")
    for name in ("plain.webp", "text.txt", "gone.png", "."):
        ended = script(flag, name, models=False, status=2)
        assert ended.stderr.count("\n") == 1 and "Traceback" not in ended.stderr


def test_flags_of_a_file_from_a_stranger_are_checked(script):
    from utils.media.writing import save_picture

    harmful = '{"flags": {"save_merged_model": "x.safetensors", "infer_steps": "many"}, "lora": [], "start": {}, "versions": {}}'
    save_picture(Path("a.png"), np.zeros((8, 8, 3), np.uint8), {"prompt": "a", "settings": harmful})
    assert "a.png: infer_steps = 'many' is refused" in script("--repeat", "a.png", models=False, status=2).stderr
    unknown = '{"flags": {"infer_step": 3}, "lora": [], "start": {}, "versions": {}}'
    save_picture(Path("b.png"), np.zeros((8, 8, 3), np.uint8), {"prompt": "a", "settings": unknown})
    assert "infer_step" in script("--repeat", "b.png", models=False, status=2).stderr
