"""Fewer results than processes: they compute each video together, the main one writes, and the result is that of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import POOLED_WIDTH, ROOT, TEXT_WIDTH
from lora_samples import sd_scripts_lora
from PIL import Image
from safetensors.torch import load_file, save_file
from several_processes import in_each, join_threads
from small_transformer import CPU

import hunyuan_model
import hv_generate_video
from hunyuan_model.runtime import loading
from hunyuan_model.runtime.loading import load_transformer
from hunyuan_model.text.conditions import TextConditions
from networks.generation import sampler
from networks.generation.requests import Request
from utils.errors import UserError
from utils.media.reading import read_frames

SECONDS = 300
TOLERANCE = 1e-5  # of the largest latent


@pytest.fixture
def flags(bench) -> list[object]:
    models = ("--dit", bench.model.dit, "--vae", bench.model.vae, *bench.encoders, "--device", "cpu")
    return [*models, "--video_size", 48, 32, "--video_length", 5, "--infer_steps", 4, "--output_type", "both"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torch's launcher needs a server that torch lacks on Windows")
def test_two_processes_make_the_video_of_one(call_script, flags, bench, tmp_path: Path) -> None:
    """18 tokens of a picture's and a prompt's video, guided, with a LoRA beside swapped int8 weights, and previews."""
    lora, start = tmp_path / "lora.safetensors", tmp_path / "start.png"
    save_file(sd_scripts_lora(load_transformer(bench.model.dit, device=CPU, dtype=torch.float32)), lora)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8)).save(start)
    flags += ["--prompt", "a ball", "--seed", 3, "--guidance_scale", 4, "--int8", "--lora_weight", lora, "--lora_mode", "inject"]
    flags += ["--image_path", start, "--infer_steps", 9, "--step_cache", 0.5, "--preview_every", 1, "--blocks_to_swap", 2]
    assert call_script("hv_generate_video", *flags, "--save_path", tmp_path / "one").status == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "hv_generate_video.py")
    command = [sys.executable, *map(str, (*launcher, *flags, "--save_path", tmp_path / "two"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("2 processes compute each video together") == 1 and ended.stderr.count("start.png") == 1
    assert "shared by 2 processes" in ended.stderr or not hasattr(os, "memfd_create")
    (expected, frames), (found, frames_found) = (results(tmp_path / folder) for folder in ("one", "two"))
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    off = np.abs(frames_found.astype(int) - frames).max()
    print(f"latents off by {error:.1e} of the largest, frames by {off} of 255")
    assert error <= TOLERANCE and off <= 1
    assert len(list((tmp_path / "two").iterdir())) == 2 == len(ended.stdout.splitlines())


def results(folder: Path) -> tuple[torch.Tensor, np.ndarray]:
    (latents,), (video,) = folder.glob("*_latent.safetensors"), folder.glob("*.mp4")
    return load_file(latents)["latent"], read_frames(video)


class TestInThreads:
    """Threads for processes, each of which computes whole videos."""

    @pytest.fixture
    def generate(self, flags, tmp_path, monkeypatch):
        """``generate(count, *more)``: how each of ``count`` processes ends."""
        join_threads(monkeypatch, hv_generate_video)
        monkeypatch.setattr(loading, "enable_sequence_parallel", lambda transformer, processes: None)
        monkeypatch.setattr(sampler, "agreed", lambda decision, device: decision)
        text = TextConditions(torch.zeros(1, 8, TEXT_WIDTH), torch.ones(1, 8), torch.zeros(1, POOLED_WIDTH))
        monkeypatch.setattr(hunyuan_model, "encode_prompts", lambda texts, *_: [text] * len(texts))
        monkeypatch.setattr(hunyuan_model, "check_text_encoder_files", lambda *_: None)  # transformers' is for one thread

        def run(count: int, *more: object) -> list[object]:
            words = ("hv_generate_video.py", *flags, "--save_path", tmp_path / "out", *more)
            monkeypatch.setattr(sys, "argv", [str(word) for word in words])
            return in_each(count, lambda ranks: hv_generate_video.main())

        return run

    @pytest.fixture
    def computed(self, monkeypatch) -> list[Request]:
        """What all processes compute."""
        requests, plain = [], sampler.Sampler.latents_of

        def latents_of(self, request, *given):
            requests.append(request)
            return plain(self, request, *given)

        monkeypatch.setattr(sampler.Sampler, "latents_of", latents_of)
        return requests

    def test_all_compute_everything_and_one_writes(self, generate, computed, tmp_path) -> None:
        (tmp_path / "p.txt").write_text("a ball --d 1\na cat --d 2 --s 3\n", encoding="utf-8")
        given = ("--from_file", tmp_path / "p.txt")
        assert generate(4, *given) == [0] * 4
        assert sorted(request.prompt for request in computed) == ["a ball"] * 4 + ["a cat"] * 4
        assert len(list((tmp_path / "out").iterdir())) == 7, (
            "two videos, their latents, and a sheet as a picture, a video and a page"
        )
        computed.clear()
        assert generate(4, *given, "--skip_existing") == [0] * 4 and not computed

    def test_the_main_process_chooses_the_seed(self, generate, computed) -> None:
        assert generate(2, "--prompt", "a ball") == [0, 0]
        one, other = computed
        assert one.sampling.seed == other.sampling.seed

    def test_what_fails_in_the_main_process_ends_all(self, generate, monkeypatch, tmp_path) -> None:
        """The others may be waiting in the middle of a video."""
        (tmp_path / "p.txt").write_text("a ball --d 1\na cat --d 2\n", encoding="utf-8")

        def save(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("hunyuan_model.sampling.decoding.OutputSettings.save_latents", save)
        main, *others = generate(4, "--from_file", tmp_path / "p.txt")
        assert isinstance(main, OSError) and all(isinstance(other, SystemExit) for other in others)

    def test_what_cannot_be_is_refused_before_anything_is_loaded(self, generate, tmp_path) -> None:
        for ended in generate(3, "--prompt", "a ball"):
            assert isinstance(ended, UserError) and "3 processes cannot compute one video together" in str(ended)
        for ended in generate(2, "--interactive"):
            assert isinstance(ended, UserError) and "runs in one process" in str(ended)
        assert not (tmp_path / "out").exists()
