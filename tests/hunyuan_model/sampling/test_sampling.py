"""Schedule, Euler steps, noise, sizes, and decoding."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hunyuan_model.sampling.decoding import decode_latents, load_decoder
from hunyuan_model.sampling.flow import euler_step, flow_sigmas, initial_noise, latent_size, sample_latents
from hunyuan_model.vae.memory import VAESettings
from hunyuan_model.vae.model import AutoencoderKLCausal3D
from utils.errors import UserError

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
REFERENCE = json.loads((GOLDENS / "scheduler.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("schedule", REFERENCE["schedules"], ids=lambda s: f"{s['steps']} steps, shift {s['shift']}")
def test_schedule_equals_reference_values(schedule):
    sigmas = flow_sigmas(schedule["steps"], schedule["shift"])
    torch.testing.assert_close(sigmas, torch.tensor(schedule["sigmas"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(1000 * sigmas[:-1], torch.tensor(schedule["timesteps"]), atol=1e-3, rtol=0)


def test_euler_trajectory_equals_reference_values():
    tensors = load_file(GOLDENS / "scheduler.safetensors")
    sigmas = flow_sigmas(4, 7.0)
    latents = tensors["x0"]
    for step in range(4):
        latents = euler_step(latents, tensors[f"v{step}"], sigmas[step], sigmas[step + 1])
        torch.testing.assert_close(latents, tensors[f"x{step + 1}"], atol=1e-5, rtol=0)


def test_noise_of_the_first_frames_does_not_depend_on_the_length():
    short = initial_noise((2, 4, 6), torch.Generator().manual_seed(7))
    long = initial_noise((5, 4, 6), torch.Generator().manual_seed(7))
    assert short.shape == (1, 16, 2, 4, 6)
    assert torch.equal(short, long[:, :, :2])
    assert not torch.equal(long[:, :, 0], long[:, :, 1])


@pytest.mark.parametrize(
    "height, width, frames, message",
    [(250, 256, 1, "use 256 x 256"), (256, 0, 1, "divisible by 16"), (64, 64, 4, "use 5"), (64, 64, 0, "4n")],
)
def test_sizes_that_cannot_be_are_refused(height, width, frames, message):
    assert latent_size(544, 960, 129) == (33, 68, 120)
    with pytest.raises(UserError, match=message):
        latent_size(height, width, frames)


class _LinearFlow(torch.nn.Module):
    """A network whose velocity is known: v = noise - data for a constant data point; Euler then lands on it exactly."""

    def __init__(self, data: torch.Tensor, noise: torch.Tensor, guidance: bool) -> None:
        super().__init__()
        self.config = type("Config", (), {"guidance": guidance})
        self.velocity = noise - data
        self.seen = []

    def forward(self, x, t, text_states, text_mask, text_states_2, guidance):
        self.seen.append((float(t[0]), None if guidance is None else float(guidance[0]), x.dtype))
        return self.velocity.to(x.dtype)


@pytest.mark.parametrize("guidance", [True, False])
def test_sampling_integrates_to_the_data(guidance):
    noise, data = initial_noise((1, 2, 2), torch.Generator().manual_seed(0)), torch.full((1, 16, 1, 2, 2), 0.5)
    network, steps = _LinearFlow(data, noise, guidance), []
    latents = sample_latents(
        network,
        noise,
        torch.zeros(1, 4, 8),
        torch.ones(1, 4),
        torch.zeros(1, 8),
        sigmas=flow_sigmas(6, 7.0),
        guidance_scale=6.0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        on_step=steps.append,
    )
    torch.testing.assert_close(latents, data, atol=1e-5, rtol=0)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert network.seen[0] == (1000.0, 6000.0 if guidance else None, torch.float32)


def test_decoding_divides_by_the_scaling_factor_and_gives_bytes():
    class Vae:
        scaling_factor = 0.5

        @staticmethod
        def decode(latents):
            return latents[:, :3]

    latents = torch.tensor([-1.0, 0.0, 0.5]).view(1, 3, 1, 1, 1) * torch.ones(1, 3, 1, 2, 2)
    pictures = decode_latents(Vae(), latents, device=torch.device("cpu"), dtype=torch.float32)
    assert pictures.shape == (1, 1, 2, 2, 3) and pictures.dtype == torch.uint8
    assert pictures[0, 0, 0, 0].tolist() == [0, 128, 255]


def test_running_out_of_memory_while_decoding_names_the_next_flag(monkeypatch):
    def full(vae, z):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(AutoencoderKLCausal3D, "decode", full)
    settings = VAESettings(str(GOLDENS / "vae.safetensors"), torch.float32, vae_chunk_size=8)
    with pytest.raises(UserError, match=r"while decoding.*; use --vae_spatial_tile_sample_min_size 128"):
        load_decoder(settings, torch.device("cpu"))(torch.zeros(1, 16, 1, 2, 2))
