"""From a loaded transformer and an encoded prompt to latents, with a progress bar."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hunyuan_model.sampling.flow import flow_sigmas, initial_noise, latent_size, sample_latents
from hunyuan_model.sampling.step_cache import StepCache, check_step_cache
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from utils.errors import UserError
from utils.progress import ProgressBar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingSettings:
    """The size, seed and schedule of one video; the fields have the names of flags.

    Attributes:
        video_size: height and width in pixels.
        step_cache: threshold of ``StepCache``; 0 computes all steps.
        step_cache_check: also sample with all steps and log the difference.

    Raises:
        UserError: a size that the model has not, or a step cache with nothing to skip.
    """

    seed: int
    video_size: tuple[int, int] = (256, 256)
    video_length: int = 129
    infer_steps: int = 50
    embedded_cfg_scale: float = 6.0
    flow_shift: float = 7.0
    step_cache: float = 0.0
    step_cache_check: bool = False

    def __post_init__(self) -> None:
        latent_size(*self.video_size, self.video_length)
        check_step_cache(self.step_cache, self.infer_steps)
        if self.step_cache_check and not self.step_cache:
            raise UserError("--step_cache_check shows the error of --step_cache; give that as well, or leave it out.")

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """(frames, height, width) of the latents."""
        return latent_size(*self.video_size, self.video_length)

    def metadata(self) -> dict[str, str]:
        """The settings as text, for the metadata of files."""
        height, width = self.video_size
        names = ("seed", "video_length", "infer_steps", "embedded_cfg_scale", "flow_shift", "step_cache")
        values = {"height": height, "width": width, **{name: getattr(self, name) for name in names}}
        return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()}


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
