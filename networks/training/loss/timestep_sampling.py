"""Timesteps for flow-matching training: how t is drawn, how latents are noised, how the loss is weighted.

t in [0, 1] is the share of noise; the transformer is told 1000 t. Every sampler is a quantile function of a uniform
number, so that any source of uniform numbers (independent, stratified) can drive it.

The schemes logit_normal, mode, cosmap and sigma_sqrt are those of Esser et al. 2024 (arXiv 2403.03206).
"""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from hunyuan_model.sampling.flow import TIMESTEPS, shift_sigmas
from utils.errors import UserError

logger = logging.getLogger(__name__)

SAMPLERS = ("sigma", "uniform", "sigmoid", "shift", "logsnr")
QUANTILES = 1 << 16  # parts of the distribution, for cutting it
WEIGHTING_SCHEMES = ("logit_normal", "mode", "cosmap", "sigma_sqrt", "none")


@dataclass(frozen=True)
class TimestepSettings:
    """How timesteps are drawn; field names and meanings are those of the training flags.

    Attributes:
        timestep_sampling: ``uniform``; ``sigmoid`` of a normal number; ``shift``, the same moved by
            ``discrete_flow_shift``; ``sigma``, one of the timesteps 1..1000 with the density of ``weighting_scheme``
            (logit_normal and mode; the other schemes leave it flat); ``logsnr``, by a normal number with ``logit_mean`` and
            ``logit_std`` as the logarithm of the ratio of signal to noise power: t = sigmoid(-logsnr / 2).
        min_timestep, max_timestep: what is drawn is moved linearly into this range of timesteps, 0 to 1000.
        preserve_distribution_shape: instead, only what lies in the range anyway is drawn, as often as without a range.
    """

    timestep_sampling: str = "sigma"
    discrete_flow_shift: float = 1.0
    sigmoid_scale: float = 1.0
    weighting_scheme: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    min_timestep: float = 0.0
    max_timestep: float = float(TIMESTEPS)
    preserve_distribution_shape: bool = False

    def __post_init__(self) -> None:
        """Raises a UserError for a value out of range."""
        if self.timestep_sampling not in SAMPLERS:
            raise UserError(f"--timestep_sampling must be one of {', '.join(SAMPLERS)}, but it is {self.timestep_sampling!r}.")
        if self.weighting_scheme not in WEIGHTING_SCHEMES:
            raise UserError(
                f"--weighting_scheme must be one of {', '.join(WEIGHTING_SCHEMES)}, but it is {self.weighting_scheme!r}."
            )
        for name in ("discrete_flow_shift", "logit_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name} must be above 0, but it is {getattr(self, name):g}.")
        if not 0 <= self.min_timestep < self.max_timestep <= TIMESTEPS:
            raise UserError(
                f"--min_timestep {self.min_timestep:g} and --max_timestep {self.max_timestep:g} are no range: "
                f"0 <= min < max <= {TIMESTEPS} is needed."
            )
        if self.timestep_sampling == "sigma" and math.floor(self.max_timestep) <= math.ceil(self.min_timestep):
            raise UserError(
                f"--timestep_sampling sigma draws whole timesteps, and there is none between --min_timestep {self.min_timestep:g} "
                f"and --max_timestep {self.max_timestep:g}."
            )

        if self.preserve_distribution_shape and not len(_inside_range(self)[1]):
            raise UserError(
                f"--timestep_sampling {self.timestep_sampling} draws nothing between --min_timestep {self.min_timestep:g} and "
                f"--max_timestep {self.max_timestep:g}; leave --preserve_distribution_shape out, or widen the range."
            )

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> TimestepSettings:
        """Settings from the training flags; says so where a given flag has no effect on the chosen sampler."""
        settings = cls(
            timestep_sampling=args.timestep_sampling,
            discrete_flow_shift=args.discrete_flow_shift,
            sigmoid_scale=args.sigmoid_scale,
            weighting_scheme=args.weighting_scheme,
            logit_mean=args.logit_mean,
            logit_std=args.logit_std,
            mode_scale=args.mode_scale,
            min_timestep=0.0 if args.min_timestep is None else float(args.min_timestep),
            max_timestep=float(TIMESTEPS) if args.max_timestep is None else float(args.max_timestep),
            preserve_distribution_shape=args.preserve_distribution_shape,
        )
        for line in settings.without_effect():
            logger.warning(line)
        return settings

    def without_effect(self) -> list[str]:
        """A line for each setting that differs from its default and that the chosen sampler does not read."""
        sampler, scheme = self.timestep_sampling, self.weighting_scheme
        lines = []
        if self.discrete_flow_shift != 1.0 and sampler != "shift":
            lines.append(
                f"--discrete_flow_shift {self.discrete_flow_shift:g} has no effect with --timestep_sampling {sampler}; "
                "it belongs to --timestep_sampling shift."
            )
        if self.sigmoid_scale != 1.0 and sampler not in ("sigmoid", "shift"):
            lines.append(f"--sigmoid_scale {self.sigmoid_scale:g} has no effect with --timestep_sampling {sampler}.")
        normal = sampler == "logsnr" or (sampler == "sigma" and scheme == "logit_normal")
        if (self.logit_mean, self.logit_std) != (0.0, 1.0) and not normal:
            lines.append(
                "--logit_mean and --logit_std have no effect without --timestep_sampling logsnr, "
                "or sigma with --weighting_scheme logit_normal."
            )
        if self.mode_scale != 1.29 and not (sampler == "sigma" and scheme == "mode"):
            lines.append("--mode_scale has no effect without --timestep_sampling sigma and --weighting_scheme mode.")
        if self.preserve_distribution_shape and (self.min_timestep, self.max_timestep) == (0, TIMESTEPS):
            lines.append("--preserve_distribution_shape has no effect without --min_timestep or --max_timestep.")
        if scheme in ("logit_normal", "mode") and sampler != "sigma":
            lines.append(
                f"--weighting_scheme {scheme} has no effect with --timestep_sampling {sampler}: "
                "it is a density of --timestep_sampling sigma."
            )
        return lines


def timesteps_from_uniform(u: torch.Tensor, settings: TimestepSettings) -> torch.Tensor:
    """The sampler as a function of uniform numbers.

    Args:
        u: (B,), uniform in [0, 1).

    Returns:
        t (B,), float32, in [min_timestep, max_timestep] / 1000.
    """
    u = u.to(torch.float64)
    if settings.preserve_distribution_shape:
        whole, inside = _inside_range(settings)
        t = timesteps_from_uniform(_moved_into(u, inside), whole)
        return t.clamp(settings.min_timestep / TIMESTEPS, settings.max_timestep / TIMESTEPS)
    if settings.timestep_sampling == "sigma":
        return _sigma_table_timesteps(u, settings)
    if settings.timestep_sampling == "uniform":
        t = u
    elif settings.timestep_sampling == "logsnr":
        t = torch.sigmoid(-0.5 * (settings.logit_mean + settings.logit_std * torch.special.ndtri(1 - u)))
    else:
        t = torch.sigmoid(settings.sigmoid_scale * torch.special.ndtri(u))
        if settings.timestep_sampling == "shift":
            t = shift_sigmas(t, settings.discrete_flow_shift)
    low, high = settings.min_timestep / TIMESTEPS, settings.max_timestep / TIMESTEPS
    return (low + (high - low) * t).to(torch.float32)


@lru_cache
def _inside_range(settings: TimestepSettings) -> tuple[TimestepSettings, torch.Tensor]:
    """The settings without their range, and which of ``QUANTILES`` equal parts of [0, 1) lead into it, in the order of their t."""
    whole = replace(settings, min_timestep=0.0, max_timestep=float(TIMESTEPS), preserve_distribution_shape=False)
    t = timesteps_from_uniform((torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES, whole)
    order = t.argsort(stable=True)
    low, high = settings.min_timestep / TIMESTEPS, settings.max_timestep / TIMESTEPS
    return whole, order[(t[order] >= low) & (t[order] <= high)]


def _moved_into(u: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1) -> uniform numbers in those parts of it."""
    position = u * len(parts)
    part = position.floor().clamp(max=len(parts) - 1)
    return (parts[part.long().cpu()].to(u) + (position - part)) / QUANTILES


def _sigma_table_timesteps(u: torch.Tensor, settings: TimestepSettings) -> torch.Tensor:
    """Whole timesteps above ``min_timestep`` up to ``max_timestep``, over 1000."""
    if settings.weighting_scheme == "logit_normal":
        density = torch.sigmoid(settings.logit_mean + settings.logit_std * torch.special.ndtri(u))
    elif settings.weighting_scheme == "mode":
        density = 1 - u - settings.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    else:
        density = u
    # As in the schedule of the paper, small numbers are the noisy end.
    low, high = math.ceil(settings.min_timestep), math.floor(settings.max_timestep)
    index = (density * (high - low)).floor().clamp(0, high - low - 1)
    return ((high - index) / TIMESTEPS).to(torch.float32)


def loss_weights(t: torch.Tensor, weighting_scheme: str) -> torch.Tensor | None:
    """Weight of each sample's loss, (B,) float32, or None where all count alike.

    ``sigma_sqrt`` is sigma ** -2 and ``cosmap`` is 2 / (pi (1 - 2 sigma + 2 sigma^2)), sigma being t rounded to the table
    0.001, 0.002, ..., 1, which also keeps the first one finite.
    """
    if weighting_scheme not in ("sigma_sqrt", "cosmap"):
        return None
    sigma = (t.double() * TIMESTEPS).round().clamp(1, TIMESTEPS) / TIMESTEPS
    weights = sigma**-2 if weighting_scheme == "sigma_sqrt" else 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return weights.to(torch.float32)


def noisy_latents(latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """``(1 - t) * latents + t * noise`` with one t (B,) per sample; latents and noise (B, ...)."""
    t = t.to(latents.device, latents.dtype).view(-1, *[1] * (latents.dim() - 1))
    return (1 - t) * latents + t * noise


class TimestepSampler:
    """Draws timesteps from one generator; its state can be saved and restored.

    Args:
        buckets: this many draws after each other cover the distribution evenly: each comes from another of as many equally
            likely parts of it, in random order. None draws independently. An epoch that is long enough for that covers it
            evenly, too: see ``begin_epoch``.
    """

    def __init__(self, settings: TimestepSettings, generator: torch.Generator, buckets: int | None = None):
        self.settings = settings
        self.generator = generator
        self.buckets = buckets
        self._due = torch.empty(0, dtype=torch.int64)  # parts that were not drawn from yet
        self._drawn = 0  # in this epoch

    @classmethod
    def from_args(cls, args: argparse.Namespace, generator: torch.Generator) -> TimestepSampler:
        """As the training flags say; see ``TimestepSettings.from_args``."""
        return cls(TimestepSettings.from_args(args), generator, args.num_timestep_buckets)

    def begin_epoch(self) -> None:
        """Begin a cover anew, where an epoch has draws enough for one; else the covers go on through the epochs."""
        if self.buckets is not None and self._drawn >= self.buckets:
            self._due = self._due[:0]
        self._drawn = 0

    def draw(self, count: int) -> torch.Tensor:
        """t (count,), float32, on the generator's device."""
        u = torch.rand(count, generator=self.generator, device=self.generator.device, dtype=torch.float64)
        if self.buckets is not None:
            u = (self._next_parts(count).to(u) + u) / self.buckets
            self._drawn += count
        return timesteps_from_uniform(u, self.settings)

    def _next_parts(self, count: int) -> torch.Tensor:
        while len(self._due) < count:
            order = torch.randperm(self.buckets, generator=self.generator, device=self.generator.device).cpu()
            self._due = torch.cat([self._due, order])
        parts, self._due = self._due[:count], self._due[count:]
        return parts

    def state_dict(self) -> dict[str, torch.Tensor | int]:
        """What ``load_state_dict`` needs to go on with the same draws."""
        return {"generator": self.generator.get_state(), "due": self._due.clone(), "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, torch.Tensor | int]) -> None:
        self.generator.set_state(state["generator"])
        self._due, self._drawn = state["due"].clone(), state.get("drawn", 0)

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor | None:
        """Weights (B,) of the samples' losses, or None where all count alike."""
        return loss_weights(t, self.settings.weighting_scheme)
