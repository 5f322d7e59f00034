"""A folder to spoil files in, and the scripts to show them to: for the tests of what the scripts refuse."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

# The keys of a LoRA of one module that fits the tiny model.
MODULE = "lora_unet_double_blocks_0_img_attn_qkv"
DOWN, UP, ALPHA = f"{MODULE}.lora_down.weight", f"{MODULE}.lora_up.weight", f"{MODULE}.alpha"


class Bench:
    """A folder to spoil files in, and the scripts to show them to."""

    def __init__(self, call: Callable, model, cached: Path, folder: Path) -> None:
        self._call, self.model, self.cached, self.folder = call, model, cached, folder
        self.encoders = ["--text_encoder1", model.text_encoder1, "--text_encoder2", model.text_encoder2]

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def media(self, kind: str, **files: bytes) -> Path:
        """A dataset TOML over a folder with these files; ``a_png=b"..."`` is the file a.png, and each has a caption."""
        for name, content in files.items():
            stem, _, ending = name.rpartition("_")
            self.write(f"media/{stem}.{ending}", content)
            self.write(f"media/{stem}.txt", "a caption")
        source = f"{kind}_directory = '{self.folder / 'media'}'\ncache_directory = '{self.folder / 'cache'}'\n"
        (self.folder / "media").mkdir(exist_ok=True)
        return self.write("media.toml", f"[general]\nresolution = 32\n[[datasets]]\n{source}")

    def jsonl(self, content: bytes | str) -> Path:
        lines = self.write("items.jsonl", content)
        return self.write(
            "items.toml", f"[[datasets]]\nimage_jsonl_file = '{lines}'\ncache_directory = '{self.folder / 'cache'}'\n"
        )

    def latents(self, toml: Path, *flags: object):
        return self._call("cache_latents", "--dataset_config", toml, "--vae", self.model.vae, "--num_workers", 1, *flags)

    def texts(self, toml: Path, *flags: object):
        return self._call("cache_text_encoder_outputs", "--dataset_config", toml, *self.encoders, *flags)

    def train(self, *flags: object):
        AcceleratorState._reset_state(reset_partial_state=True)
        base = ["--dataset_config", self.cached, "--dit", self.model.dit, "--output_dir", self.folder / "out", "--output_name", "x"]
        return self._call("hv_train_network", *base, "--max_data_loader_n_workers", 0, "--max_train_epochs", 1, *flags)

    def generate(self, *flags: object):
        size = ["--video_size", 32, 32, "--video_length", 1, "--infer_steps", 1, "--prompt", "x"]
        base = ["--dit", self.model.dit, "--vae", self.model.vae, *self.encoders, "--save_path", self.folder / "out", *size]
        return self._call("hv_generate_video", *base, *flags)

    def decode(self, latent: Path):
        return self._call("hv_generate_video", "--latent_path", latent, "--vae", self.model.vae, "--save_path", self.folder / "out")

    def convert(self, lora: Path, output: Path | None = None, *flags: object):
        output = output or self.folder / "out.safetensors"
        return self._call("convert_lora", "--input", lora, "--output", output, "--target", "other", *flags)

    def spoil(self, name: str, change: Callable[[dict], None]) -> None:
        """Change the tensors of the cache called ``name`` in place."""
        path = self.folder / "pictures" / name
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    def changed(self, source: Path, change: Callable[[dict], None], name: str = "changed.safetensors") -> Path:
        """A copy of a safetensors file with its tensors changed."""
        tensors = load_file(source)
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self.folder / name)
        return self.folder / name

    def lora(self, name: str = "good.safetensors") -> Path:
        """A LoRA of one module that fits the model."""
        save_file({DOWN: torch.ones(4, 128), UP: torch.ones(384, 4), ALPHA: torch.tensor(4.0)}, self.folder / name)
        return self.folder / name


def refused(ended, *says: object) -> None:
    """The script ended with status 2 and a last line that holds all of ``says``."""
    assert ended.status == 2, ended.stderr
    answer = ended.stderr.splitlines()[-1]
    assert "error: " in answer and "Traceback" not in ended.stderr
    assert all(str(part) in answer for part in says), answer


def picture(format: str = "PNG", size: tuple[int, int] = (32, 32), **options: object) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format=format, **options)
    return buffer.getvalue()
