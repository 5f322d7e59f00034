"""A batch: what its bar shows, what a failure costs, what is in memory, and decoding while the next result is sampled."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hunyuan_model.sampling import decoding
from hunyuan_model.vae.loading import check_vae_file, load_vae
from hunyuan_model.vae.memory import Clip, VAESettings, decoding_bytes
from hunyuan_model.vae.model import AutoencoderKLCausal3D
from networks.generation import background, batch
from utils.errors import UserError
from utils.progress import ProgressBar

LINES = "a ball --d 1\na cat --d 2 --s 4\na dog --d 3 --w 48 --f 5\n"


@pytest.fixture
def generate(bench):
    """``generate(*flags)``: three prompts in two, four and two steps."""
    path = bench.write("p.txt", LINES)

    def run(*flags: object, folder: str = "out"):
        models = ("--dit", bench.model.dit, "--vae", bench.model.vae, *bench.encoders)
        size = ("--video_size", 32, 32, "--video_length", 1, "--infer_steps", 2, "--output_type", "images")
        given = ("--from_file", path, "--save_path", bench.folder / folder)
        return bench._call("hv_generate_video", *models, *size, *given, *flags)

    return run


def frames_in(folder: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in folder.rglob("*.png")}


def results_in(folder: Path) -> list[str]:
    """All but the contact sheet."""
    return sorted(path.name for path in folder.iterdir() if "_sheet." not in path.name)


def equal(first: Path, second: Path) -> bool:
    """The same files with the same pictures, to the bit, and nothing else."""
    one, other = frames_in(first), frames_in(second)
    names = [sorted(path.name for path in folder.iterdir()) for folder in (first, second)]
    return names[0] == names[1] and one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def fail_for(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException, after: int = 1) -> None:
    """Raise ``error`` after some steps of the ``call``-th result, from 1."""
    plain, calls = batch.Sampler.sample, []

    def sample(sampler, request, start=None, on_step=lambda step: None, *rest):
        calls.append(request)

        def advance(step: int) -> None:
            if len(calls) == call and step > after:
                raise error
            on_step(step)

        return plain(sampler, request, start, advance, *rest)

    monkeypatch.setattr(batch.Sampler, "sample", sample)


def watch_bars(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, float]]:
    """Of each bar, by the first word beside it, where it stood and what it led to when it was closed."""
    seen, plain = {}, ProgressBar.close

    def close(bar: ProgressBar) -> None:
        if not bar.disable:
            seen.setdefault(bar.desc.split()[0].rstrip(":"), (bar.n, bar.total))
        plain(bar)

    monkeypatch.setattr(ProgressBar, "close", close)
    return seen


def test_one_bar_is_of_all_steps_and_one_of_all_results(generate, monkeypatch):
    bars = watch_bars(monkeypatch)
    assert generate().status == 0
    assert bars["sampling"] == (8, 8) and bars["decoding"] == (3, 3)


def test_the_bar_ends_also_where_a_result_fails(generate, monkeypatch, caplog):
    bars = watch_bars(monkeypatch)
    fail_for(monkeypatch, 2, UserError("too odd."))
    assert generate().status == 1
    assert bars["sampling"] == (5, 5) and bars["decoding"] == (2, 2)
    assert "p.txt, line 2 was not made: too odd." in caplog.text


def test_steps_that_are_checked_count_twice(generate, monkeypatch):
    bars = watch_bars(monkeypatch)
    assert generate("--infer_steps", 4, "--step_cache", 10, "--step_cache_check", "--output_type", "latent").status == 0
    assert bars["sampling"] == (24, 24)


def test_a_step_cache_of_one_prompt(bench, generate, caplog):
    bench.write("p.txt", "a ball --d 1 --s 6\na ball --d 1 --s 6 --step_cache 1000\n")
    with caplog.at_level(logging.INFO):
        assert generate("--output_type", "latent").status == 0
    assert caplog.text.count("step cache: 3 of 6 steps computed") == 1
    plain, cached = (load_file(path)["latent"] for path in sorted((bench.folder / "out").iterdir()))
    assert not torch.equal(plain, cached)


class TestDecodingOnTheCPU:
    def test_files_are_the_same(self, generate, bench):
        assert generate().status == 0
        ended = generate("--decode_on_cpu", folder="thread")
        assert ended.status == 0, ended.stderr
        assert equal(bench.folder / "out", bench.folder / "thread")
        assert len(results_in(bench.folder / "thread")) == 3

    def test_it_decodes_while_the_next_is_sampled_and_in_float32(self, generate, monkeypatch):
        plain_decode, plain_sample = AutoencoderKLCausal3D.decode, batch.Sampler.sample
        decoded, sampled, seen = threading.Event(), [], []

        def decode(vae, z):
            seen.append((threading.current_thread() is threading.main_thread(), next(vae.parameters()).dtype))
            result = plain_decode(vae, z)
            decoded.set()
            return result

        def sample(*arguments):
            if sampled:
                assert decoded.wait(60), "the first result is decoded before the others are sampled"
            sampled.append(1)
            return plain_sample(*arguments)

        monkeypatch.setattr(AutoencoderKLCausal3D, "decode", decode)
        monkeypatch.setattr(batch.Sampler, "sample", sample)
        assert generate("--decode_on_cpu", "--vae_dtype", "bfloat16").status == 0
        assert seen == [(False, torch.float32)] * 3

    def test_a_result_that_is_not_decoded_costs_one_result(self, generate, bench, monkeypatch):
        plain, calls = AutoencoderKLCausal3D.decode, []

        def decode(vae, z):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("an odd error")
            return plain(vae, z)

        monkeypatch.setattr(AutoencoderKLCausal3D, "decode", decode)
        ended = generate("--decode_on_cpu")
        assert ended.status == 1
        assert results_in(bench.folder / "out") == ["p_0001_1", "p_0002_2_latent.safetensors", "p_0003_3"]

    def test_a_single_result_that_is_not_decoded_is_one_sentence(self, generate, bench, monkeypatch):
        def full(*_arguments, **_options):
            raise OSError(28, "No space left on device")

        bench.write("p.txt", "a ball --d 1\n")
        monkeypatch.setattr(decoding, "save_picture", full)
        ended = generate("--decode_on_cpu")
        (left,) = (bench.folder / "out").glob("*_latent.safetensors")
        assert ended.status == 2 and "No space left" in ended.stderr and f"{left}: --latent_path decodes them" in ended.stderr

    def test_an_interrupt_leaves_latents_and_no_half_result(self, generate, bench, monkeypatch):
        """While the second result is decoded and the third is sampled: the second is finished."""
        plain, begun, go_on, calls = AutoencoderKLCausal3D.decode, threading.Event(), threading.Event(), []

        def decode(vae, z):
            calls.append(1)
            if len(calls) == 2:
                begun.set()
                go_on.wait(60)
            return plain(vae, z)

        shutdown = background.ThreadPoolExecutor.shutdown

        def shut_down(pool, *arguments, **options):
            go_on.set()
            shutdown(pool, *arguments, **options)

        def sample(sampler, request, *rest):
            if request.sampling.seed == 4:  # the third waits for its turn then
                assert begun.wait(60)
                signal.raise_signal(signal.SIGINT)
            return sample_plain(sampler, request, *rest)

        sample_plain = batch.Sampler.sample
        bench.write("p.txt", f"{LINES}a cow --d 4\n")
        monkeypatch.setattr(AutoencoderKLCausal3D, "decode", decode)
        monkeypatch.setattr(background.ThreadPoolExecutor, "shutdown", shut_down)
        monkeypatch.setattr(batch.Sampler, "sample", sample)
        ended = generate("--decode_on_cpu")
        assert ended.status == 130 and "Traceback" not in ended.stderr
        assert results_in(bench.folder / "out") == ["p_0001_1", "p_0002_2", "p_0003_3_latent.safetensors"]

    def test_without_the_memory_it_waits_and_says_so(self, generate, bench, monkeypatch, caplog):
        monkeypatch.setattr(background, "free_host_memory", lambda: 1_000_000)
        assert generate().status == 0
        assert generate("--decode_on_cpu", folder="waits").status == 0
        assert equal(bench.folder / "out", bench.folder / "waits")
        says = "--decode_on_cpu: the VAE and decoding 1 x 5 frame(s) of 48x32 take"
        assert caplog.text.count(says) == 1 and "once everything is sampled" in caplog.text


def test_what_decoding_takes_is_the_vae_and_its_work(tiny_model):
    """The VAE by its file; the rest as the VAE's own tests measure it."""
    config, device = check_vae_file(tiny_model.vae), torch.device("cpu")
    vae = load_vae(tiny_model.vae, device=device, dtype=torch.float32)
    weights = sum(weight.nbytes for weight in vae.parameters())
    clip, settings = Clip(1, 5, 512, 512), VAESettings(str(tiny_model.vae), torch.float32)
    least = decoding_bytes(config, clip, settings, device)
    fixed = decoding_bytes(config, clip, VAESettings(str(tiny_model.vae), torch.float32, vae_chunk_size=32), device)
    assert weights < least < fixed
