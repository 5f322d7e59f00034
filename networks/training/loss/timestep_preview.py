"""What --show_timesteps shows: how often each timestep is drawn, and how much it weighs in the loss."""

from __future__ import annotations

import argparse
import os

import torch
from PIL import Image, ImageDraw

from hunyuan_model.sampling.flow import TIMESTEPS
from networks.training.loss.timestep_sampling import TimestepSettings, loss_weights, timesteps_from_uniform
from utils.files import atomic_path, require_writable_folder

SAMPLES = 100_000


def timestep_shares(settings: TimestepSettings, bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of draws, and share of the loss (draws times weight), in equal bins over the timesteps 0..1000.

    Computed at evenly spaced quantiles, so that nothing random is drawn.

    Returns:
        Two float64 tensors (bins,), each summing to 1.
    """
    u = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    t = timesteps_from_uniform(u, settings)
    weights = loss_weights(t, settings.weighting_scheme)
    weights = torch.ones_like(u) if weights is None else weights.double()
    # Whole timesteps stand on the edges of bins and belong to the lower one: 1000 is the last timestep, 0 is none.
    position = ((t.double() * TIMESTEPS - 1e-4).clamp(min=0) * bins / TIMESTEPS).long().clamp(max=bins - 1)
    draws = torch.zeros(bins, dtype=torch.float64).index_add_(0, position, torch.ones_like(u))
    loss = torch.zeros(bins, dtype=torch.float64).index_add_(0, position, weights)
    return draws / draws.sum(), loss / loss.sum()


def timestep_chart(settings: TimestepSettings, bins: int = 20, width: int = 60) -> str:
    """The distribution as lines of text: timestep range, share of draws, share of the loss, a bar for the draws."""
    draws, loss = timestep_shares(settings, bins)
    lines = [f"{'timesteps':>11}  draws   loss"]
    for index, (share, weight) in enumerate(zip(draws.tolist(), loss.tolist())):
        low, high = index * TIMESTEPS // bins, (index + 1) * TIMESTEPS // bins
        bar = "#" * round(width * share / draws.max().item())
        lines.append(f"{low:>5}-{high:<5} {share:6.1%} {weight:6.1%}  {bar}".rstrip())
    return "\n".join(lines)


def save_timestep_image(settings: TimestepSettings, path: str | os.PathLike[str], bins: int = 100) -> None:
    """Draw the distribution as a picture: draws as bars above, their share of the loss as bars below."""
    width, height, margin = 800, 220, 24
    image = Image.new("RGB", (width + 2 * margin, 2 * (height + margin) + margin), "white")
    draw = ImageDraw.Draw(image)
    titles = ("share of draws by timestep, 0 to 1000", "share of the loss by timestep, 0 to 1000")
    for row, (title, shares) in enumerate(zip(titles, timestep_shares(settings, bins))):
        top = margin + row * (height + margin)
        draw.text((margin, top - 14), f"{title} (highest bar: {shares.max().item():.2%})", fill="black")
        for index, share in enumerate((shares / shares.max()).tolist()):
            left, right = margin + index * width // bins, margin + (index + 1) * width // bins - 2
            bar = round((height - 4) * share)
            if bar:
                draw.rectangle((left, top + height - bar, right, top + height - 1), fill=(70, 110, 180))
        draw.line((margin, top + height, margin + width, top + height), fill="black")
    with atomic_path(path) as temporary:
        image.save(temporary)


def show_timesteps(args: argparse.Namespace) -> None:
    """Draw the distribution of timesteps in the terminal, or as a picture in --output_dir."""
    settings = TimestepSettings.from_args(args)
    if args.show_timesteps == "console":
        print(timestep_chart(settings))
    else:
        path = require_writable_folder(args.output_dir or ".", "--output_dir") / "timesteps.png"
        save_timestep_image(settings, path)
        print(path)
