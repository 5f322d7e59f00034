"""The flags of the samples while training."""

from __future__ import annotations

import argparse

import torch

from hunyuan_model.text.arguments import add_text_encoder_arguments, text_encoder_settings
from hunyuan_model.vae.arguments import add_vae_arguments, vae_settings
from networks.training.samples.sampling import SampleSettings
from utils.cli.arguments import positive_int
from utils.cli.settings import settings_from


def add_sample_arguments(group: argparse._ArgumentGroup) -> None:
    """--sample_*, and the flags of the VAE and of the text encoders."""
    group.add_argument(
        "--sample_prompts", metavar="FILE", help="prompts to sample while training: .txt, .toml or .json (default: no samples)"
    )
    group.add_argument("--sample_at_first", action="store_true", help="make samples before the first step (default: off)")
    group.add_argument(
        "--sample_every_n_steps", type=positive_int, metavar="N", help="make samples after every N steps (default: never)"
    )
    group.add_argument(
        "--sample_every_n_epochs", type=positive_int, metavar="N", help="make samples after every N epochs (default: never)"
    )
    add_vae_arguments(group, required=False)
    add_text_encoder_arguments(group, required=False, cache=True)


def sample_settings(args: argparse.Namespace, device: torch.device) -> SampleSettings:
    """As the flags of ``add_sample_arguments`` say."""
    given = {"vae_settings": vae_settings(args, device), "text_settings": text_encoder_settings(args, device)}
    return settings_from(SampleSettings, args, **given)
