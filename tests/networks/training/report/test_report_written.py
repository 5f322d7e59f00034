"""What a report says of the files that a training wrote."""

from __future__ import annotations

import shlex
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from networks.formats.layouts import LAYOUTS, flat_name
from networks.formats.reading import read_lora
from networks.formats.writing import save_lora
from networks.training.report.written import USAGE, written_files

LOHA = ("w1_a", "w1_b", "w2_a", "w2_b")


def full_size(width: int) -> dict[str, tuple[int, int]]:
    """(rows, inputs) of the linear layers that training changes by default, of a model with blocks as HunyuanVideo has them."""
    rows = {"attn_qkv": (3, 1), "attn_proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    shapes = {f"double_blocks.{n}.{stream}_{name}": rows[name] for n in range(20) for stream in ("img", "txt") for name in rows}
    shapes |= {f"single_blocks.{n}.{name}": size for n in range(40) for name, size in (("linear1", (7, 1)), ("linear2", (1, 5)))}
    return {name: (rows * width, inputs * width) for name, (rows, inputs) in shapes.items()}


@pytest.fixture
def settings(tmp_path) -> SimpleNamespace:
    texts = SimpleNamespace(text_encoder1="a b", text_encoder2=None)
    samples = SimpleNamespace(vae_settings=SimpleNamespace(vae=None), text_settings=texts)
    return SimpleNamespace(saving=SimpleNamespace(folder=tmp_path), model=SimpleNamespace(dit="{dit}.safetensors"), samples=samples)


def save(folder, width: int) -> list:
    """A LoRA as training saves it at its end, and its copy."""
    tensors = {}
    for module, (rows, inputs) in full_size(width).items():
        key = LAYOUTS["default"].prefix + flat_name(module)
        tensors |= {f"{key}.lora_down.weight": torch.zeros(1, inputs), f"{key}.lora_up.weight": torch.zeros(rows, 1)}
        tensors |= {f"{key}.alpha": torch.tensor(1.0)}
    save_file(tensors, folder / "x.safetensors")
    save_lora(folder / "x_comfyui.safetensors", read_lora(folder / "x.safetensors"), "other")
    return [folder / "x.safetensors", folder / "x_comfyui.safetensors"]


def test_the_files_of_the_full_model_are_loaded_whole_by_all_programs(settings, tmp_path):
    entries = {entry.readers: entry for entry in written_files(save(tmp_path, 3072), settings)}
    assert list(entries) == ["this project", *USAGE]
    assert (entries["this project"].file, entries["this project"].checked) == ("x.safetensors", "720 of 720 keys")
    words = shlex.split(entries["this project"].usage)
    assert words[words.index("--dit") + 1] == "{dit}.safetensors" and words[words.index("--text_encoder1") + 1] == "a b"
    for name in ("ComfyUI", "diffusers", "FramePack Studio"):
        assert (entries[name].file, entries[name].checked) == ("x_comfyui.safetensors", "480 of 480 keys"), name
    assert entries["diffusers"].usage == f"pipe.load_lora_weights('{(tmp_path / 'x_comfyui.safetensors').as_posix()}')"


def test_a_model_without_copies_names_the_conversion(settings, tmp_path):
    entries = {entry.readers: entry for entry in written_files(save(tmp_path, 3072)[:1], settings)}
    assert entries["diffusers"].usage.startswith("python convert_lora.py ") and "--target other" in entries["diffusers"].usage
    assert entries["diffusers"].checked.startswith("0 of 720 keys: of official names it takes lora_A")
    assert "FramePack Studio" not in entries


def test_where_the_copy_does_not_help_either(settings, tmp_path):
    entries = {entry.readers: entry for entry in written_files(save(tmp_path, 64), settings)}
    assert "--target diffusers" in entries["diffusers"].usage and entries["ComfyUI"].checked == "480 of 480 keys"
    loha = {f"img_attn_qkv.hada_{name}": torch.ones(192, 1) if name[-1] == "a" else torch.ones(1, 64) for name in LOHA}
    save_file({f"lora_unet_double_blocks_0_{name}": each for name, each in loha.items()}, tmp_path / "loha.safetensors")
    entries = {entry.readers: entry for entry in written_files([tmp_path / "loha.safetensors"], settings)}
    assert not entries["diffusers"].usage and "LoHa has no place there" in entries["diffusers"].checked
