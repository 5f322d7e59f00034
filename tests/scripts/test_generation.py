"""hv_generate_video.py: what it writes, that LoRA and seeds change it, what it refuses."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import hunyuan_model
from hunyuan_model.runtime import loading
from networks.lora import create_network
from utils.safetensors_io import read_header

SIZE = (32, 48)


@pytest.fixture
def generate(call_script, tiny_model, tmp_path):
    """``generate(*flags)`` makes 5 frames of 32 x 48 in 3 steps in tmp_path/out; later flags win."""

    def run(*flags: object, folder: str = "out"):
        models = ("--dit", tiny_model.dit, "--vae", tiny_model.vae)
        encoders = ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
        picture = ("--video_size", *SIZE, "--video_length", 5, "--infer_steps", 3, "--seed", 1234, "--prompt", "a red ball")
        return call_script("hv_generate_video", *models, *encoders, *picture, "--save_path", tmp_path / folder, *flags)

    return run


def latent_of(folder: Path) -> torch.Tensor:
    (path,) = folder.glob("*_latent.safetensors")
    return load_file(path)["latent"]


@pytest.fixture
def sampled(generate, tmp_path):
    """``sampled(folder, *flags)`` is the latent that ``generate`` makes."""

    def run(folder: str, *flags: object) -> torch.Tensor:
        ended = generate("--output_type", "latent", *flags, folder=folder)
        assert ended.status == 0, ended.stderr
        return latent_of(tmp_path / folder)

    return run


@pytest.fixture
def lora(tiny_model, tmp_path) -> Path:
    """A LoRA with both factors non-zero."""
    torch.manual_seed(0)
    transformer = hunyuan_model.load_transformer(tiny_model.dit, device="cpu", dtype=torch.float32)
    network = create_network(1.0, 4, 4.0, None, None, transformer)
    for module in network.loras():
        torch.nn.init.normal_(module.lora_up.weight, std=0.05)
    network.save_weights(tmp_path / "lora.safetensors", torch.float32, {"ss_output_name": "lora"})
    return tmp_path / "lora.safetensors"


def test_both_writes_latent_and_video(generate, tmp_path):
    ended = generate("--output_type", "both", "--fps", 12)
    assert ended.status == 0, ended.stderr
    written = sorted((tmp_path / "out").iterdir())
    assert [path.suffix for path in written] == [".mp4", ".safetensors"]
    assert all(str(path) in ended.stdout for path in written)
    assert all("_1234" in path.name for path in written)
    metadata = read_header(written[1]).metadata
    assert metadata["prompt"] == "a red ball" and metadata["seed"] == "1234" and metadata["infer_steps"] == "3"
    assert latent_of(tmp_path / "out").shape == (16, 2, 4, 6)
    with av.open(str(written[0])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 12
        assert "a red ball" in container.metadata["comment"]
    assert len(frames) == 5 and frames[0].shape == (*SIZE, 3)


def test_images_equal_decoding_the_latent_later(generate, call_script, tiny_model, tmp_path):
    assert generate("--output_type", "images").status == 0
    assert generate("--output_type", "latent", folder="latents").status == 0
    (latent,) = (tmp_path / "latents").iterdir()
    flags = ("--vae", tiny_model.vae, "--save_path", tmp_path / "late", "--output_type", "images")
    decoded = call_script("hv_generate_video", "--latent_path", latent, *flags)
    assert decoded.status == 0, decoded.stderr
    (now,) = (tmp_path / "out").iterdir()
    (late,) = (tmp_path / "late").iterdir()
    assert [path.name for path in sorted(now.iterdir())] == [f"{index:05d}.png" for index in range(5)]
    for path in now.iterdir():
        with Image.open(path) as first, Image.open(late / path.name) as second:
            np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
            assert first.text["prompt"] == second.text["prompt"] == "a red ball"


def test_the_seed_decides_the_picture(sampled):
    first = sampled("first")
    assert torch.equal(first, sampled("again"))
    assert not torch.allclose(first, sampled("seed", "--seed", 5), atol=1e-4)


def test_sampling_equals_the_scheduler_of_diffusers(sampled, tiny_model):
    """The same noise, network and conditions through diffusers' flow-matching Euler scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    load = {"device": torch.device("cpu"), "dtype": torch.float32}
    states, mask = hunyuan_model.load_text_encoder_1(tiny_model.text_encoder1, **load).encode(["a red ball"])
    pooled = hunyuan_model.load_text_encoder_2(tiny_model.text_encoder2, **load).encode(["a red ball"])
    transformer = hunyuan_model.load_transformer(tiny_model.dit, **load)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, 4)[:-1])
    generator = torch.Generator().manual_seed(1234)
    latents = torch.cat([torch.randn(1, 16, 1, 4, 6, generator=generator) for _ in range(2)], dim=2)
    with torch.no_grad():
        for t in scheduler.timesteps:
            velocity = transformer(latents, t[None], states, mask, pooled, torch.tensor([6000.0]))
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    torch.testing.assert_close(sampled("out"), latents[0], atol=1e-4, rtol=1e-4)


def test_lora_is_merged_while_loading_and_into_a_file(sampled, call_script, tiny_model, lora, tmp_path):
    plain, with_lora = sampled("plain"), sampled("lora", "--lora_weight", lora)
    assert (with_lora - plain).abs().max() > 1e-2
    assert torch.equal(plain, sampled("zero", "--lora_weight", lora, "--lora_multiplier", 0))
    twice = sampled("twice", "--lora_weight", lora, lora, "--lora_multiplier", 0.5)  # 0.5 and 1.0
    torch.testing.assert_close(twice, sampled("more", "--lora_weight", lora, "--lora_multiplier", 1.5), atol=1e-4, rtol=1e-4)

    merged = tmp_path / "merged" / "dit.safetensors"
    ended = call_script("hv_generate_video", "--dit", tiny_model.dit, "--lora_weight", lora, "--save_merged_model", merged)
    assert ended.status == 0, ended.stderr
    assert load_file(merged).keys() == load_file(tiny_model.dit).keys()
    torch.testing.assert_close(sampled("merged_file", "--dit", merged), with_lora, atol=1e-5, rtol=1e-5)

    other = tmp_path / "other.safetensors"
    assert call_script("convert_lora", "--input", lora, "--output", other, "--target", "other").status == 0
    torch.testing.assert_close(sampled("converted", "--lora_weight", other), with_lora, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_command_of_the_readme(run_script, tiny_model, lora, tmp_path):
    """In a process of its own, with every flag at once."""
    flags = (
        "--fp8 --video_size 32 48 --video_length 5 --infer_steps 2 --output_type both --attn_mode sdpa --split_attn "
        "--vae_chunk_size 32 --vae_spatial_tile_sample_min_size 128 --seed 1234 --lora_multiplier 1.0"
    )
    ended = run_script(
        "hv_generate_video.py",
        *("--dit", tiny_model.dit, "--vae", tiny_model.vae, "--prompt", "a cat walks, realistic style"),
        *("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2),
        *("--save_path", tmp_path / "Ausgabe ü", "--lora_weight", lora, *flags.split()),
    )
    assert ended.returncode == 0, ended.stderr
    assert len(list((tmp_path / "Ausgabe ü").iterdir())) == 2


def test_nan_is_not_written(generate, tiny_model, tmp_path):
    tensors = load_file(tiny_model.dit)
    tensors["final_layer.linear.bias"][0] = float("nan")
    save_file(tensors, tmp_path / "broken.safetensors")
    ended = generate("--dit", tmp_path / "broken.safetensors")
    assert ended.status == 2 and "NaN" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_a_sentence_and_leaves_the_latents(generate, monkeypatch, tmp_path):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.media.writing.av.open", full)
    ended = generate()
    (latent,) = (tmp_path / "out").iterdir()
    assert ended.status == 2 and "No space left" in ended.stderr and f"{latent}: --latent_path decodes them" in ended.stderr


def test_an_odd_error_says_where_the_latents_are(generate, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("hunyuan_model.sampling.decoding.save_video", Mock(side_effect=ValueError("an odd encoder")))
    with pytest.raises(ValueError, match="an odd encoder"):
        generate()
    (latent,) = (tmp_path / "out").iterdir()
    assert f"Its latents are in {latent}: --latent_path decodes them" in caplog.text


@pytest.mark.parametrize("missing", ["--dit", "--vae", "--text_encoder1", "--text_encoder2", "--prompt", "--save_path"])
def test_missing_flags_are_named(call_script, tiny_model, tmp_path, missing):
    flags = {
        "--dit": tiny_model.dit,
        "--vae": tiny_model.vae,
        "--text_encoder1": tiny_model.text_encoder1,
        "--text_encoder2": tiny_model.text_encoder2,
        "--prompt": "x",
        "--save_path": tmp_path / "out",
    }
    del flags[missing]
    ended = call_script("hv_generate_video", *[word for pair in flags.items() for word in pair])
    assert ended.status == 2 and missing in ended.stderr


def test_swapped_models_are_told_apart(generate, tiny_model):
    swapped = generate("--vae", tiny_model.dit)
    assert swapped.status == 2 and "--vae" in swapped.stderr and "a HunyuanVideo transformer" in swapped.stderr
    swapped = generate("--text_encoder1", tiny_model.text_encoder2)
    assert swapped.status == 2 and "--text_encoder1" in swapped.stderr and "CLIP" in swapped.stderr


def test_several_latents_are_decoded_under_names_of_their_own(call_script, tiny_model, tmp_path, caplog):
    (tmp_path / "elsewhere").mkdir()
    paths = [tmp_path / "a_latent.safetensors", tmp_path / "b.safetensors", tmp_path / "elsewhere" / "b_latent.safetensors"]
    for path in paths:
        save_file({"latent": torch.zeros(16, 1, 2, 2)}, path)
    flags = ("--vae", tiny_model.vae, "--save_path", tmp_path / "out", "--lora_weight", "x.safetensors", "--fp8")
    ended = call_script("hv_generate_video", "--latent_path", *paths, *flags)
    assert ended.status == 0, ended.stderr
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["a.mp4", "b-2.mp4", "b.mp4"] and len(ended.stdout.split()) == 3
    assert caplog.text.count("--fp8, --lora_weight: no effect with --latent_path") == 1


def test_out_of_memory_names_the_flags(generate, monkeypatch):
    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("hunyuan_model.sampling.generation.sample_latents", full)
    ended = generate()
    assert ended.status == 2 and "out of memory while sampling 1 x 48x32x5; give --int8 next, which saves about" in ended.stderr


def test_the_header_of_the_transformer_is_read_to_check_and_to_load(generate, monkeypatch):
    opened, plain = [], loading.open_transformer
    monkeypatch.setattr(loading, "open_transformer", lambda path, flag: opened.append(path) or plain(path, flag))
    assert generate("--output_type", "latent", "--video_length", 1, "--infer_steps", 1).status == 0
    assert len(opened) == 2


def test_two_latents_of_one_second_and_seed_are_kept(generate, monkeypatch, tmp_path):
    monkeypatch.setattr("networks.generation.requests.time.strftime", lambda _format: "20260101-000000")
    for _ in range(2):
        assert generate("--output_type", "latent", "--video_length", 1).status == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["20260101-000000_1234-2_latent.safetensors", "20260101-000000_1234_latent.safetensors"]


def test_pictures_are_not_overwritten(call_script, tiny_model, tmp_path):
    for frames in (2, 1):
        save_file({"latent": torch.zeros(16, frames, 2, 2)}, tmp_path / "a.safetensors")
        flags = ("--vae", tiny_model.vae, "--save_path", tmp_path / "out", "--output_type", "images")
        assert call_script("hv_generate_video", "--latent_path", tmp_path / "a.safetensors", *flags).status == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "a-2"]


def test_what_is_decoded_beside_its_latents_has_their_name(call_script, tiny_model, tmp_path):
    save_file({"latent": torch.zeros(16, 1, 2, 2)}, tmp_path / "a_latent.safetensors")
    for name in ("a.mp4", "a-2.mp4"):
        flags = ("--latent_path", tmp_path / "a_latent.safetensors", "--vae", tiny_model.vae, "--save_path", tmp_path)
        assert call_script("hv_generate_video", *flags).stdout.split() == [str(tmp_path / name)]


def test_decoding_alone_writes_no_latents_again(call_script, tiny_model, tmp_path):
    save_file({"latent": torch.zeros(16, 1, 2, 2)}, tmp_path / "a.safetensors")
    flags = ("--vae", tiny_model.vae, "--save_path", tmp_path / "out", "--output_type", "both")
    ended = call_script("hv_generate_video", "--latent_path", tmp_path / "a.safetensors", *flags)
    assert ended.status == 2 and "--output_type both" in ended.stderr and "use video" in ended.stderr
