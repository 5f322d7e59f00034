"""The toy transformer: learns by flow matching to draw what captions say, in latents of the toy VAE."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from examples.toy import world
from examples.toy.recipe.pretrain_text import CLIP_WIDTH, LLAMA_WIDTH, random_caption
from examples.toy.recipe.training_loop import Losses, Recipe
from examples.toy.world import to_pixels
from hunyuan_model.sampling.flow import GUIDANCE_UNIT, TIMESTEPS, shift_sigmas
from hunyuan_model.text.clip import CLIPTextEncoder
from hunyuan_model.text.llm import LlamaTextEncoder
from hunyuan_model.transformer.config import TransformerConfig, rope_dims_for
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from hunyuan_model.vae.model import AutoencoderKLCausal3D
from utils.progress import ProgressBar
from utils.safetensors_io import read_header, read_tensors, save_tensors

HEAD_DIM, HEADS = 32, 6
CONFIG = TransformerConfig(
    hidden_size=HEADS * HEAD_DIM,
    heads=HEADS,
    head_dim=HEAD_DIM,
    double_depth=2,
    single_depth=4,
    mlp_size=4 * HEADS * HEAD_DIM,
    text_dim=LLAMA_WIDTH,
    pooled_dim=CLIP_WIDTH,
    rope_dims=rope_dims_for(HEAD_DIM),
)
RECIPE = Recipe(
    steps=9000,
    earlier_ends=(3600, 6450),
    learning_rate=1e-3,
    muon_rate=0.01,
    muon_parts=r"blocks\.",
    warm_up=100,
    weight_decay=0.01,
    ema_decay=0.998,
)
SEED = 3
BATCH_SIZE = 128
CANDIDATES = 5  # times the batch size are captioned, and those of one text length are taken: a batch without padding
CLIPS_OF = {1: 16000, 5: 700, 9: 12000, 13: 500, 17: 600}
"""Frames -> how many clips of them are encoded once, before training; each gets a new caption whenever it is used.

The shipped weights had the first 6000 clips of nine frames until step 6590.
"""
PICTURES_FIRST = (1, 9, 1, 1, 9, 1, 5, 9, 1, 1, 9, 1, 17, 9, 1, 1, 1, 9, 1, 1, 9, 1, 5, 9, 1, 1, 9, 1, 13, 9, 1, 1)
"""Frames of one step after the other, again and again: mostly pictures, which cost half of a clip, then mostly clips."""
CLIPS_THEN = (9, 1, 9, 9, 1, 9, 5, 9, 1, 9, 9, 17, 9, 1, 9, 13)
CLIPS_FROM = 1905
GUIDANCE = (1.0, 8.0)
TIMESTEP_SHIFT = 1.5  # of uniform timesteps, as sampling shifts its sigmas: what a picture shows is decided at high noise
INVENTED_SHARE = 0.08  # of captions; the model answers an unknown word with any shape
UNSAID_SHARE = 0.1  # of steps: their captions are empty, so that the model also learns what is drawn when nothing is said
PLAIN_SHARE = 0.3  # of a guided step's rows, at guidance 1
GUIDANCE_STRENGTHS = {2100: 0.4, 2623: 0.3}
"""From which step on guidance is taught, see ``FlowLosses``, and how much of it per unit of the distilled scale above 1."""


@torch.no_grad()
def new_transformer() -> HYVideoDiffusionTransformer:
    """Initial weights, the same every time; every block begins as the identity and the output as zero (arXiv 2212.09748)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        transformer = HYVideoDiffusionTransformer(CONFIG)
        for name, module in transformer.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            if name.endswith(("mod.linear", "modulation.linear", "adaLN_modulation.1", "final_layer.linear")):
                nn.init.zeros_(module.weight)
    return transformer


# ---------------------------------------------------------------------------------------------------------------------
# Latents, encoded once


def latent_pool(vae: AutoencoderKLCausal3D, folder: Path, check_time: Callable[[], None]) -> dict[str, torch.Tensor]:
    """Posteriors of all clips of ``CLIPS_OF``: encoded, or read where ``folder`` holds those of this VAE already.

    Args:
        check_time: called before each file is made; what it raises passes through.

    Returns:
        for each number of frames n: ``mean_n`` and ``deviation_n`` (clips, 16, F, 8, 8) float16, times the scaling factor,
        and ``words_n`` (clips, 4) uint8, see ``_words``.
    """
    digest = hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in vae.state_dict().values())).hexdigest()
    pool = {}
    for frames, count in CLIPS_OF.items():
        path, made_of = folder / f"latents_{frames:02d}.safetensors", {"vae": digest, "clips": str(count)}
        if not path.exists() or read_header(path).metadata != made_of:
            check_time()
            mean, deviation, words = _encode_clips(vae, frames, count)
            tensors = {f"mean_{frames}": mean, f"deviation_{frames}": deviation, f"words_{frames}": words}
            save_tensors(path, tensors, made_of)
        pool |= read_tensors(path, "encoded clips").tensors
    return pool


@torch.no_grad()
def _encode_clips(vae: AutoencoderKLCausal3D, frames: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    device = next(vae.parameters()).device
    means, deviations, words = [], [], []
    step = max(1, 64 // frames)
    for start in ProgressBar(range(0, count, step), desc=f"encoding clips of {frames} frames", unit="batch", leave=False):
        batch = world.draw_batch(world.generator(SEED, frames, start), min(step, count - start), frames)
        posterior = vae.encode(to_pixels(batch.clips, device))
        means.append((posterior.mean * vae.scaling_factor).half().cpu())
        deviations.append(((0.5 * posterior.logvar).exp() * vae.scaling_factor).half().cpu())
        words += [_words(attributes) for attributes in batch.attributes]
    return torch.cat(means), torch.cat(deviations), torch.tensor(words, dtype=torch.uint8)


_WORD_LISTS = (world.SHAPES, tuple(world.COLOURS), tuple(world.COLOURS), (*world.MOTIONS, None))


def _words(attributes: world.Attributes) -> list[int]:
    said = (attributes.shape, attributes.colour, attributes.background, attributes.motion)
    return [words.index(word) for words, word in zip(_WORD_LISTS, said)]


def _attributes(indices: list[int]) -> world.Attributes:
    return world.Attributes(*(words[index] for words, index in zip(_WORD_LISTS, indices)))


# ---------------------------------------------------------------------------------------------------------------------
# The loss


class FlowLosses:
    """The mean squared error of the predicted velocity (noise minus latents), for one batch of one size per step."""

    def __init__(
        self,
        transformer: HYVideoDiffusionTransformer,
        pool: dict[str, torch.Tensor],
        llama: LlamaTextEncoder,
        clip: CLIPTextEncoder,
    ):
        self.transformer, self.pool, self.llama, self.clip = transformer, pool, llama, clip

    def __call__(self, step: int) -> Losses:
        device = self.transformer.img_in.proj.weight.device
        rng = world.generator(SEED, step)
        order = PICTURES_FIRST if step < CLIPS_FROM else CLIPS_THEN
        frames = order[step % len(order)]
        chosen, captions = self._captioned(rng, frames)
        if rng.random() < UNSAID_SHARE:
            captions = [""] * len(captions)
        states, mask, pooled = self._read(captions)

        random = torch.Generator().manual_seed(step)
        mean, deviation = (self.pool[f"{kind}_{frames}"][chosen].float() for kind in ("mean", "deviation"))
        latents = mean + deviation * torch.randn(mean.shape, generator=random)
        noise = torch.randn(mean.shape, generator=random)
        t = torch.rand(len(chosen), generator=random)
        t = shift_sigmas(t, TIMESTEP_SHIFT)
        guidance = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * torch.rand(len(chosen), generator=random)
        blend = t[:, None, None, None, None]
        noisy, target = (1.0 - blend) * latents + blend * noise, noise - latents
        noisy, target, t, guidance = (value.to(device) for value in (noisy, target, t, guidance))
        strengths = [strength for first, strength in GUIDANCE_STRENGTHS.items() if step >= first]
        if strengths:
            plain = int(PLAIN_SHARE * len(t))
            guidance[:plain] = GUIDANCE[0]
            rows = (value[plain:] for value in (noisy, t, states, mask, pooled, guidance))
            target[plain:] += strengths[-1] * self._guidance_step(*rows)
        velocity = self.transformer(noisy, t * TIMESTEPS, states, mask, pooled, guidance * GUIDANCE_UNIT)
        return {"loss": nn.functional.mse_loss(velocity, target)}

    def _read(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device = self.transformer.img_in.proj.weight.device
        states, mask = self.llama.encode(captions)
        return states.to(device), mask, self.clip.encode(captions).to(device)

    @torch.no_grad()
    def _guidance_step(
        self,
        noisy: torch.Tensor,
        t: torch.Tensor,
        states: torch.Tensor,
        mask: torch.Tensor,
        pooled: torch.Tensor,
        guidance: torch.Tensor,
    ) -> torch.Tensor:
        """The guidance's units times the step from what the model would draw if nothing were said (arXiv 2502.12154)."""
        rows, least = len(t), torch.full_like(t, GUIDANCE[0] * GUIDANCE_UNIT)
        said = self.transformer(noisy, t * TIMESTEPS, states, mask, pooled, least)
        states, mask, pooled = self._read([""])
        states, mask, pooled = states.expand(rows, -1, -1), mask.expand(rows, -1), pooled.expand(rows, -1)
        unsaid = self.transformer(noisy, t * TIMESTEPS, states, mask, pooled, least)
        return (guidance - GUIDANCE[0])[:, None, None, None, None] * (said - unsaid)

    def _captioned(self, rng: np.random.Generator, frames: int) -> tuple[torch.Tensor, list[str]]:
        """Indices of up to ``BATCH_SIZE`` clips, and captions that all have the same number of tokens."""
        words = self.pool[f"words_{frames}"]
        candidates = rng.choice(len(words), CANDIDATES * BATCH_SIZE, replace=len(words) < CANDIDATES * BATCH_SIZE)
        captions = [random_caption(rng, _attributes(words[index].tolist()), INVENTED_SHARE)[0] for index in candidates]
        lengths = [len(ids) for ids in self.llama.tokenizer(captions, add_special_tokens=False).input_ids]
        length = lengths[rng.integers(len(lengths))]  # a frequent length is taken often
        rows = [row for row, other in enumerate(lengths) if other == length][:BATCH_SIZE]
        return torch.from_numpy(candidates[rows]), [captions[row] for row in rows]
