"""The tiny model loads as a real one does, and the drawn data set is what its TOML file says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import hunyuan_model
from dataset import load_dataset_config
from dataset.items import list_items, require_captions
from dataset.media.decoding import frame_times, read_image
from tiny.make_media import CLIPS, PICTURES, draw, draw_clip
from tiny.make_model import CLIP_WIDTH, LLAMA_WIDTH, TRANSFORMER, make_model

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


def test_the_same_model_every_time(tiny_model, tmp_path: Path) -> None:
    again = make_model(tmp_path / "again")
    assert again.dit.read_bytes() == tiny_model.dit.read_bytes()
    for one, other in ((again.text_encoder1, tiny_model.text_encoder1), (again.text_encoder2, tiny_model.text_encoder2)):
        for path in sorted(one.iterdir()):
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_the_drawn_data_set_is_complete(tiny_dataset: Path) -> None:
    pictures, clips = load_dataset_config(tiny_dataset).datasets
    items = list_items(pictures), list_items(clips)
    assert (len(items[0]), len(items[1])) == (len(PICTURES), len(CLIPS))
    for group in items:
        require_captions(group)
    assert {item.caption for item in items[0]} == {scene.caption for scene in PICTURES}
    assert {item.stem: len(frame_times(item.path)) for item in items[1]} == {scene.name: frames for scene, frames in CLIPS}


def test_drawings_show_what_their_captions_say(tiny_dataset: Path) -> None:
    picture = read_image(tiny_dataset.parent / "images" / f"{PICTURES[0].name}.png")
    assert picture.shape == (64, 96, 3)
    assert picture[32, 48].tolist() == [255, 0, 0] and picture[0, 0].tolist() == [0, 0, 255]
    first, last = draw(CLIPS[0][0], 0.0), draw(CLIPS[0][0], 1.0)
    centre = [int(np.median(np.nonzero(frame[..., 0] > 200)[1])) for frame in (first, last)]
    assert centre[1] - centre[0] == 48, "the circle moves half the width to the right"
