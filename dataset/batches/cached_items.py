"""What a training can train on: the cache files of each dataset, paired. The media need not be there any more."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.cache.files import LatentShape, read_latent_header, read_text_header
from dataset.cache.names import list_caches, newest_latents
from dataset.config import DatasetConfig, DatasetGroup
from dataset.media.frames import Window
from utils.errors import UserError, name_some

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedItem:
    """One picture or one window of a clip, ready for training; ``shape`` is that of the latents in the file."""

    stem: str
    window: Window | None
    latents_path: Path
    text_path: Path
    shape: LatentShape
    prior_preservation: bool = False


@dataclass(frozen=True)
class CachedGroup:
    """The cached items of one dataset, sorted by name."""

    dataset: DatasetConfig
    items: tuple[CachedItem, ...]

    def by_shape(self) -> dict[LatentShape, list[int]]:
        """Positions in ``items`` by latent shape, repeated ``num_repeats`` times."""
        positions: dict[LatentShape, list[int]] = {}
        for index, item in enumerate(self.items):
            positions.setdefault(item.shape, []).extend([index] * self.dataset.num_repeats)
        return dict(sorted(positions.items()))


def find_cached_items(group: DatasetGroup) -> list[CachedGroup]:
    """Pair the latents of every dataset with the text encoder outputs, from the files in the cache directories.

    Raises a UserError where a dataset has no latents, or latents without text encoder outputs (the script to run is named), or a
    cache file is unreadable or of another model; or all datasets are for prior preservation.
    """
    if all(dataset.prior_preservation for dataset in group.datasets):
        raise UserError(
            f"{group.path}: every dataset has prior_preservation = true, so there is nothing to learn; remove it from those "
            "with the new concept."
        )
    return [_pair_caches(dataset, group.path) for dataset in group.datasets]


def _pair_caches(dataset: DatasetConfig, toml: Path) -> CachedGroup:
    listing = list_caches(dataset)
    where = f"{dataset.label} of {toml} (cache_directory {dataset.cache_directory})"
    if not listing.latents:
        short = f", for example as clips are shorter than target_frames ({min(dataset.target_frames)})"
        raise UserError(
            f"{where} has no latents of {dataset.kind}s; run: python cache_latents.py --dataset_config {toml} --vae ... "
            "If it has been run, the table at its end shows why nothing was cached"
            f"{short if dataset.kind == 'video' else ''}; mend that, or take the dataset out."
        )
    if without_text := sorted({stem for stem, _ in listing.latents if stem not in listing.texts}):
        raise UserError(
            f"{where} has latents without text encoder outputs for {len(without_text)} item(s): {name_some(without_text)}; run: "
            f"python cache_text_encoder_outputs.py --dataset_config {toml} --text_encoder1 ... --text_encoder2 ..., "
            "or cache_latents.py with --skip_existing --remove_orphans, which deletes the latents of items that are gone, "
            "and with --missing_caption skip of items that have no caption."
        )
    items = []
    for (stem, window), path in newest_latents(listing).items():
        if others := [other.name for other in listing.latents[stem, window] if other != path]:
            message = "%s is used because it is the newest; cache_latents.py --skip_existing --remove_orphans deletes %s."
            logger.warning(message, path, name_some(others))
        shape, _ = read_latent_header(path)
        items.append(CachedItem(stem, window, path, listing.texts[stem], shape, dataset.prior_preservation))
    return CachedGroup(dataset, tuple(items))


def hold_out(groups: Sequence[CachedGroup], share: float, seed: int) -> tuple[list[CachedGroup], list[CachedItem]]:
    """Divide the items into those for training and those for validation.

    All windows of a clip stay on one side. Nothing is held out of datasets for prior preservation. Of each other dataset with at
    least two pictures or clips about ``share`` of them are held out, one at least; which ones depends on the seed alone.
    Raises a UserError where no dataset has two.
    """
    kept, held_out = [], []
    for number, group in enumerate(groups):
        stems = sorted({item.stem for item in group.items if not item.prior_preservation})
        count = min(max(0, len(stems) - 1), max(1, round(share * len(stems))))
        chosen = set(random.Random(f"{seed}:validation:{number}").sample(stems, count))
        kept.append(CachedGroup(group.dataset, tuple(item for item in group.items if item.stem not in chosen)))
        held_out += [item for item in group.items if item.stem in chosen]
    if not held_out:
        raise UserError(
            "--validation_split holds items out of training, but every dataset without prior_preservation has only one; "
            "leave it out, or add some."
        )
    return kept, held_out


def require_model_sizes(groups: Sequence[CachedGroup], channels: int, text_width: int, pooled_width: int) -> None:
    """Refuse caches that another VAE or other text encoders made than those of the model that is to be trained.

    Reads the headers of the text caches. The UserError names the first file that does not fit, and the script that makes it again.
    """
    items = [item for group in groups for item in group.items]
    for item in items:
        if item.shape[0] != channels:
            raise UserError(
                f"{item.latents_path} holds latents of {item.shape[0]} channels, but the model takes {channels}. It was made with "
                "another VAE: delete it and run cache_latents.py again."
            )
    for path in dict.fromkeys(item.text_path for item in items):
        widths, _ = read_text_header(path)
        if widths != (text_width, pooled_width):
            raise UserError(
                f"{path} holds text states of widths {widths[0]} and {widths[1]}, but the model takes {text_width} and "
                f"{pooled_width}. It was made with other text encoders: delete it and run cache_text_encoder_outputs.py again."
            )
