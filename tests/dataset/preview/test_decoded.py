"""What the cache holds is shown as the VAE decodes it, and what is wrong with it is said."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from dataset.cache.latents import LatentEncoder
from dataset.cache.preparation import Failure, Prepared, prepare
from dataset.config import DatasetConfig, load_dataset_config
from dataset.items import list_items
from dataset.preview.decoded import CacheDecoder
from dataset.preview.facts import Concern
from examples.toy.model_files import require_model
from hunyuan_model.vae.loading import load_vae
from hunyuan_model.vae.memory import VAESettings
from utils.safetensors_io import save_tensors

CPU = torch.device("cpu")


@pytest.fixture
def settings() -> VAESettings:
    return VAESettings(str(require_model().vae), torch.float32)


@pytest.fixture
def datasets(tiny_dataset, settings) -> tuple[DatasetConfig, ...]:
    """A dataset of pictures and one of clips, cached."""
    datasets = load_dataset_config(tiny_dataset).datasets
    encoder = LatentEncoder.load(settings, CPU)
    for dataset in datasets:
        for result in prepare(list_items(dataset), 1):
            assert not isinstance(result, Failure)
            if isinstance(result, Prepared):
                list(encoder.save([result]))
    return datasets


def decode(dataset: DatasetConfig, settings: VAESettings) -> tuple[CacheDecoder, list[Prepared]]:
    decoder = CacheDecoder.load(settings, CPU)
    results = list(decoder.decode(prepare(list_items(dataset), 1)))
    return decoder, [result for result in results if isinstance(result, Prepared) and len(result.pixels)]


def change(path: Path, record: dict[str, str], add: float = 0.0) -> None:
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), **record}
    metadata.pop("checksum")
    save_tensors(path, {name: tensor + add for name, tensor in load_file(path).items()}, metadata)


def test_pixels_are_those_that_the_vae_makes_of_the_cached_tensors(datasets, settings):
    vae = load_vae(settings.vae, device="cpu", dtype=torch.float32)
    for dataset, count in zip(datasets, (6, 4)):
        decoder, results = decode(dataset, settings)
        assert len(results) == count
        assert not any(decoder.notes.values())
        for result in results:
            (latents,) = load_file(result.target.cache_path).values()
            with torch.no_grad():
                expected = ((vae.decode(latents[None])[0] + 1) * 127.5).clamp(0, 255).permute(1, 2, 3, 0).numpy()
            assert result.pixels.shape == (result.target.frames, *result.target.bucket[::-1], 3)
            # the cached values are multiplied by the scaling factor and divided by it again, which may round
            assert np.abs(result.pixels - expected).max() <= 0.502


def test_what_is_wrong_with_a_cache_is_said(datasets, settings):
    pictures, _ = datasets
    paths = {path.name.rpartition("_")[0].rpartition("_")[0]: path for path in pictures.cache_directory.glob("*.safetensors")}
    paths["red_circle"].unlink()
    change(paths["yellow_square"], {}, add=float("nan"))
    change(paths["white_triangle"], {"vae": "of another"})
    paths["orange_circle"].write_bytes(b"no cache")
    save_tensors(paths["green_triangle"], {"latents_1x8x8_float32": torch.zeros(4, 1, 8, 8)}, {})
    Image.new("RGB", (72, 128)).save(pictures.directory / "blue_square.png")
    decoder, results = decode(pictures, settings)
    assert {result.target.item.stem for result in results} == {"white_triangle", "blue_square"}
    notes = {item.stem: notes for item, notes in decoder.notes.items() if notes}
    assert {note.concern for found in notes.values() for note in found} == {Concern.CACHE}
    texts = {stem: " ".join(note.text for note in found) for stem, found in notes.items()}
    assert texts.keys() == {"red_circle", "yellow_square", "white_triangle", "orange_circle", "blue_square", "green_triangle"}
    assert texts["red_circle"] == "This picture has no cache of its latents; run cache_latents.py."
    assert "NaN or infinity" in texts["yellow_square"]
    assert "(another VAE)" in texts["white_triangle"]
    assert str(paths["orange_circle"]) in texts["orange_circle"]
    assert "4 channels" in texts["green_triangle"]
    assert "(source replaced)" in texts["blue_square"]


def test_caches_are_shown_where_the_file_itself_cannot_be_read(datasets, settings):
    pictures = datasets[0]
    (pictures.directory / "blue_square.png").write_bytes(b"damaged")
    decoder, results = decode(pictures, settings)
    assert len(results) == 6
    first = results[0]
    assert first.target.item.stem == "blue_square" and first.pixels.shape == (1, *first.target.bucket[::-1], 3)
    assert not any(decoder.notes.values())


def test_clips_of_one_file_are_named_by_their_frames(datasets, settings):
    clips = datasets[1]
    next(clips.cache_directory.glob("red_circle_moving_00000-009*")).unlink()
    decoder, results = decode(clips, settings)
    assert len(results) == 3
    (note,) = (note for notes in decoder.notes.values() for note in notes)
    assert note.text == "The clip of frames 0 to 8 has no cache of its latents; run cache_latents.py."
    decoder, _ = decode(replace(clips, frame_extraction="uniform", frame_sample=3, target_frames=(1, 5)), settings)
    texts = {note.text.partition(" has ")[0] for notes in decoder.notes.values() for note in notes}
    assert texts == {
        f"Each of the clips of frames {frames}"
        for frames in ("0 to 4, 4 to 8, 6, 8 to 12, 12", "0 to 4, 10 to 14, 12, 20 to 24, 24")
    }


def test_a_clip_that_breaks_off_is_shown_once(datasets, settings):
    item = list_items(datasets[1])[0]
    *clips, _ = prepare([item], 1)
    decoder = CacheDecoder.load(settings, CPU)
    shown = list(decoder.decode([clips[0], Failure(item, "a disk failed.")]))
    assert [type(result) for result in shown] == [Prepared, Failure] and decoder.notes == {item: []}


def test_the_page_of_what_the_network_sees(call_script, datasets, settings, tiny_dataset):
    pictures = datasets[0]
    next(pictures.cache_directory.glob("red_circle_*")).unlink()
    (pictures.directory / "blue_square.png").write_bytes(b"damaged")
    look = ("--dataset_config", tiny_dataset, "--debug_mode", "html", "--preview_latents", "--device", "cpu")
    ended = call_script("cache_latents", *look, "--vae", settings.vae)
    page = Path(ended.stdout.splitlines()[-1])
    assert (page, ended.status) == (pictures.cache_directory / "debug" / "preview_latents.html", 1)
    of_card = {
        re.search(r'<h4 title="[^"]*?(\w+)\.\w+">', card)[1]: card
        for card in page.read_text(encoding="utf-8").split("<article ")[1:]
    }
    assert {name for name, card in of_card.items() if "decoded from the cache" not in card} == {"red_circle"}
    assert {name for name, card in of_card.items() if Concern.CACHE in card} == {"red_circle"}
    assert {name for name, card in of_card.items() if 'alt="the whole of' not in card} == {"blue_square"}

    refused = call_script("cache_latents", *look)
    assert refused.status == 2 and "--vae" in refused.stderr
