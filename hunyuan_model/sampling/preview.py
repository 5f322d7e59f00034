"""Small pictures of latents while they are sampled: a linear map from the 16 channels to RGB, fitted on the VAE in use."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hunyuan_model.sampling.encoding import FrameEncoder
from hunyuan_model.vae.model import SPATIAL_COMPRESSION
from utils.files import explain_failed_writing
from utils.media.writing import save_picture

logger = logging.getLogger(__name__)

FITTED_PICTURES, FITTED_SIDE = 16, 64
PATCHES = (2, 3, 4, 5, 6)  # along a side of a picture
SHOWN_FRAMES = 6  # of a clip, side by side
LONGER_SIDE = 192  # pixels of a frame that is smaller are enlarged to about this


@dataclass(frozen=True)
class ColourMap:
    """RGB in 0 to 1 of one latent position is ``weight`` (17, 3) times its channels and a one."""

    weight: Tensor

    def frames(self, latents: Tensor) -> np.ndarray:
        """Latents (1, 16, F, H, W) in the network's scale -> uint8 (F, H, W, 3), one pixel a position."""
        rgb = _with_one(latents[0].permute(1, 2, 3, 0).float().cpu()) @ self.weight
        return rgb.clamp(0, 1).mul(255).round().to(torch.uint8).numpy()


def _with_one(latents: Tensor) -> Tensor:
    return torch.cat([latents, torch.ones_like(latents[..., :1])], dim=-1)


def fit_colour_map(encoder: FrameEncoder) -> ColourMap:
    """By least squares on pictures with patches of random colours, the same in every run. Patches of sizes that are not those of
    latent positions also show how these mix colours."""
    generator, inputs, outputs = np.random.default_rng(0), [], []
    for number in range(FITTED_PICTURES):
        patches = PATCHES[number % len(PATCHES)]
        patch = np.arange(FITTED_SIDE) * patches // FITTED_SIDE  # of each row and column
        picture = generator.integers(0, 256, (patches, patches, 3), dtype=np.uint8)[patch][:, patch]
        positions = FITTED_SIDE // SPATIAL_COMPRESSION
        means = picture.reshape(positions, SPATIAL_COMPRESSION, positions, SPATIAL_COMPRESSION, 3).mean(axis=(1, 3))
        inputs.append(encoder.encode(picture[None])[0].flatten(1).T)
        outputs.append(torch.from_numpy(means / 255).flatten(0, 1))
    solution = torch.linalg.lstsq(_with_one(torch.cat(inputs).double()), torch.cat(outputs)).solution
    return ColourMap(solution.float())


@dataclass(frozen=True)
class Preview:
    """Writes ``path`` anew after every ``every`` steps; called as ``on_estimate`` of ``generate_latents``."""

    colours: ColourMap
    path: Path
    every: int

    def __call__(self, step: int, latents: Tensor) -> None:
        if step % self.every == 0:
            save_picture(self.path, preview_picture(self.colours.frames(latents)))
            if step == self.every:
                logger.info("preview, until the result is there: %s", self.path)

    def remove(self) -> None:
        """The result is there, or there will be none."""
        with explain_failed_writing(self.path):
            self.path.unlink(missing_ok=True)


@contextmanager
def removed_on_failure(preview: Preview | None) -> Iterator[None]:
    """Also where the sampling is interrupted."""
    try:
        yield
    except BaseException:
        if preview is not None:
            preview.remove()
        raise


def preview_picture(frames: np.ndarray) -> np.ndarray:
    """Frames (F, H, W, 3) uint8 -> one picture (h, w, 3): up to six of them, evenly from the first to the last, side by side."""
    shown = frames[np.unique(np.linspace(0, len(frames) - 1, SHOWN_FRAMES).round().astype(int))]
    height, width = shown.shape[1:3]
    scale = max(1, LONGER_SIDE // max(height, width))
    size = (width * scale, height * scale)
    return np.concatenate([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in shown], axis=1)
