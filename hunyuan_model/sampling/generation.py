"""From a loaded transformer and an encoded prompt to latents, with a progress bar."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hunyuan_model.sampling.euler import initial_noise, sample_latents
from hunyuan_model.sampling.flow import flow_sigmas
from hunyuan_model.sampling.settings import SamplingSettings
from hunyuan_model.sampling.step_cache import StepCache
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from utils.progress import ProgressBar

logger = logging.getLogger(__name__)


def generate_latents(
    transformer: HYVideoDiffusionTransformer,
    text: Sequence[Tensor],
    settings: SamplingSettings,
    *,
    device: torch.device,
    dtype: torch.dtype,
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Latents (1, 16, F, H, W), float32, on ``device``, of one video.

    Args:
        text: states, mask and pooled states of the prompt, as ``sample_latents`` takes them.
        on_step: called with the number of steps done, after each.
    """
    noise = initial_noise(settings.latent_size, torch.Generator().manual_seed(settings.seed))

    def run(network: Callable[..., Tensor], title: str) -> Tensor:
        with ProgressBar(total=settings.infer_steps, desc=title, unit="step") as progress:

            def advance(step: int) -> None:
                on_step(step)
                progress.update()

            return sample_latents(
                network,
                noise,
                *text,
                sigmas=flow_sigmas(settings.infer_steps, settings.flow_shift),
                guidance_scale=settings.embedded_cfg_scale,
                device=device,
                dtype=dtype,
                on_step=advance,
            )

    if not settings.step_cache:
        return run(transformer, "sampling")
    cache = StepCache(transformer, settings.infer_steps, settings.step_cache)
    latents = run(cache, "sampling")
    logger.info("step cache: %d of %d steps computed", len(cache.computed), settings.infer_steps)
    if settings.step_cache_check:
        reference = run(transformer, "sampling with all steps")
        error = 100 * ((latents - reference).norm() / reference.norm()).item()
        logger.info("step cache: latents %.3g %% (rms) off those of all steps, which took the time that the cache saves", error)
    return latents
