"""Cache files: names and contents that other tools write and read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dataset.cache.files import (
    CHECKSUM,
    NonFiniteError,
    bucket_of,
    read_latent_header,
    read_latents,
    read_text,
    read_text_header,
    save_latents,
    save_text,
)
from dataset.cache.names import latent_cache_path, list_caches, text_cache_path
from dataset.config import DatasetConfig
from dataset.items import Item
from dataset.media.frames import cut_windows
from utils.errors import UserError
from utils.safetensors_io import read_header

GOLDEN = json.loads((Path(__file__).resolve().parents[2] / "goldens" / "frames.json").read_text(encoding="utf-8"))
STEMS = (".hidden", "plain", "my_clip v1", "pic one.v2", "a_00000-025_0960x0544", "x_hv", "猫 と_犬", "[a]")


def dataset_in(folder: Path, kind: str = "image") -> DatasetConfig:
    return DatasetConfig(0, kind, folder, None, folder)


def item_of(name: str, folder: Path = Path("cache"), kind: str = "image") -> Item:
    return Item(dataset_in(folder, kind), Path(name), "a caption", Path(name).stem)


@pytest.mark.parametrize("case", GOLDEN["image_file_names"], ids=lambda case: case["file"])
def test_image_names_match_reference(case):
    item = item_of(case["file"])
    assert latent_cache_path(item, tuple(case["image_size"])).name == case["latent_cache_file"]
    assert text_cache_path(item).name == case["text_cache_file"]


@pytest.mark.parametrize("case", GOLDEN["file_names"], ids=lambda case: f"{case['dataset_resolution']}-{case['mode']}")
def test_video_names_match_reference_but_for_the_size(case):
    """The reference puts the bucket's size into the name, given here as the size of the source."""
    item = item_of(GOLDEN["video_name"], kind="video")
    windows = cut_windows(case["frames"], case["target_frames"], case["mode"], case["frame_stride"], case["frame_sample"])
    size = tuple(case["size_in_file_name"][0])
    assert sorted(latent_cache_path(item, size, window).name for window in windows) == case["latent_cache_files"]
    assert text_cache_path(item).name == case["text_cache_file"]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_every_stem_comes_back_from_the_names(tmp_path, kind):
    window = (1234567, 1025) if kind == "video" else None
    for stem in STEMS:
        item = item_of(f"{stem}.ext", tmp_path, kind)
        latent_cache_path(item, (12345, 64), window).touch()
        text_cache_path(item).touch()
    (tmp_path / ".half.tmp.safetensors").touch()
    (tmp_path / "lora.safetensors").touch()
    listing = list_caches(dataset_in(tmp_path, kind))
    assert set(listing.latents) == {(stem, window) for stem in STEMS}
    assert set(listing.texts) == set(STEMS)


def test_unfinished_files_and_doubles_of_macos_are_no_caches(tmp_path):
    item = item_of("a.png", tmp_path)
    path = latent_cache_path(item, (64, 64))
    path.touch()
    path.with_name(f"._{path.name}").touch()
    (tmp_path / ".01234567.tmp_0064x0064_hv.safetensors").touch()  # the cache of a source called .01234567.tmp.png
    (tmp_path / ".01234567.tmp.safetensors").touch()
    listing = list_caches(dataset_in(tmp_path))
    assert set(listing.latents) == {("a", None), (".01234567.tmp", None)}


def without_checksum(metadata: dict[str, str]) -> dict[str, str]:
    assert len(metadata[CHECKSUM]) == 22
    return {key: value for key, value in metadata.items() if key != CHECKSUM}


def test_flipped_and_lost_bytes_are_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    texts = torch.randn(256, 64).half(), torch.ones(256, dtype=torch.int64), torch.randn(768).half(), "a caption"
    for save, read in (
        (lambda: save_latents(path, torch.randn(16, 7, 16, 16).half(), (128, 128), 25), read_latents),
        (lambda: save_text(path, *texts), read_text),
    ):
        save()
        whole = path.read_bytes()
        read(path)
        for place, value in ((-1, 1), (len(whole) // 2, 1), (-5000, None)):
            damaged = bytearray(whole)
            if value is None:
                damaged[place : place + 4096] = bytes(4096)
            else:
                damaged[place] ^= value
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"a.safetensors is damaged: .* Delete it and run cache_"):
                read(path)


def test_layout_of_latents_matches_reference(tmp_path):
    expected = GOLDEN["cache_file_layout"]["latent"]
    path = tmp_path / "a.safetensors"
    latents = torch.randn(16, 7, 68, 120).half()
    save_latents(path, latents, (960, 544), 25)
    header = read_header(path)
    assert without_checksum(header.metadata) == expected["metadata"]
    assert {name: list(shape) for name, shape in header.shapes.items()} == {
        name: entry["shape"] for name, entry in expected["tensors"].items()
    }
    assert torch.equal(read_latents(path), latents)
    assert read_latent_header(path)[0] == (16, 7, 68, 120)
    assert bucket_of((16, 7, 68, 120)) == (960, 544, 25)


def test_layout_of_text_matches_reference(tmp_path):
    expected = GOLDEN["cache_file_layout"]["text"]
    path = tmp_path / "a.safetensors"
    save_text(path, torch.randn(256, 4096).half(), torch.ones(256, dtype=torch.int64), torch.randn(768).half(), "a caption")
    stored = load_file(path)
    assert without_checksum(read_header(path).metadata) == expected["metadata"]
    # the reference also stores a mask of encoder 2 that nothing reads
    for name in set(expected["tensors"]) - {"clipL_mask"}:
        assert list(stored[name].shape) == expected["tensors"][name]["shape"]
        assert str(stored[name].dtype) == expected["tensors"][name]["dtype"]
    sizes, metadata = read_text_header(path)
    assert sizes == (4096, 768) and without_checksum(metadata) == expected["metadata"]


def test_text_of_other_tools_is_read(tmp_path):
    tensors = {
        "llm_bfloat16": torch.randn(8, 6).bfloat16(),
        "llm_mask": torch.tensor([1, 1, 1, 0, 0, 0, 0, 0], dtype=torch.bool),
        "clipL_float16": torch.randn(5).half(),
        "clipL_mask": torch.ones(77, dtype=torch.int64),
    }
    tensors["llm_bfloat16"][3:] = float("nan")  # padding means nothing, and may be anything
    save_file(tensors, tmp_path / "a.safetensors")
    text = read_text(tmp_path / "a.safetensors")
    assert torch.equal(text.llm[:3], tensors["llm_bfloat16"][:3])
    assert text.llm_mask.tolist() == [1, 1, 1, 0, 0, 0, 0, 0] and text.llm_mask.dtype == torch.int64
    assert torch.equal(text.clip, tensors["clipL_float16"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_neither_saved_nor_read(tmp_path, value):
    path = tmp_path / "bad.safetensors"
    latents = torch.zeros(16, 1, 2, 2)
    latents[3, 0, 1, 1] = value
    states, mask, pooled = torch.zeros(4, 6), torch.ones(4, dtype=torch.int64), torch.zeros(5)
    with pytest.raises(NonFiniteError, match=r"bad\.safetensors hold NaN or infinity"):
        save_latents(path, latents, (16, 16))
    with pytest.raises(NonFiniteError, match="text_encoder_dtype"):
        save_text(path, states.fill_(value), mask, pooled, "x")
    assert not path.exists()
    save_file({"latents_1x2x2_float32": latents}, path)
    with pytest.raises(UserError, match=r"bad\.safetensors holds NaN or infinity"):
        read_latents(path)
    save_file({"llm_float32": states, "llm_mask": mask, "clipL_float32": pooled}, path)
    with pytest.raises(UserError, match=r"bad\.safetensors holds NaN or infinity"):
        read_text(path)


@pytest.mark.parametrize(
    ("tensors", "metadata", "sentence"),
    [
        ({"latents_1x2x2_float32": torch.zeros(16, 1, 2, 2)}, {"architecture": "wan"}, "is a cache for 'wan'"),
        ({"something": torch.zeros(1)}, None, "holds 0 tensors called latents_"),
        ({"latents_a": torch.zeros(1), "latents_b": torch.zeros(1)}, None, "holds 2 tensors called latents_"),
        ({"latents_2x2_float32": torch.zeros(16, 2, 2)}, None, r"shape \(16, 2, 2\)"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, tensors, metadata, sentence):
    path = tmp_path / "odd.safetensors"
    save_file(tensors, path, metadata)
    for read in (read_latents, read_latent_header):
        with pytest.raises(UserError, match=sentence) as raised:
            read(path)
        assert str(path) in str(raised.value)
