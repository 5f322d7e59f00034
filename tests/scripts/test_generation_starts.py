"""hv_generate_video.py from pictures, clips and latents, and its previews."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bench import refused
from PIL import Image
from safetensors.torch import load_file, save_file

import hunyuan_model
from dataset.cache.preparation import prepare_item
from dataset.config import DatasetConfig
from dataset.items import Item
from hunyuan_model.sampling import generation
from hunyuan_model.sampling.decoding import decode_latents
from hunyuan_model.sampling.encoding import FrameEncoder
from hunyuan_model.sampling.preview import Preview
from hunyuan_model.vae.loading import load_vae
from utils.errors import UserError
from utils.media.writing import save_picture, save_video

SIZE = (32, 48)
FLOAT32 = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture
def generate(call_script, tiny_model, tmp_path):
    """``generate(*flags, folder="out")`` makes latents of 5 frames of 32 x 48 in 4 steps; later flags win."""
    encoders = ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
    models = ("--dit", tiny_model.dit, "--vae", tiny_model.vae, *encoders)
    size = ("--video_size", *SIZE, "--video_length", 5, "--infer_steps", 4, "--seed", 1234)

    def run(*flags: object, folder: str = "out"):
        target = ("--save_path", tmp_path / folder, "--output_type", "latent", "--prompt", "a red ball")
        return call_script("hv_generate_video", *models, *size, *target, *flags)

    return run


@pytest.fixture
def latent(generate, tmp_path):
    """``latent(*flags)`` is what ``generate`` makes."""
    count = iter(range(100))

    def run(*flags: object) -> torch.Tensor:
        folder = f"latent{next(count)}"
        ended = generate(*flags, folder=folder)
        assert ended.status == 0, ended.stderr
        (path,) = (tmp_path / folder).iterdir()
        return load_file(path)["latent"]

    return run


def test_a_start_that_fails_costs_one_result(generate, tmp_path, monkeypatch, caplog):
    for shade in (0, 200):
        save_picture(tmp_path / f"{shade}.png", np.full((32, 48, 3), shade, np.uint8))
    encode = FrameEncoder.encode

    def failing(self, frames):
        if frames.max() > 100:
            raise UserError("the GPU is full.")
        return encode(self, frames)

    monkeypatch.setattr(FrameEncoder, "encode", failing)
    ended = generate("--image_path", tmp_path)
    assert ended.status == 1 and "200.png was not made: the GPU is full." in caplog.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0_1234_latent.safetensors"]
    refused(generate("--image_path", tmp_path / "200.png"), "the GPU is full")


@pytest.fixture
def clip(tmp_path) -> Path:
    save_video(tmp_path / "clip.mp4", np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8), 24)
    return tmp_path / "clip.mp4"


def encoded(tiny_model, path: Path, kind: str) -> torch.Tensor:
    """Latents (1, 16, F, H, W) of the pixels that caching encodes: the posterior's mean."""
    frames = (5,) if kind == "video" else (1,)
    dataset = DatasetConfig(0, kind, path.parent, None, path.parent, SIZE[::-1], target_frames=frames)
    pixels = next(iter(prepare_item(Item(dataset, path, "", path.stem)))).pixels
    vae = load_vae(tiny_model.vae, **FLOAT32)
    x = torch.from_numpy(pixels).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        return vae.encode(x).mean * vae.scaling_factor


def test_strength_0_returns_the_start_and_1_ignores_it(generate, latent, tiny_model, clip, tmp_path):
    start = encoded(tiny_model, clip, "video")
    assert torch.equal(latent("--video_path", clip, "--strength", 0), start[0])
    assert torch.equal(latent("--video_path", clip, "--strength", 1), latent())
    assert generate("--video_path", clip, "--strength", 0, "--output_type", "images", folder="images").status == 0
    (folder,) = (tmp_path / "images").iterdir()
    frames = decode_latents(load_vae(tiny_model.vae, **FLOAT32), start, **FLOAT32)[0]
    for path, frame in zip(sorted(folder.iterdir()), frames, strict=True):
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(image), frame.numpy())


def test_a_strength_between_equals_the_image_to_image_of_diffusers(latent, tiny_model, clip):
    """Their scheduler noises the start and takes the last steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    states, mask = hunyuan_model.load_text_encoder_1(tiny_model.text_encoder1, **FLOAT32).encode(["a red ball"])
    pooled = hunyuan_model.load_text_encoder_2(tiny_model.text_encoder2, **FLOAT32).encode(["a red ball"])
    transformer = hunyuan_model.load_transformer(tiny_model.dit, **FLOAT32)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, 5)[:-1])
    timesteps = scheduler.timesteps[2:]  # half of the four
    scheduler.set_begin_index(2)
    generator = torch.Generator().manual_seed(1234)
    noise = torch.cat([torch.randn(1, 16, 1, 4, 6, generator=generator) for _ in range(2)], dim=2)
    latents = scheduler.scale_noise(encoded(tiny_model, clip, "video"), timesteps[:1], noise)
    with torch.no_grad():
        for t in timesteps:
            velocity = transformer(latents, t[None], states, mask, pooled, torch.tensor([6000.0]))
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    torch.testing.assert_close(latent("--video_path", clip, "--strength", 0.5), latents[0], atol=1e-4, rtol=1e-4)


def test_a_picture_stands_still_and_a_folder_gives_one_result_each(generate, latent, tiny_model, tmp_path, real_media):
    still = ("--strength", 0, "--image_path")
    picture = encoded(tiny_model, real_media.pictures[0], "image")
    assert torch.equal(latent(*still, real_media.pictures[0], "--video_length", 1), picture[0])
    assert latent(*still, real_media.pictures[0]).shape == (16, 2, 4, 6)
    for name, path in zip("ab", real_media.pictures[1:]):
        (tmp_path / f"pictures/{name}.png").parent.mkdir(exist_ok=True)
        (tmp_path / f"pictures/{name}.png").write_bytes(path.read_bytes())
    assert generate(*still, tmp_path / "pictures", "--video_length", 1).status == 0
    for name in "ab":
        found = load_file(tmp_path / "out" / f"{name}_1234_latent.safetensors")["latent"]
        assert torch.equal(found, encoded(tiny_model, tmp_path / "pictures" / f"{name}.png", "image")[0])


def test_frames_written_as_images_are_a_clip(generate, latent, tiny_model, tmp_path, clip):
    assert generate("--video_path", clip, "--output_type", "images", folder="images").status == 0
    (frames,) = (tmp_path / "images").iterdir()
    pictures = [np.asarray(Image.open(path)) for path in sorted(frames.iterdir())]
    vae = load_vae(tiny_model.vae, **FLOAT32)
    x = torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        start = vae.encode(x).mean * vae.scaling_factor
    assert torch.equal(latent("--video_path", frames, "--strength", 0), start[0])


def test_latents_are_a_start_without_the_vae(latent, tiny_model, tmp_path):
    save_file({"latent": torch.randn(16, 2, 4, 6, generator=torch.Generator().manual_seed(0))}, tmp_path / "a_latent.safetensors")
    stored = load_file(tmp_path / "a_latent.safetensors")["latent"]
    assert torch.equal(latent("--latent_path", tmp_path / "a_latent.safetensors", "--strength", 0), stored)
    changed = latent("--latent_path", tmp_path / "a_latent.safetensors", "--strength", 0.5)
    assert not torch.allclose(changed, stored, atol=0.1) and not torch.allclose(changed, latent(), atol=0.1)


def test_prompts_of_a_file_share_starts_that_are_encoded_once(call_script, tiny_model, clip, tmp_path, monkeypatch):
    loaded, encoded_clips = [], []
    load_transformer, encode = hunyuan_model.load_transformer, hunyuan_model.vae.model.AutoencoderKLCausal3D.encode

    def note_load(*args: object, **options: object):
        loaded.append("transformer")
        return load_transformer(*args, **options)

    def note_encode(vae: torch.nn.Module, x: torch.Tensor):
        encoded_clips.append(tuple(x.shape))
        assert not loaded, "the VAE encodes before the transformer is loaded"
        return encode(vae, x)

    monkeypatch.setattr(hunyuan_model, "load_transformer", note_load)
    monkeypatch.setattr(hunyuan_model.vae.model.AutoencoderKLCausal3D, "encode", note_encode)
    save_picture(tmp_path / "a.png", np.zeros((40, 40, 3), np.uint8))
    lines = f"a red ball --v {clip} --t 0\na blue cube --v {clip} --t 0.5\na dog --i {tmp_path / 'a.png'} --f 1\na cow\n"
    (tmp_path / "p.txt").write_text(lines, encoding="utf-8")
    ended = call_script(
        "hv_generate_video",
        *("--dit", tiny_model.dit, "--vae", tiny_model.vae, "--output_type", "latent", "--save_path", tmp_path / "out"),
        *("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2),
        *("--video_size", *SIZE, "--video_length", 5, "--infer_steps", 2, "--from_file", tmp_path / "p.txt", "--seed", 3),
    )
    assert ended.status == 0, ended.stderr
    assert encoded_clips == [(1, 3, 5, *SIZE), (1, 3, 1, *SIZE)]
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_starts_that_cannot_be_are_refused_before_loading(generate, call_script, tiny_model, clip, tmp_path, monkeypatch):
    def never(*_args: object, **_options: object):
        raise AssertionError("loaded")

    monkeypatch.setattr(hunyuan_model, "encode_prompts", never)
    (tmp_path / "text.png").write_text("a red ball")
    save_file({"latent": torch.zeros(16, 1, 4, 6)}, tmp_path / "one_latent.safetensors")
    refused(generate("--video_path", clip, "--video_length", 13), "--video_path", "has 9 frames", "--video_length 9")
    refused(generate("--video_path", "none.mp4"), "--video_path: video none.mp4 does not exist")
    refused(generate("--image_path", tmp_path / "text.png"), "--image_path: picture", "cannot be decoded")
    refused(generate("--image_path", clip), "give it as --video_path")
    refused(generate("--video_path", clip, "--image_path", clip), "--image_path and --video_path are both")
    refused(generate("--latent_path", tmp_path / "one_latent.safetensors"), "1 frame(s) of 32 x 48", "5 of 32 x 48 are asked for")
    refused(generate("--video_path", clip, "--strength", 1.5), "--strength must be a number from 0")
    (tmp_path / "p.txt").write_text("a cat\na dog --i none.png\n", encoding="utf-8")
    without_vae = ("--dit", tiny_model.dit, "--save_path", tmp_path / "out", "--output_type", "latent", "--video_length", 1)
    models = (*without_vae, "--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
    by_file = call_script("hv_generate_video", *models, "--from_file", tmp_path / "p.txt")
    refused(by_file, "p.txt, line 2: picture none.png does not exist")
    needs = call_script("hv_generate_video", *models, "--prompt", "x", "--video_path", clip)
    refused(needs, "starting from a picture or clip needs --vae")
    refused(call_script("hv_generate_video", *models, "--prompt", "x", "--preview_every", 1), "--preview_every needs --vae")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["latent", "images"])
def test_previews_show_what_comes_and_go_when_it_is_there(generate, latent, monkeypatch, tmp_path, output):
    written = []
    write = Preview.__call__

    def note(preview: Preview, step: int, latents: torch.Tensor) -> None:
        write(preview, step, latents)
        if preview.path.exists():
            with Image.open(preview.path) as image:
                written.append((step, preview.path.name, image.size))

    monkeypatch.setattr(Preview, "__call__", note)
    monkeypatch.setattr("networks.generation.requests.time.strftime", lambda _format: "20260101-000000")
    assert generate("--preview_every", 2, "--output_type", output).status == 0
    assert written == [(step, "20260101-000000_1234_preview.png", (2 * 192, 128)) for step in (2, 3, 4)]
    (result,) = (tmp_path / "out").iterdir()
    assert result.name.startswith("20260101-000000_1234")
    if output == "latent":
        assert torch.equal(load_file(result)["latent"], latent())


def test_an_interrupted_sample_leaves_no_preview(generate, monkeypatch, tmp_path):
    step = generation.sample_latents

    def interrupted(*args: object, on_step, **options: object):
        def stop(done: int) -> None:
            assert list((tmp_path / "out").glob("*_preview.png"))
            raise KeyboardInterrupt

        return step(*args, on_step=stop, **options)

    monkeypatch.setattr(generation, "sample_latents", interrupted)
    assert generate("--preview_every", 1).status == 130
    assert not any((tmp_path / "out").iterdir())
