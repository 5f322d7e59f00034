"""The flags with which the caching scripts read a dataset."""

from __future__ import annotations

import argparse
import os

from utils.cli.arguments import positive_int


def add_dataset_arguments(group: argparse._ArgumentGroup, *, batch_size: str, num_workers: str, skip_existing: str) -> None:
    """--dataset_config and how a caching script goes through it. Args: help texts of that script."""
    group.add_argument("--dataset_config", metavar="TOML", required=True, help="dataset description, see dataset/dataset_config.md")
    group.add_argument("--batch_size", type=positive_int, metavar="N", help=batch_size)
    workers = max(1, (os.cpu_count() or 2) - 1)
    group.add_argument(
        "--num_workers", type=positive_int, default=workers, metavar="N", help=f"{num_workers} (default: CPU cores - 1)"
    )
    group.add_argument("--skip_existing", action="store_true", help=skip_existing)
    group.add_argument(
        "--missing_caption",
        choices=("error", "skip", "empty"),
        default="error",
        help="what to do with items that have no caption: stop, leave them out, or give them an empty one; "
        "the same for both caching scripts (default: error)",
    )
    group.add_argument(
        "--remove_orphans",
        action="store_true",
        help="delete the orphans, cache files that belong to no item any more: latents or text encoder outputs, whichever this "
        "script makes (default: list them)",
    )
