"""Timesteps for flow-matching training: how t is sampled, how latents are noised, how the loss is weighted.

t in [0, 1] is the share of noise; the transformer gets 1000 t. Every distribution is a quantile function of a uniform
number, so that any source of uniform numbers (independent, stratified) can drive it.

The schemes logit_normal, mode, cosmap and sigma_sqrt are those of Esser et al. 2024 (arXiv 2403.03206).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from hunyuan_model.sampling.flow import TIMESTEPS, shift_sigmas
from utils.errors import UserError

DISTRIBUTIONS = ("sigma", "uniform", "sigmoid", "shift", "logsnr")
WEIGHTING_SCHEMES = ("logit_normal", "mode", "cosmap", "sigma_sqrt", "none")
QUANTILES = 1 << 16  # parts of the distribution, for cutting it


@dataclass(frozen=True)
class TimestepSettings:
    """The flags of the distribution of timesteps and of the weights of the loss.

    Attributes:
        timestep_sampling: ``uniform``; ``sigmoid`` of a normal number; ``shift``, the same moved by
            ``discrete_flow_shift``; ``sigma``, one of the timesteps 1..1000 with the density of ``weighting_scheme``
            (logit_normal and mode; the other schemes leave it flat); ``logsnr``, by a normal number with ``logit_mean`` and
            ``logit_std`` as the logarithm of the ratio of signal to noise power: t = sigmoid(-logsnr / 2).
        min_timestep, max_timestep: the distribution is moved linearly into this range of timesteps, by default 0 to 1000.
        preserve_distribution_shape: instead, the distribution is cut off at the ends of the range.
        num_timestep_buckets: so many samples after each other cover the distribution evenly: each comes from another of as many
            equally likely parts of it, in random order. None samples independently.
    """

    timestep_sampling: str = "sigma"
    discrete_flow_shift: float = 1.0
    sigmoid_scale: float = 1.0
    weighting_scheme: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    min_timestep: float | None = None
    max_timestep: float | None = None
    preserve_distribution_shape: bool = False
    num_timestep_buckets: int | None = None

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest timestep, 0 to 1000."""
        low = 0.0 if self.min_timestep is None else float(self.min_timestep)
        return low, float(TIMESTEPS) if self.max_timestep is None else float(self.max_timestep)

    def __post_init__(self) -> None:
        for name in ("discrete_flow_shift", "logit_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name} must be above 0, but it is {getattr(self, name):g}.")
        low, high = self.range
        ends = f"--min_timestep {low:g} and --max_timestep {high:g}"
        if not 0 <= low < high <= TIMESTEPS:
            raise UserError(f"{ends} are no range: 0 <= min < max <= {TIMESTEPS} is needed.")
        if self.timestep_sampling == "sigma" and math.floor(high) <= math.ceil(low):
            raise UserError(f"--timestep_sampling sigma samples whole timesteps, and there is none between {ends}.")
        if self.preserve_distribution_shape and not len(_parts_in_range(self)):
            raise UserError(
                f"--timestep_sampling {self.timestep_sampling} has no timestep between {ends}; "
                "leave --preserve_distribution_shape out, or choose a larger range."
            )

    def without_effect(self) -> list[str]:
        """A sentence for each flag that the chosen distribution does not use."""
        chosen, scheme = self.timestep_sampling, self.weighting_scheme
        normal = chosen == "logsnr" or (chosen, scheme) == ("sigma", "logit_normal")
        used = {
            "discrete_flow_shift": chosen == "shift",
            "sigmoid_scale": chosen in ("sigmoid", "shift"),
            "logit_mean": normal,
            "logit_std": normal,
            "mode_scale": (chosen, scheme) == ("sigma", "mode"),
            "weighting_scheme": chosen == "sigma" or scheme not in ("logit_normal", "mode"),
        }
        unused = [name for name, needed in used.items() if not needed and getattr(self, name) != getattr(TimestepSettings, name)]
        sentences = [
            f"--{name} {getattr(self, name)} has no effect with --timestep_sampling {chosen} and --weighting_scheme {scheme}."
            for name in unused
        ]
        if self.preserve_distribution_shape and self.range == (0, TIMESTEPS):
            sentences.append("--preserve_distribution_shape has no effect without --min_timestep or --max_timestep.")
        return sentences


def timesteps_from_uniform(u: Tensor, settings: TimestepSettings) -> Tensor:
    """The quantile function of the distribution.

    Args:
        u: (B,), uniform in [0, 1).

    Returns:
        t (B,), float32, in [min_timestep, max_timestep] / 1000.
    """
    u = u.to(torch.float64)
    low, high = settings.range
    if settings.preserve_distribution_shape:
        parts = _parts_in_range(settings)
        position = u * len(parts)
        part = position.floor().clamp(max=len(parts) - 1)
        u = (parts[part.long().cpu()].to(u) + (position - part)) / QUANTILES
        return timesteps_from_uniform(u, _without_range(settings)).clamp(low / TIMESTEPS, high / TIMESTEPS)
    if settings.timestep_sampling == "sigma":
        density = u
        if settings.weighting_scheme == "logit_normal":
            density = torch.sigmoid(settings.logit_mean + settings.logit_std * torch.special.ndtri(u))
        elif settings.weighting_scheme == "mode":
            density = 1 - u - settings.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        # Whole timesteps above the least one. As in the schedule of the paper, small numbers are the noisy end.
        low, high = math.ceil(low), math.floor(high)
        index = (density * (high - low)).floor().clamp(0, high - low - 1)
        return ((high - index) / TIMESTEPS).to(torch.float32)
    if settings.timestep_sampling == "uniform":
        t = u
    elif settings.timestep_sampling == "logsnr":
        t = torch.sigmoid(-0.5 * (settings.logit_mean + settings.logit_std * torch.special.ndtri(1 - u)))
    else:
        t = torch.sigmoid(settings.sigmoid_scale * torch.special.ndtri(u))
        if settings.timestep_sampling == "shift":
            t = shift_sigmas(t, settings.discrete_flow_shift)
    low, high = low / TIMESTEPS, high / TIMESTEPS
    return (low + (high - low) * t).to(torch.float32)


@lru_cache
def _parts_in_range(settings: TimestepSettings) -> Tensor:
    """Which of ``QUANTILES`` equal parts of [0, 1) lead into the range of the settings, in the order of their t."""
    t = timesteps_from_uniform((torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES, _without_range(settings))
    order = t.argsort(stable=True)
    low, high = settings.range
    return order[(t[order] >= low / TIMESTEPS) & (t[order] <= high / TIMESTEPS)]


def _without_range(settings: TimestepSettings) -> TimestepSettings:
    return replace(settings, min_timestep=None, max_timestep=None, preserve_distribution_shape=False)


def loss_weights(t: Tensor, weighting_scheme: str) -> Tensor:
    """Weight of each sample's loss, (B,) float32; ones for schemes that are no weights.

    sigma is t rounded to the table 0.001, 0.002, ..., 1, which also keeps ``sigma_sqrt`` finite.
    """
    if weighting_scheme not in ("sigma_sqrt", "cosmap"):
        return torch.ones(len(t), device=t.device)
    sigma = (t.double() * TIMESTEPS).round().clamp(1, TIMESTEPS) / TIMESTEPS
    weights = sigma**-2 if weighting_scheme == "sigma_sqrt" else 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return weights.to(torch.float32)


def noisy_latents(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """``(1 - t) * latents + t * noise`` with one t (B,) per sample; latents and noise (B, ...)."""
    t = t.to(latents.device, latents.dtype).view(-1, *[1] * (latents.dim() - 1))
    return (1 - t) * latents + t * noise


class TimestepSampler:
    """Samples timesteps with one generator; its state can be saved and restored."""

    def __init__(self, settings: TimestepSettings, generator: torch.Generator) -> None:
        self.settings = settings
        self.generator = generator
        self._remaining = torch.empty(0, dtype=torch.int64)  # parts that nothing was sampled from yet
        self._in_epoch = 0  # samples of this epoch

    def begin_epoch(self) -> None:
        """Start a new cover where an epoch has samples enough for one; else the covers continue through the epochs."""
        buckets = self.settings.num_timestep_buckets
        if buckets is not None and self._in_epoch >= buckets:
            self._remaining = self._remaining[:0]
        self._in_epoch = 0

    def sample(self, count: int) -> Tensor:
        """t (count,), float32, on the generator's device."""
        u = torch.rand(count, generator=self.generator, device=self.generator.device, dtype=torch.float64)
        if (buckets := self.settings.num_timestep_buckets) is not None:
            u = (self._next_parts(count, buckets).to(u) + u) / buckets
            self._in_epoch += count
        return timesteps_from_uniform(u, self.settings)

    def _next_parts(self, count: int, buckets: int) -> Tensor:
        while len(self._remaining) < count:
            order = torch.randperm(buckets, generator=self.generator, device=self.generator.device).cpu()
            self._remaining = torch.cat([self._remaining, order])
        parts, self._remaining = self._remaining[:count], self._remaining[count:]
        return parts

    def state_dict(self) -> dict[str, Tensor | int]:
        """What ``load_state_dict`` needs to continue with the same samples. The keys are those of states on people's disks."""
        return {"generator": self.generator.get_state(), "due": self._remaining.clone(), "drawn": self._in_epoch}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        self.generator.set_state(state["generator"])
        self._remaining, self._in_epoch = state["due"].clone(), state.get("drawn", 0)
