"""From a loaded transformer and an encoded prompt to latents."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hunyuan_model.sampling.flow import flow_sigmas, initial_noise, latent_size, sample_latents
from hunyuan_model.sampling.guidance import GuidedTransformer
from hunyuan_model.sampling.step_cache import StepCache, check_step_cache
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingSettings:
    """The size, seed and schedule of one video; the fields have the names of flags.

    Attributes:
        video_size: height and width in pixels.
        embedded_cfg_scale: distilled guidance, which the transformer reads.
        guidance_scale: classifier-free guidance against a negative prompt; 1 is none.
        guidance_range: the share of the steps in which it applies, from and to.
        split_uncond: compute prompt and negative prompt one after the other, not as a batch of two.
        strength: of a start that is given: the share of the steps that are made, from its noised latents. 0 keeps it, 1 ignores it.
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
    guidance_scale: float = 1.0
    guidance_range: tuple[float, float] = (0.0, 1.0)
    split_uncond: bool = False
    strength: float = 0.75
    step_cache: float = 0.0
    step_cache_check: bool = False

    def __post_init__(self) -> None:
        latent_size(*self.video_size, self.video_length)
        check_step_cache(self.step_cache, self.infer_steps)
        if self.step_cache_check and not self.step_cache:
            raise UserError("--step_cache_check shows the error of --step_cache; give that as well, or leave it out.")
        if not 0 <= self.guidance_range[0] < self.guidance_range[1] <= 1:
            raise UserError("--guidance_range must be two numbers from 0 to 1, the smaller one first.")
        if not 0 <= self.strength <= 1:
            raise UserError("--strength must be a number from 0 (keep the start) to 1 (ignore it).")

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """(frames, height, width) of the latents."""
        return latent_size(*self.video_size, self.video_length)

    @property
    def guided(self) -> bool:
        """Whether a negative prompt is computed."""
        return self.guidance_scale != 1

    @property
    def guided_steps(self) -> range:
        """Those of all steps, from 0, in which classifier-free guidance applies; at least one where ``guided``."""
        first, end = (round(share * self.infer_steps) for share in self.guidance_range)
        first = min(first, self.infer_steps - 1)
        return range(first, max(end, first + 1)) if self.guided else range(0)

    @property
    def batched(self) -> bool:
        """Whether prompt and negative prompt are one batch. A step cache is of one of them."""
        return self.guided and not self.split_uncond and not self.step_cache

    def steps_from(self, start: object | None) -> range:
        """The steps that are made: all without a start, else the last of them, at least one where ``strength`` is above 0."""
        if start is None:
            return range(self.infer_steps)
        made = max(round(self.strength * self.infer_steps), int(self.strength > 0))
        return range(self.infer_steps - made, self.infer_steps)

    def steps_with_checks(self, start: object | None) -> int:
        """How many steps ``generate_latents`` reports."""
        return len(self.steps_from(start)) * (2 if self.step_cache_check else 1)

    def metadata(self) -> dict[str, str]:
        """The settings as text, for the metadata of files."""
        height, width = self.video_size
        names = ("seed", "video_length", "infer_steps", "embedded_cfg_scale", "flow_shift", "guidance_scale", "step_cache")
        values = {"height": height, "width": width, **{name: getattr(self, name) for name in names}}
        return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()}


def generate_latents(
    transformer: HYVideoDiffusionTransformer,
    text: Sequence[Tensor],
    settings: SamplingSettings,
    *,
    device: torch.device,
    dtype: torch.dtype,
    negative: Sequence[Tensor] | None = None,
    start: Tensor | None = None,
    on_step: Callable[[int], None] = lambda step: None,
    on_estimate: Callable[[int, Tensor], None] | None = None,
    agree: Callable[[bool], bool] = bool,
) -> Tensor:
    """Latents (1, 16, F, H, W), float32, on ``device``, of one video.

    Args:
        text: states, mask and pooled states of the prompt, as ``sample_latents`` takes them.
        negative: the same of the negative prompt; wanted where ``settings.guided``.
        start: latents (1, 16, F, H, W) of the video to change, in the network's scale; see ``settings.strength``.
        on_step: called with the number of steps done, after each; with ``step_cache_check`` also in the second run.
        on_estimate: called after each step with the steps done and what the latents would become, as ``sample_latents`` has it.
        agree: see ``StepCache``.
    """
    steps = settings.steps_from(start)
    sigmas = flow_sigmas(settings.infer_steps, settings.flow_shift)[steps.start :]
    latents = initial_noise(settings.latent_size, torch.Generator().manual_seed(settings.seed))
    if start is not None and steps.start > 0:
        latents = torch.lerp(start.float().cpu(), latents, sigmas[0])
    guided = [step - steps.start for step in settings.guided_steps if step in steps]
    if not steps:
        return latents.to(device)

    def run(positive: Callable[..., Tensor], negative_network: Callable[..., Tensor] | None) -> Tensor:
        network = positive
        if guided:
            network = GuidedTransformer(positive, negative_network, negative, settings.guidance_scale, guided)
        return sample_latents(
            network,
            latents,
            *text,
            sigmas=sigmas,
            guidance_scale=settings.embedded_cfg_scale,
            device=device,
            dtype=dtype,
            on_step=on_step,
            on_estimate=on_estimate,
        )

    alone = None if settings.batched else transformer
    if not settings.step_cache:
        return run(transformer, alone)
    cache, negative_cache = (StepCache(transformer, len(part), settings.step_cache, agree) for part in (steps, guided))
    result = run(cache, negative_cache)
    logger.info("step cache: %d of %d steps computed", len(cache.computed), len(steps))
    if settings.step_cache_check:
        reference = run(transformer, transformer)
        error = 100 * ((result - reference).norm() / reference.norm()).item()
        logger.info("step cache: latents %.3g %% (rms) off those of all steps, which took the time that the cache saves", error)
    return result
