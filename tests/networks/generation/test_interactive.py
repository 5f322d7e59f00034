"""--interactive: settings that stay, networks that stay loaded, and what ends a sample but not the session."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import hunyuan_model
from hunyuan_model.sampling import decoding
from hunyuan_model.sampling.generation import SamplingSettings
from hunyuan_model.vae.memory import VAESettings
from networks.generation import interactive, sampler, starts
from networks.generation.interactive import LineSettings, Session, Stopped, stop_after_step
from networks.generation.requests import Request
from tiny.variants import write_lora
from utils.errors import UserError
from utils.media.writing import save_picture
from utils.safetensors_io import read_header

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


@pytest.fixture
def flags(tiny_model, tmp_path) -> tuple[object, ...]:
    """Of pictures of 32 x 32 in 2 steps, written to tmp_path/out, with a LoRA that is computed beside the weights."""
    write_lora(tiny_model.dit, tmp_path / "lora.safetensors")
    encoders = ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
    lora = ("--lora_weight", tmp_path / "lora.safetensors", "--lora_mode", "inject")
    size = ("--video_size", 32, 32, "--video_length", 1, "--infer_steps", 2)
    return ("--dit", tiny_model.dit, "--vae", tiny_model.vae, *encoders, *lora, *size)


@pytest.fixture
def converse(call_script, flags, tmp_path, monkeypatch):
    """``converse("a line", "another", *flags)``: the lines from a pipe."""

    def run(*lines: str, flags_besides: tuple[object, ...] = ("--output_type", "latent")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return call_script("hv_generate_video", *flags, "--save_path", tmp_path / "out", "--interactive", *flags_besides)

    return run


def written(stdout: str) -> list[torch.Tensor]:
    return [load_file(line)["latent"] for line in stdout.splitlines() if line.endswith(".safetensors")]


def test_each_line_is_a_run_by_flags_and_settings_stay(converse, call_script, flags, tmp_path):
    ended = converse(
        "a red ball --d 7 --am 0.5", "--am 0", "# a note", "", "a blue cube --s 3 --l 2 --n dark", "!reset am l n", "--d 8"
    )
    assert ended.status == 0, ended.stderr
    by_flags = (
        ("a red ball", "--seed", 7, "--lora_multiplier", 0.5),
        ("a red ball", "--seed", 7, "--lora_multiplier", 0),
        *[
            (
                "a blue cube",
                "--seed",
                7,
                "--lora_multiplier",
                0,
                "--infer_steps",
                3,
                "--guidance_scale",
                2,
                "--negative_prompt",
                "dark",
            )
        ],
        ("a blue cube", "--seed", 8, "--infer_steps", 3),
    )
    found = written(ended.stdout)
    assert len(found) == len(by_flags)
    for latent, (prompt, *given) in zip(found, by_flags):
        alone = call_script(
            "hv_generate_video", *flags, "--save_path", tmp_path / "alone", "--output_type", "latent", "--prompt", prompt, *given
        )
        assert torch.equal(latent, written(alone.stdout)[0])


def test_networks_are_loaded_once_and_texts_encoded_once(converse, tmp_path, monkeypatch):
    seen: Counter[str] = Counter()
    for name in ("load_transformer", "load_vae"):
        plain = getattr(hunyuan_model, name)
        monkeypatch.setattr(hunyuan_model, name, lambda *a, n=name, p=plain, **k: seen.update([n]) or p(*a, **k))
    plain_encode = hunyuan_model.encode_prompts
    monkeypatch.setattr(hunyuan_model, "encode_prompts", lambda texts, *a, **k: seen.update(texts) or plain_encode(texts, *a, **k))
    ended = converse("a cat", "a dog", "a cat --l 3", "--d 4 --w 48", flags_besides=("--output_type", "images"))
    assert ended.status == 0, ended.stderr
    assert seen == {"load_transformer": 1, "load_vae": 1, "a cat": 1, "a dog": 1, "": 1}
    assert [path.is_dir() for path in (tmp_path / "out").iterdir()] == [True] * 4
    assert sorted(ended.stdout.splitlines()) == sorted(str(path) for path in (tmp_path / "out").iterdir())


def test_bad_lines_are_messages_and_the_next_line_works(converse):
    lines = ("--w 64", "a cat --width 64", "a cat --w 100", "a cat --am 1,2", "!rest", "!reset q", "a \udcff cat", "a cat --d 1")
    ended = converse(*lines)
    says = (
        "error: line 1 has options but no prompt, and there is none before it",
        "error: line 2: --width is no option of a prompt line. Did you mean --w?",
        "error: line 3: the video size 32 x 100",
        "error: line 4: --am has more values (2) than --lora_weight has files (1)",
        "error: line 5: there is no command !rest. Did you mean '!reset'?",
        "error: !reset: there is no option 'q'",
        "error: line 7 holds half of a surrogate pair",
    )
    assert all(message in ended.stderr for message in says), ended.stderr
    assert ended.status == 1 and len(written(ended.stdout)) == 1 and "Traceback" not in ended.stderr


def test_out_of_memory_is_a_message(converse, monkeypatch):
    plain = sampler.generate_latents

    def generate_latents(transformer, text, settings, **options):
        if settings.video_size == (32, 64):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(transformer, text, settings, **options)

    monkeypatch.setattr(sampler, "generate_latents", generate_latents)
    ended = converse("a cat --w 64", "--w 32 --d 1")
    assert "error: out of memory while sampling 1 x 64x32;" in ended.stderr and len(written(ended.stdout)) == 1


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_the_sample_and_not_the_session(converse, monkeypatch, times):
    """Twice, it interrupts in the middle of a step, and the transformer is loaded anew."""
    loads, plain_load, plain = [], hunyuan_model.load_transformer, sampler.generate_latents

    def generate_latents(transformer, text, settings, on_step, **options):
        def step(number: int) -> None:
            if settings.seed == 1:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            on_step(number)

        return plain(transformer, text, settings, on_step=step, **options)

    monkeypatch.setattr(hunyuan_model, "load_transformer", lambda *a, **k: loads.append(1) or plain_load(*a, **k))
    monkeypatch.setattr(sampler, "generate_latents", generate_latents)
    ended = converse("a cat --d 2", "--d 1", "--d 2")
    before, after = written(ended.stdout)
    assert "stopped" in ended.stderr and torch.equal(before, after) and len(loads) == times


def test_previews_go_and_their_colours_are_fitted_once(converse, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    fitted, plain = [], starts.fit_colour_map
    monkeypatch.setattr(starts, "fit_colour_map", lambda encoder: fitted.append(1) or plain(encoder))
    ended = converse("a cat --d 1", "--d 2", flags_besides=("--output_type", "latent", "--preview_every", 1))
    assert caplog.text.count("preview, until the result is there") == 2 and fitted == [1]
    assert sorted(map(str, (tmp_path / "out").iterdir())) == ended.stdout.split()


def test_a_result_says_how_flags_make_it_again(converse):
    ended = converse("a cat --am 0.5 --d 3", "!reset d", "a dog")
    first, second = (json.loads(read_header(path).metadata["settings"]) for path in ended.stdout.split())
    flags = {"prompt": "a cat", "seed": 3, "lora_multiplier": [0.5], "lora_mode": "inject"}
    assert flags.items() <= first["flags"].items() and "interactive" not in first["flags"]
    assert "random" not in first and second["random"] == ["seed"]


def test_ctrl_c_while_decoding_leaves_the_latents(converse, monkeypatch, tmp_path):
    plain, calls = decoding.decode_latents, []

    def decode_latents(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    monkeypatch.setattr(decoding, "decode_latents", decode_latents)
    converse("a cat --d 1", "--d 2", flags_besides=("--output_type", "images"))
    (latents,) = (tmp_path / "out").glob("*_1_latent.safetensors")
    assert [path.name[-2:] for path in (tmp_path / "out").iterdir() if path != latents] == ["_2"]


def test_what_was_asked_at_the_last_step_is_not_lost():
    with pytest.raises(Stopped), stop_after_step():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_help_and_settings(converse):
    ended = converse("!help", "!settings", "a cat --w 48 --n dark --am 0.5", "!settings", "!quit", "a dog")
    *_, help_end, before, path, after = ended.stdout.splitlines()
    assert "Ctrl-C" in help_end and path.endswith(".safetensors")
    assert before == "(no prompt yet) --w 32 --h 32 --f 1 --s 2 --g 6 --fs 7 --l 1 --am 1 --t 0.75 --step_cache 0"
    assert after == "a cat --w 48 --h 32 --f 1 --s 2 --g 6 --fs 7 --n dark --l 1 --am 0.5 --t 0.75 --step_cache 0"


@pytest.mark.parametrize("flag", ["--prompt", "--from_file"])
def test_prompts_from_elsewhere_are_refused(converse, flag):
    ended = converse(flags_besides=(flag, "x.txt"))
    assert ended.status == 2 and f"--interactive reads prompts one by one; leave {flag} out" in ended.stderr


def test_a_flag_without_effect_is_said(converse, caplog):
    assert converse(flags_besides=("--skip_existing",)).status == 0
    assert "--skip_existing: no effect with --interactive." in caplog.text


def line_settings(seed: int | None = None) -> LineSettings:
    return LineSettings(Request("", SamplingSettings(seed=0, video_size=(32, 32), video_length=1)), seed, [])


def test_nothing_of_a_refused_line_stays():
    settings = line_settings()
    settings.request("a cat --d 3", "here")
    with pytest.raises(UserError, match="not divisible"):
        settings.request("a dog --d 4 --w 100", "here")
    assert (settings.prompt, settings.values) == ("a cat", {"seed": 3})


def test_seeds_of_the_flag_of_a_line_and_new_ones():
    assert {line_settings(5).request("a", "here").sampling.seed for _ in range(3)} == {5}
    settings = line_settings()
    assert len({settings.request("a", "here").sampling.seed for _ in range(4)}) > 1
    assert settings.request("--d 9", "here").sampling.seed == settings.request("b", "here").sampling.seed == 9
    settings.reset(["--d"])
    assert len({settings.request("a", "here").sampling.seed for _ in range(4)}) > 1


def test_a_start_takes_the_place_of_another_and_goes_with_reset():
    settings = line_settings()
    assert settings.request("a --i a.png", "here").image_path == "a.png"
    request = settings.request("--v b.mp4", "here")
    assert (request.image_path, request.video_path) == (None, "b.mp4")
    settings.reset(["v"])
    assert settings.request("a", "here").start is None


@dataclass(frozen=True)
class DecodingSettings:
    """Those of the settings that decoding reads."""

    vae: VAESettings = field(default_factory=lambda: VAESettings("vae", torch.float16))
    decode_on_cpu: bool = False


def test_a_clip_that_the_gpu_cannot_decode_beside_the_transformer_is_decoded_on_the_cpu(monkeypatch):
    asked = []
    session = Session(DecodingSettings(), CPU, dict, list, list)
    session.device = torch.device("cuda")

    def full(latents):
        raise UserError("out of memory while decoding.") from torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(session, "_decode", full)
    monkeypatch.setattr(interactive, "load_decoder", lambda vae, device: asked.append((vae.vae_dtype, device)) or (lambda z: z + 1))
    for _ in range(2):
        assert session._decoded(torch.zeros(1)) == 1
    assert asked == [(torch.float32, CPU)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_ctrl_c_at_a_terminal(flags, tmp_path):
    import fcntl
    import pty
    import termios

    process, terminal = pty.fork()
    if process == 0:
        words = [str(word) for word in (*flags, "--save_path", tmp_path / "out", "--output_type", "latent", "--interactive")]
        os.chdir(ROOT)
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, "hv_generate_video.py", *words])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # a bar of no columns is not shown
    seen = ""

    def wait_for(text: str) -> None:
        nonlocal seen
        while text not in seen:
            assert select.select([terminal], [], [], 120)[0], f"{text!r} does not come: {seen!r}"
            seen += os.read(terminal, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]

    def send(text: str) -> None:
        os.write(terminal, text.encode())

    wait_for("prompt> ")
    send("a cat --s 1000 --d 1\n")
    wait_for("step/s")
    send("\x03")
    wait_for("stopped")
    wait_for("prompt> ")
    send("--s 1\n")
    wait_for("_1_latent.safetensors")
    wait_for("prompt> ")
    send("\x1b[A\x1b[A\n")  # twice up in the history
    wait_for("step/s")
    send("\x03")
    wait_for("prompt> ")
    time.sleep(0.5)  # Python's readline loses a signal that comes before it waits for keys
    send("\x03")  # at the prompt
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_lines_start_from_pictures_and_folders_of_them(converse, call_script, flags, tmp_path):
    for name, shade in (("a", 40), ("b", 200)):
        save_picture(tmp_path / "pictures" / f"{name}.png", np.full((40, 40, 3), shade, np.uint8))
    picture, half = tmp_path / "pictures" / "a.png", ("--prompt", "a cat", "--seed", 1, "--strength", 0.5)
    output = ("--output_type", "latent", "--preview_every", 1)
    lines = (f"a cat --i {picture} --t 0.5 --d 1", f"--i {picture.parent}", f"--v {picture}", "--i none.png", "!settings")
    ended = converse(*lines, flags_besides=output)
    found = written(ended.stdout)
    alone = call_script("hv_generate_video", *flags, *half, *output, "--image_path", picture, "--save_path", tmp_path / "alone")
    assert len(found) == 3 and torch.equal(found[0], written(alone.stdout)[0]) and torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    assert "error: line 3: " in ended.stderr and "give it as --image_path" in ended.stderr
    assert "error: line 4: picture none.png does not exist" in ended.stderr
    assert f"--i {picture.parent}" in ended.stdout  # nothing of a refused line stays
    assert not list((tmp_path / "out").glob("*_preview.png")) and ended.status == 1


def test_a_line_that_needs_the_vae_says_so(call_script, flags, tmp_path, monkeypatch):
    save_picture(tmp_path / "a.png", np.zeros((40, 40, 3), np.uint8))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"a cat --i {tmp_path / 'a.png'}\na dog\n"))
    without = [flag for flag in flags if flag not in (flags[2], flags[3])]
    ended = call_script("hv_generate_video", *without, "--save_path", tmp_path / "out", "--interactive", "--output_type", "latent")
    assert "error: line 1: starting from a picture or clip needs --vae" in ended.stderr and len(written(ended.stdout)) == 1
