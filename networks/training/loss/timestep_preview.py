"""What --show_timesteps shows: how often each timestep is sampled, and how much it weighs in the loss."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from hunyuan_model.sampling.flow import TIMESTEPS
from networks.training.loss.timestep_sampling import TimestepSettings, loss_weights, timesteps_from_uniform
from utils.errors import UserError
from utils.files import atomic_path, require_writable_folder
from utils.output import show

SAMPLES = 100_000


def show_timesteps(how: str, settings: TimestepSettings, folder: str | os.PathLike[str] | None) -> None:
    """Print the distribution (``console``), or save it as timesteps.png in ``folder`` (``image``)."""
    if how == "console":
        show(timestep_chart(settings))
    else:
        path = require_writable_folder(folder or ".", "--output_dir") / "timesteps.png"
        save_timestep_image(settings, path)
        show(path)


def timestep_shares(settings: TimestepSettings, bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares of the samples, and of the loss (samples times weight), in equal bins over the timesteps 0..1000: (bins,) each.

    Computed at evenly spaced quantiles: nothing is random.
    """
    u = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    t = timesteps_from_uniform(u, settings)
    weights = loss_weights(t, settings.weighting_scheme).double()
    # Whole timesteps stand on the edges of bins and belong to the lower one: 1000 is the last timestep, 0 is none.
    position = ((t.double() * TIMESTEPS - 1e-4).clamp(min=0) * bins / TIMESTEPS).long().clamp(max=bins - 1)
    samples = position.bincount(minlength=bins).double()
    loss = position.bincount(weights, minlength=bins)
    return samples / samples.sum(), loss / loss.sum()


def timestep_chart(settings: TimestepSettings, bins: int = 20, width: int = 60) -> str:
    """Lines of text: timestep range, share of samples, share of the loss, a bar for the samples."""
    samples, loss = timestep_shares(settings, bins)
    lines = [f"{'timesteps':>11} samples   loss"]
    for index, (share, weight) in enumerate(zip(samples.tolist(), loss.tolist())):
        low, high = index * TIMESTEPS // bins, (index + 1) * TIMESTEPS // bins
        bar = "#" * round(width * share / samples.max().item())
        lines.append(f"{low:>5}-{high:<5} {share:7.1%} {weight:6.1%}  {bar}".rstrip())
    return "\n".join(lines)


def save_timestep_image(settings: TimestepSettings, path: Path, bins: int = 100) -> None:
    """The distribution as a PNG: bars for the samples above, for their share of the loss below."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "--show_timesteps image needs matplotlib. Install it with: pip install matplotlib; or use --show_timesteps console."
        ) from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    for axes, shares, of in zip(figure.subplots(2, 1, sharex=True), timestep_shares(settings, bins), ("samples", "the loss")):
        axes.bar([index * TIMESTEPS / bins for index in range(bins)], shares.tolist(), width=TIMESTEPS / bins, align="edge")
        axes.set(ylabel=f"share of {of}", xlim=(0, TIMESTEPS))
    axes.set_xlabel("timestep")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
