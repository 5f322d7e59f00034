"""--skip_existing: a batch that is run again makes what is missing, and nothing twice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import av
import numpy as np
import pytest
import torch

from networks.generation import batch
from networks.generation.sheets import sheet
from utils.media.metadata import read_media_metadata
from utils.media.writing import save_picture

LINES = ["a red ball --d 1", "a blue cube --d 2", "a green cone --d 3"]


@pytest.fixture
def generate(call_script, tiny_model, tmp_path, monkeypatch, caplog):
    """``generate(lines, *flags)`` runs a prompt file and gives the prompts that were sampled."""
    caplog.set_level("INFO")
    sampled: list[str] = []
    sample = batch.Sampler.sample

    def watched(self, request, *args, **kwargs):
        sampled.append(request.prompt)
        return sample(self, request, *args, **kwargs)

    monkeypatch.setattr(batch.Sampler, "sample", watched)
    models = ("--dit", tiny_model.dit, "--vae", tiny_model.vae)
    encoders = ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)

    def run(lines: list[str], *flags: object) -> list[str]:
        (tmp_path / "evening.txt").write_text("\n".join(lines), encoding="utf-8")
        sampled.clear()
        size = ("--video_size", 32, 32, "--video_length", 1, "--infer_steps", 1)
        what = ("--from_file", tmp_path / "evening.txt", "--save_path", tmp_path / "out", "--skip_existing")
        ended = call_script("hv_generate_video", *models, *encoders, *size, *what, *flags)
        assert ended.status == 0, ended.stderr
        return list(sampled)

    return run


@pytest.fixture
def names(tmp_path) -> Callable[[], list[str]]:
    """Of the results, without the sheet that shows them."""
    return lambda: sorted(path.name for path in (tmp_path / "out").iterdir() if "_sheet" not in path.name)


def frames(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]


@pytest.mark.parametrize("kind", ["video", "images", "latent", "both", "webp", "gif"])
def test_what_is_there_is_left_out(generate, names, tmp_path, kind, caplog):
    assert len(generate(LINES, "--output_type", kind)) == 3
    first = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in names()}
    assert generate(LINES, "--output_type", kind) == []
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in names()} == first
    assert "3 of 3 are there already" in caplog.text


def test_only_what_is_missing_is_made(generate, names, tmp_path):
    generate(LINES)
    (tmp_path / "out" / "evening_0002_2.mp4").unlink()
    assert generate(LINES) == ["a blue cube"]
    assert names() == [f"evening_000{number}_{number}.mp4" for number in (1, 2, 3)]


def test_latents_that_were_not_decoded_are(generate, names, tmp_path, monkeypatch, caplog):
    generate(LINES)
    whole = {name: frames(tmp_path / "out" / name) for name in names()}
    for name in whole:
        (tmp_path / "out" / name).unlink()
    monkeypatch.setattr(batch.Batch, "_decode_all", lambda self, sampled: None)
    assert len(generate(LINES[:2])) == 2 and all(name.endswith("_latent.safetensors") for name in names())
    monkeypatch.undo()
    generate(LINES)
    assert names() == list(whole)
    assert {name: frames(tmp_path / "out" / name) for name in names()} == whole
    assert "0 of 3 are there already, 2 are sampled and only decoded" in caplog.text


def test_damaged_latents_are_sampled_again(generate, names, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(batch.Batch, "_decode_all", lambda self, sampled: None)
        generate(LINES[:1])
    (latent,) = (tmp_path / "out").iterdir()
    header = latent.read_bytes()
    latent.write_bytes(header[:-64] + torch.full((16,), float("nan")).numpy().tobytes())
    assert generate(LINES[:1]) == ["a red ball"]
    assert "evening_0001_1-2.mp4" in names()


def test_an_edited_line_is_made_beside_the_old_result(generate, names):
    generate(LINES)
    edited = [LINES[0], "a yellow cube --d 2", LINES[2]]
    assert generate(edited) == ["a yellow cube"]
    assert names() == ["evening_0001_1.mp4", "evening_0002_2-2.mp4", "evening_0002_2.mp4", "evening_0003_3.mp4"]
    assert generate(edited) == [] and generate(LINES) == []


def test_a_line_that_is_put_in_shifts_the_others_and_costs_one_result(generate):
    generate(LINES)
    assert generate(["a new one --d 9", *LINES]) == ["a new one"]


def test_equal_lines_are_two_results(generate, names):
    assert len(generate(["a ball --d 1"] * 2)) == 2
    assert generate(["a ball --d 1"] * 3) == ["a ball"]
    assert len(names()) == 3


def test_random_seeds_count_as_the_same(generate, names):
    lines = ["a red ball", "a blue cube"]
    assert len(generate(lines)) == 2
    first = names()
    assert generate(lines) == [] and names() == first
    assert generate([f"{line} --d 5" for line in lines]) == lines


def test_another_precision_is_another_result_and_swapped_blocks_are_not(generate):
    generate(LINES[:1])
    assert generate(LINES[:1], "--blocks_to_swap", 1) == []
    assert generate(LINES[:1], "--dit_dtype", "bfloat16") == ["a red ball"]


def test_without_metadata_the_name_decides(generate, names, tmp_path, caplog):
    flag = "--no_metadata"
    assert len(generate(LINES, flag)) == 3
    assert generate(["other words --d 1", *LINES[1:]], flag) == []
    assert "by name, as there is no metadata: 3 of 3" in caplog.text
    os.rename(tmp_path / "out" / "evening_0001_1.mp4", tmp_path / "out" / "evening_0001_4.mp4")
    assert generate(LINES, flag) == ["a red ball"]
    assert generate(["a red ball", *LINES[1:]], flag) == [], "a random seed"


def test_latents_that_were_asked_for_stay(generate, names, tmp_path):
    generate(LINES[:1], "--output_type", "latent")
    assert generate(LINES[:1]) == []
    assert names() == ["evening_0001_1.mp4", "evening_0001_1_latent.safetensors"]
    settings = read_media_metadata(tmp_path / "out" / "evening_0001_1.mp4", "")["settings"]
    assert '"output_type": "video"' in settings


def test_latents_whose_result_is_there_are_removed(generate, names, tmp_path, monkeypatch):
    removed = Path.unlink
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, **_: None if self.name.endswith("_latent.safetensors") else removed(self))
        generate(LINES[:1])
    assert len(names()) == 2
    assert generate(LINES[:1]) == [] and names() == ["evening_0001_1.mp4"]


def test_previews_that_a_killed_run_left_go(generate, names, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("evening_0001_1", "evening_0002_77", "evening_0002_77-2", "evening_of_may", "morning_0001_1"):
        (tmp_path / "out" / f"{name}_preview.png").write_bytes(b"")
    generate(LINES, "--output_type", "latent", "--preview_every", 1)
    own = [f"evening_000{number}_{number}_latent.safetensors" for number in (1, 2, 3)]
    assert names() == [*own, "evening_of_may_preview.png", "morning_0001_1_preview.png"]


def test_a_start_that_has_changed_is_another(generate, names, tmp_path):
    def write(shade: int) -> None:
        save_picture(tmp_path / "a.png", np.full((40, 40, 3), shade, np.uint8))

    write(10)
    lines = [f"a red ball --d 1 --i {tmp_path / 'a.png'} --t 0.5", f"a red ball --d 1 --i {tmp_path / 'a.png'} --t 1"]
    assert len(generate(lines, "--output_type", "latent")) == 2
    assert generate(lines, "--output_type", "latent") == []
    assert len(generate([lines[0].replace("0.5", "0.25"), lines[1]], "--output_type", "latent")) == 1
    write(200)
    assert len(generate(lines, "--output_type", "latent")) == 2


def test_a_comparison_goes_on_with_the_random_seed_that_it_began_with(call_script, tiny_model, tmp_path, caplog):
    models = ("--dit", tiny_model.dit, "--vae", tiny_model.vae)
    encoders = ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
    size = ("--video_size", 32, 32, "--video_length", 1, "--infer_steps", 1)
    what = ("--prompt", "a ball", "--xy", "steps=1,2", "guidance=1,6", "--save_path", tmp_path, "--skip_existing")
    caplog.set_level("INFO")

    def cells() -> set[str]:
        assert call_script("hv_generate_video", *models, *encoders, *size, *what, "--output_type", "images").status == 0
        return {path.name for path in tmp_path.iterdir() if path.is_dir()}

    first = cells()
    shutil.rmtree(tmp_path / min(first))
    shutil.rmtree(tmp_path / max(first))
    assert cells() == first and len(first) == 4
    assert "2 of 4 are there already" in caplog.text


def test_a_sheet_whose_video_was_not_written_is_made_again(generate, tmp_path, monkeypatch):
    clips = ("--video_length", 5)
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="interrupted"):
        patch.setattr(sheet, "save_video", Mock(side_effect=KeyboardInterrupt))
        generate(LINES[:2], *clips)
    assert generate(LINES[:2], *clips) == []
    assert {"evening_sheet.png", "evening_sheet.mp4", "evening_sheet.html"} < {path.name for path in (tmp_path / "out").iterdir()}
