"""What is sampled, and how."""

from __future__ import annotations

from dataclasses import dataclass

from hunyuan_model.sampling.euler import latent_size
from hunyuan_model.sampling.step_cache import check_step_cache
from utils.errors import UserError


@dataclass(frozen=True)
class SamplingSettings:
    """The size, seed and schedule of one video; the fields have the names of flags.

    Attributes:
        video_size: height and width in pixels, multiples of 16.
        video_length: frames, 4n + 1.
        embedded_cfg_scale: strength of the distilled guidance.
        flow_shift: shift of the schedule towards noise.
        step_cache: threshold below which steps are skipped, see ``StepCache``; 0 computes all.
        step_cache_check: with ``step_cache``, also sample with all steps and log the difference.

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
        return {
            "seed": str(self.seed),
            "height": str(height),
            "width": str(width),
            "video_length": str(self.video_length),
            "infer_steps": str(self.infer_steps),
            "embedded_cfg_scale": f"{self.embedded_cfg_scale:g}",
            "flow_shift": f"{self.flow_shift:g}",
            "step_cache": f"{self.step_cache:g}",
        }
