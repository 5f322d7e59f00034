"""The linear map from latents to colours, on a trained VAE, and the pictures made with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hunyuan_model.sampling.encoding import FrameEncoder
from hunyuan_model.sampling.preview import ColourMap, Preview, fit_colour_map, preview_picture, removed_on_failure
from hunyuan_model.vae.loading import load_vae
from hunyuan_model.vae.memory import VAESettings

TOY_VAE = Path(__file__).resolve().parents[3] / "examples" / "toy" / "vae"
POSITIONS = 16


@pytest.fixture(scope="module")
def encoder() -> FrameEncoder:
    device = torch.device("cpu")
    settings = VAESettings(TOY_VAE, torch.float32)
    return FrameEncoder(load_vae(TOY_VAE, device=device, dtype=torch.float32), settings, device)


@pytest.fixture(scope="module")
def colours(encoder) -> ColourMap:
    return fit_colour_map(encoder)


def means(frames: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) -> of each 8 x 8 pixels."""
    frames_, height, width, _ = frames.shape
    return frames.reshape(frames_, height // 8, 8, width // 8, 8, 3).mean(axis=(2, 4))


def rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.square(a.astype(float) - b).mean()))


def test_plain_colours_come_back(encoder, colours):
    """Twelve that the map was not fitted on, of a whole picture each."""
    generator = np.random.default_rng(1)
    for colour in generator.integers(20, 236, (12, 3), np.uint8):
        frames = np.tile(colour, (1, 64, 64, 1))
        shown = colours.frames(encoder.encode(frames))
        assert shown.shape == (1, 8, 8, 3)
        assert np.abs(shown[0, 2:-2, 2:-2].mean(axis=(0, 1)) - colour).max() < 30


def test_photographs_are_nearly_as_good_as_any_linear_map_shows_them(encoder, colours, real_media):
    found, best = [], []
    for path in real_media.pictures[:12]:
        with Image.open(path) as image:
            frames = np.array(image.convert("RGB").resize((128, 128)))[None]
        latents, wanted = encoder.encode(frames), means(frames)
        found.append(rms(colours.frames(latents), wanted))
        best.append((latents, wanted))
    inputs = torch.cat([latents[0].flatten(1).T for latents, _ in best])
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).numpy()
    wanted = np.concatenate([wanted.reshape(-1, 3) for _, wanted in best])
    fitted_to_them = inputs @ np.linalg.lstsq(inputs, wanted, rcond=None)[0]
    spread = rms(wanted, wanted.mean(axis=0))
    error = np.sqrt(np.square(found).mean())
    print(f"rms {error:.1f} of 255, the best linear map {rms(fitted_to_them, wanted):.1f}, the spread of the pictures {spread:.1f}")
    assert error < 21 and error < 1.6 * rms(fitted_to_them, wanted) and error < spread / 3  # 19.3, 12.5 and 69.7 on the CPU


def test_the_map_is_the_same_in_every_run(encoder, colours):
    torch.manual_seed(7)
    assert torch.equal(fit_colour_map(encoder).weight, colours.weight)


def test_a_strip_shows_up_to_six_frames_from_the_first_to_the_last():
    frames = np.repeat(np.arange(33, dtype=np.uint8), 8 * 12 * 3).reshape(33, 8, 12, 3)
    strip = preview_picture(frames)
    assert strip.shape == (8 * POSITIONS, 6 * 12 * POSITIONS, 3)
    assert [int(part.mean()) for part in np.split(strip, 6, axis=1)] == [0, 6, 13, 19, 26, 32]
    assert preview_picture(frames[:1]).shape == (8 * POSITIONS, 12 * POSITIONS, 3)
    assert preview_picture(np.zeros((2, 90, 160, 3), np.uint8)).shape == (90, 320, 3)


def test_a_preview_is_written_every_n_steps_and_removed(tmp_path):
    latents = torch.zeros(1, 16, 1, 8, 8)
    preview = Preview(ColourMap(torch.cat([torch.zeros(16, 3), torch.tensor([[1.0, 0.5, 0.0]])])), tmp_path / "x_preview.png", 2)
    preview(1, latents)
    assert not preview.path.exists()
    preview(2, latents)
    with Image.open(preview.path) as image:
        assert image.getcolors() == [(192 * 192, (255, 128, 0))]
    assert [path.name for path in tmp_path.iterdir()] == ["x_preview.png"]
    with pytest.raises(KeyboardInterrupt), removed_on_failure(preview):
        raise KeyboardInterrupt
    preview.remove()
    assert not any(tmp_path.iterdir())
