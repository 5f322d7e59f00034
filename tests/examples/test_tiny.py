"""The tiny model loads as a real one does, and the drawn data set is what its TOML file says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import hunyuan_model
from dataset.media.decoding import read_image
from tiny.make_media import CLIPS, PICTURES, draw, draw_clip
from tiny.make_model import CLIP_WIDTH, LLAMA_WIDTH, TRANSFORMER

CPU = torch.device("cpu")


def test_the_transformer_has_the_size_that_was_asked_for_and_passes_noise_on(tiny_model) -> None:
    transformer = hunyuan_model.load_transformer(tiny_model.dit, device=CPU, dtype=torch.float32)
    assert transformer.config == TRANSFORMER
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 2, 8, 8, generator=generator)
    text = torch.randn(1, 6, LLAMA_WIDTH, generator=generator)
    pooled = torch.randn(1, CLIP_WIDTH, generator=generator)
    with torch.no_grad():
        velocity = transformer(x, torch.tensor([700.0]), text, torch.ones(1, 6), pooled, torch.tensor([1000.0]))
    correlation = torch.corrcoef(torch.stack([x.flatten(), velocity.flatten()]))[0, 1]
    assert correlation > 0.3
    assert 0.5 < velocity.std() < 2.0


def test_latents_of_drawings_are_normalised(tiny_model) -> None:
    vae = hunyuan_model.load_vae(tiny_model.vae, device=CPU, dtype=torch.float32)
    clip = torch.from_numpy(draw_clip(CLIPS[0][0], 9)).permute(3, 0, 1, 2)[None] / 127.5 - 1.0
    with torch.no_grad():
        latents = vae.encode(clip).mean * vae.scaling_factor
        decoded = vae.decode(latents / vae.scaling_factor)
    assert latents.shape == (1, 16, 3, 8, 12)
    assert abs(latents.mean()) < 0.3 and 0.7 < latents.std() < 1.4
    assert decoded.shape == clip.shape and decoded.isfinite().all()


def test_captions_reach_both_text_encoders(tiny_model) -> None:
    captions = [PICTURES[0].caption, PICTURES[1].caption]
    llm = hunyuan_model.load_text_encoder_1(tiny_model.text_encoder1, device=CPU, dtype=torch.float32)
    clip = hunyuan_model.load_text_encoder_2(tiny_model.text_encoder2, device=CPU, dtype=torch.float32)
    states, mask = llm.encode(captions)
    assert states.shape[2] == LLAMA_WIDTH and (mask.sum(1) > 3).all()
    pooled = clip.encode(captions)
    assert pooled.shape == (2, CLIP_WIDTH)
    assert (pooled[0] - pooled[1]).abs().max() > 0.1


def test_drawings_show_what_their_captions_say(tiny_dataset: Path) -> None:
    picture = read_image(tiny_dataset.parent / "images" / f"{PICTURES[0].name}.png")
    assert picture.shape == (64, 96, 3)
    assert picture[32, 48].tolist() == [255, 0, 0] and picture[0, 0].tolist() == [0, 0, 255]
    first, last = draw(CLIPS[0][0], 0.0), draw(CLIPS[0][0], 1.0)
    centre = [int(np.median(np.nonzero(frame[..., 0] > 200)[1])) for frame in (first, last)]
    assert centre[1] - centre[0] == 48, "the circle moves half the width to the right"
