"""The toy transformer: learns by flow matching to draw what captions say, in latents of the toy VAE."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from examples.toy import world
from examples.toy.pretrain_text import CLIP_WIDTH, LLAMA_WIDTH, random_caption
from examples.toy.training_loop import Losses, Recipe
from examples.toy.world import to_pixels
from hunyuan_model.architecture import TransformerConfig, rope_dims_for
from hunyuan_model.flow import GUIDANCE_UNIT, TIMESTEPS, shift_sigmas
from hunyuan_model.text_encoder_clip import CLIPTextEncoder
from hunyuan_model.text_encoder_llm import LlamaTextEncoder
from hunyuan_model.transformer import HYVideoDiffusionTransformer
from hunyuan_model.vae import AutoencoderKLCausal3D
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
    steps=1400, learning_rate=1e-3, muon_rate=0.01, muon_parts=r"blocks\.", warm_up=100, weight_decay=0.01, ema_decay=0.998
)
SEED = 3
BATCH_SIZE = 64
CANDIDATES = 6  # times the batch size are captioned, and those of one text length are taken: a batch without padding
CLIPS_OF = {1: 5000, 5: 500, 9: 4000, 13: 300, 17: 300}
"""Frames -> how many clips of them are encoded once, before training; each gets a new caption whenever it is used."""
FRAMES_OF_STEPS = (9, 1, 9, 1, 9, 5, 9, 1, 9, 17, 9, 1, 9, 1, 9, 13)
GUIDANCE = (1.0, 8.0)
TIMESTEP_SHIFT = 1.5  # of uniform timesteps, as sampling shifts its sigmas: what a picture shows is decided at high noise
INVENTED_SHARE = 0.08  # of captions; the model answers an unknown word with any shape


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
    for start in tqdm(range(0, count, step), desc=f"encoding clips of {frames} frames", unit="batch", leave=False):
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
        frames = FRAMES_OF_STEPS[step % len(FRAMES_OF_STEPS)]
        chosen, captions = self._captioned(rng, frames)
        states, mask = self.llama.encode(captions)
        pooled = self.clip.encode(captions)

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
        velocity = self.transformer(noisy, t * TIMESTEPS, states.to(device), mask, pooled.to(device), guidance * GUIDANCE_UNIT)
        return {"loss": nn.functional.mse_loss(velocity, target)}

    def _captioned(self, rng: np.random.Generator, frames: int) -> tuple[torch.Tensor, list[str]]:
        """Indices of up to ``BATCH_SIZE`` clips, and captions that all have the same number of tokens."""
        words = self.pool[f"words_{frames}"]
        candidates = rng.choice(len(words), CANDIDATES * BATCH_SIZE, replace=len(words) < CANDIDATES * BATCH_SIZE)
        captions = [random_caption(rng, _attributes(words[index].tolist()), INVENTED_SHARE)[0] for index in candidates]
        lengths = [len(ids) for ids in self.llama.tokenizer(captions, add_special_tokens=False).input_ids]
        length = lengths[rng.integers(len(lengths))]  # a frequent length is taken often
        rows = [row for row, other in enumerate(lengths) if other == length][:BATCH_SIZE]
        return torch.from_numpy(candidates[rows]), [captions[row] for row in rows]
