"""The toy model with all its parts in memory, which makes many small clips at once.

``hv_generate_video.py`` makes one clip, of any size, with one part in memory at a time; the functions are the same.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

import hunyuan_model
from examples.toy.model_files import FOLDER, require_model
from examples.toy.world import to_pixels
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.sampling.decoding import decode_latents
from hunyuan_model.sampling.flow import flow_sigmas, initial_noise, latent_size, sample_latents
from hunyuan_model.sampling.step_cache import StepCache, check_step_cache
from hunyuan_model.text.clip import CLIPTextEncoder
from hunyuan_model.text.llm import LlamaTextEncoder
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from hunyuan_model.vae.model import AutoencoderKLCausal3D
from networks.injection import InjectedLoras
from networks.merging import merge_patch, read_lora_files
from utils.errors import UserError
from utils.progress import ProgressBar

SIZE, FRAMES, STEPS, BATCH_SIZE = 64, 9, 20, 16
GUIDANCE, FLOW_SHIFT = 6.0, 7.0  # as hv_generate_video.py has them where nothing is said

Text = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""States (B, L, D) and mask (B, L) of text encoder 1, pooled vectors (B, P) of text encoder 2."""


@dataclass
class ToyModel:
    """The four networks, on one device; ``dtype`` is the transformer's, the others are float32."""

    transformer: HYVideoDiffusionTransformer
    vae: AutoencoderKLCausal3D
    llama: LlamaTextEncoder
    clip: CLIPTextEncoder
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str] = FOLDER,
        *,
        lora: Sequence[str | os.PathLike[str]] = (),
        multipliers: Sequence[float] = (),
        inject: bool = False,
        runtime: RuntimeSettings | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ToyModel:
        """The model in ``folder``, with LoRA files merged into the transformer's weights, or beside them with ``inject``.

        Raises:
            UserError: a part or a LoRA is missing or does not fit.
        """
        files, device = require_model(folder), torch.device(device)
        loras = read_lora_files(lora, multipliers)
        transformer = hunyuan_model.load_transformer(
            files.dit,
            device=device,
            dtype=dtype,
            runtime=runtime,
            patch=merge_patch(loras, files.dit) if loras and not inject else None,
        )
        InjectedLoras(transformer, loras if inject else [], device)
        return cls(
            transformer=transformer,
            vae=hunyuan_model.load_vae(files.vae, device=device, dtype=torch.float32),
            llama=hunyuan_model.load_text_encoder_1(files.text_encoder1, device=device, dtype=torch.float32),
            clip=hunyuan_model.load_text_encoder_2(files.text_encoder2, device=device, dtype=torch.float32),
            device=device,
            dtype=dtype,
        )

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        frames: int = FRAMES,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        flow_shift: float = FLOW_SHIFT,
        step_cache: float = 0.0,
        batch_size: int = BATCH_SIZE,
        size: int = SIZE,
    ) -> np.ndarray:
        """A clip for each prompt: (N, frames, size, size, 3) uint8.

        Each clip's noise comes from its own seed, as in ``hv_generate_video.py``: no clip depends on those beside it.
        Prompts of one length in tokens share a batch, since those of several would be attended to one by one. With a threshold
        ``step_cache``, the clips of a batch are all computed at the steps at which one of them needs it.

        Raises:
            UserError: a size or a number of frames that the model has not, or a picture that is not finite; too few steps for
                ``step_cache``.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds")
        latent = latent_size(size, size, frames)
        check_step_cache(step_cache, steps)
        clips = np.empty((len(prompts), frames, size, size, 3), np.uint8)
        texts = self._encode(prompts, batch_size)
        batches = _batches_of_one_length([int(mask.sum()) for _, mask, _ in texts], batch_size)
        with ProgressBar(total=len(batches) * steps, desc=f"sampling {len(prompts)} clips", unit="step") as progress:
            for rows in batches:
                latents = sample_latents(
                    StepCache(self.transformer, steps, step_cache) if step_cache else self.transformer,
                    torch.cat([initial_noise(latent, torch.Generator().manual_seed(seeds[row])) for row in rows]),
                    *(torch.cat(part) for part in zip(*(texts[row] for row in rows))),
                    sigmas=flow_sigmas(steps, flow_shift),
                    guidance_scale=guidance,
                    device=self.device,
                    dtype=self.dtype,
                    on_step=lambda step: progress.update(),
                )
                if not torch.isfinite(latents).all():
                    raise UserError(f"the transformer produced NaN or infinity for {prompts[rows[0]]!r}; try float32.")
                clips[rows] = decode_latents(self.vae, latents, device=self.device, dtype=torch.float32).numpy()
        return clips

    def _encode(self, prompts: Sequence[str], batch_size: int) -> list[Text]:
        """The text of each prompt, as a batch of one."""
        texts: list[Text] = []
        for start in range(0, len(prompts), batch_size):
            part = list(prompts[start : start + batch_size])
            states, mask = self.llama.encode(part)
            pooled = self.clip.encode(part)
            texts += [(states[row : row + 1], mask[row : row + 1], pooled[row : row + 1]) for row in range(len(part))]
        return texts

    @torch.no_grad()
    def through_vae(self, clips: np.ndarray, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """What the VAE makes of clips (N, T, H, W, 3) uint8, encoded to the mean and decoded: the same shape and type."""
        result = np.empty_like(clips)
        for start in range(0, len(clips), batch_size):
            latents = self.vae.encode(to_pixels(clips[start : start + batch_size], self.device)).mean * self.vae.scaling_factor
            decoded = decode_latents(self.vae, latents, device=self.device, dtype=torch.float32)
            result[start : start + batch_size] = decoded.numpy()
        return result


def _batches_of_one_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows in batches of at most ``batch_size``, each of rows of one length."""
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, length in enumerate(lengths):
        rows_of[length].append(row)
    return [rows[start : start + batch_size] for rows in rows_of.values() for start in range(0, len(rows), batch_size)]
