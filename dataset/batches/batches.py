"""From cache files to training batches: which caches belong together, in which order, and how they are stacked.

The media need not be there any more. A batch holds items of one dataset whose latents have one shape, and that shape is
the one in the cache file: nothing here computes a bucket.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TypedDict

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from dataset.cache.files import CachedItem, LatentShape, read_latent_shape, read_latents, read_text, read_text_widths
from dataset.cache.names import list_caches, newest_latents
from dataset.config import DatasetConfig, DatasetGroup
from utils.errors import UserError, name_some

logger = logging.getLogger(__name__)


class Batch(TypedDict):
    """What the training loop gets.

    latents (B, C, F, H, W) as stored, not multiplied by the scaling factor; text_states (B, L, D), L the longest caption in
    the batch (at least 1), rows beyond a caption are zero; text_mask (B, L) int64, the ones come first; text_states_2 (B, D2);
    names: the items, for messages. prior_preservation: the target is the model's own prediction, not the latents.
    """

    latents: torch.Tensor
    text_states: torch.Tensor
    text_mask: torch.Tensor
    text_states_2: torch.Tensor
    names: list[str]
    prior_preservation: bool


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

    Raises:
        UserError: a dataset has no latents, or latents without text encoder outputs (the script to run is named), or a
            cache file is unreadable or of another model; or all datasets are for prior preservation.
    """
    if all(dataset.prior_preservation for dataset in group.datasets):
        raise UserError(
            f"{group.path}: every data set has prior_preservation = true, so there is nothing to learn; remove it from those "
            "with the new concept."
        )
    return [_pair_caches(dataset, group.path) for dataset in group.datasets]


def _pair_caches(dataset: DatasetConfig, toml: Path) -> CachedGroup:
    listing = list_caches(dataset)
    where = f"{dataset.label} of {toml} (cache_directory {dataset.cache_directory})"
    if not listing.latents:
        reason, remedy = "", "mend that"
        if dataset.kind == "video" and dataset.frame_extraction != "full":
            shortest = min(dataset.target_frames)
            reason, remedy = f": for example, clips shorter than target_frames ({shortest})", "lower target_frames"
        raise UserError(
            f"{where} has no latents of {dataset.kind}s; run: python cache_latents.py --dataset_config {toml} --vae ... "
            f"If it has been run, the table at its end shows why nothing was cached{reason}; "
            f"then {remedy} or take the data set out."
        )
    without_text = sorted({stem for stem, _ in listing.latents if stem not in listing.texts})
    if without_text:
        raise UserError(
            f"{where} has latents without text encoder outputs for {len(without_text)} item(s): {name_some(without_text)}; run: "
            f"python cache_text_encoder_outputs.py --dataset_config {toml} --text_encoder1 ... --text_encoder2 ..., "
            "or cache_latents.py with --skip_existing --remove_orphans, which deletes the latents of items that are gone."
        )
    chosen = newest_latents(listing)
    for key, path in chosen.items():
        if others := [other.name for other in listing.latents[key] if other != path]:
            logger.warning(
                "%s is used because it is the newest; cache_latents.py --skip_existing --remove_orphans deletes %s.",
                path,
                name_some(others),
            )
    items = (
        CachedItem(stem, window, path, listing.texts[stem], read_latent_shape(path), dataset.prior_preservation)
        for (stem, window), path in chosen.items()
    )
    return CachedGroup(dataset, tuple(items))


def hold_out(groups: Sequence[CachedGroup], share: float, seed: int) -> tuple[list[CachedGroup], list[CachedItem]]:
    """Divide the items into those for training and those for validation.

    All windows of a clip stay on one side. Nothing is held out of data sets for prior preservation.
    Of each other data set with at least two pictures or clips about ``share`` of them are
    held out, one at least; which ones depends on the seed alone.

    Raises:
        UserError: no data set has two.
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
            "--validation_split holds items out of training, but every data set without prior_preservation has only one; "
            "leave it out, or add some."
        )
    return kept, held_out


def require_model_sizes(groups: Sequence[CachedGroup], channels: int, text_width: int, pooled_width: int) -> None:
    """Refuse caches that another VAE or other text encoders made than those of the model that is to be trained.

    Args:
        channels, text_width, pooled_width: what the transformer takes. Reads the headers of the text caches.

    Raises:
        UserError: names the first file that does not fit, and the script that makes it anew.
    """
    for path, shape in {item.latents_path: item.shape for group in groups for item in group.items}.items():
        if shape[0] != channels:
            raise UserError(
                f"{path} holds latents of {shape[0]} channels, but the model takes {channels}. It was made with another VAE: "
                "delete it and run cache_latents.py again."
            )
    for path in dict.fromkeys(item.text_path for group in groups for item in group.items):
        widths = read_text_widths(path)
        if widths != (text_width, pooled_width):
            raise UserError(
                f"{path} holds text states of widths {widths[0]} and {widths[1]}, but the model takes {text_width} and "
                f"{pooled_width}. It was made with other text encoders: delete it and run cache_text_encoder_outputs.py again."
            )


@dataclass(frozen=True)
class Sample:
    """One item as read from its caches. ``text``: (valid rows, D)."""

    latents: torch.Tensor
    text: torch.Tensor
    pooled: torch.Tensor
    name: str
    prior_preservation: bool = False


class CachedDataset(Dataset):
    """Map-style dataset over the items of all groups, one after the other; files are memory-mapped when an item is read.

    ``dataset[i]`` raises a UserError that names the file when a cache is missing, damaged or holds NaN; in a loader's worker
    the message reaches the training process.
    """

    def __init__(self, groups: Sequence[CachedGroup]) -> None:
        self.items = [item for group in groups for item in group.items]

    @classmethod
    def of_items(cls, items: Sequence[CachedItem]) -> CachedDataset:
        """Over items from anywhere."""
        data = cls(())
        data.items = list(items)
        return data

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        item = self.items[index]
        latents = read_latents(item.latents_path)
        if tuple(latents.shape) != item.shape:
            raise UserError(
                f"{item.latents_path} changed from {item.shape} to {tuple(latents.shape)} since the start; start again."
            )
        text = read_text(item.text_path)
        return Sample(latents, text.llm[text.llm_mask.bool()], text.clip, item.latents_path.name, item.prior_preservation)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples whose latents have one shape; text is padded with zeros to the longest caption among them."""
    lengths = torch.tensor([len(sample.text) for sample in samples])
    longest = max(1, int(lengths.max()))
    text = pad_sequence([sample.text for sample in samples], batch_first=True)
    if text.shape[1] < longest:  # every caption is empty
        text = text.new_zeros(len(samples), longest, text.shape[2])
    return Batch(
        latents=torch.stack([sample.latents for sample in samples]),
        text_states=text,
        text_mask=(torch.arange(longest) < lengths[:, None]).to(torch.int64),
        text_states_2=torch.stack([sample.pooled for sample in samples]),
        names=[sample.name for sample in samples],
        prior_preservation=all(sample.prior_preservation for sample in samples),
    )


class ShapeBatchSampler(Sampler[list[int]]):
    """Batches of indices into a ``CachedDataset`` over the same groups; each batch has one dataset and one shape.

    The order of an epoch depends on the seed and the number of the epoch only, so any position in it can be found again.
    A last batch that is not full is kept. With several ranks every rank gets the same number of batches: where they do not
    divide evenly, the first ones of the epoch are used again at its end.

    Args:
        groups: what ``find_cached_items`` returned.
        seed: of the order.
        rank, world_size: this process and how many there are.
    """

    def __init__(self, groups: Sequence[CachedGroup], seed: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size}")
        self.seed, self.rank, self.world_size = seed, rank, world_size
        offsets = accumulate((len(group.items) for group in groups), initial=0)
        self.pools = [
            ([offset + position for position in positions], group.dataset.batch_size)
            for offset, group in zip(offsets, groups)
            for positions in group.by_shape().values()
        ]
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        """Batches of a whole epoch on each rank, also after ``skip``."""
        batches = sum(-(-len(pool) // size) for pool, size in self.pools)
        return -(-batches // self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through, from its first batch."""
        self.epoch, self.start = epoch, 0

    def skip(self, batches: int) -> None:
        """Let iterations of this epoch begin after that many of this rank's batches."""
        if not 0 <= batches <= len(self):
            raise ValueError(f"cannot skip {batches} of {len(self)} batches")
        self.start = batches

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._epoch_batches()
        # The epoch comes round again when there are fewer batches than ranks ask for.
        mine = (batches[position % len(batches)] for position in range(self.rank, len(self) * self.world_size, self.world_size))
        for number, batch in enumerate(mine):
            if number >= self.start:
                yield batch

    def _epoch_batches(self) -> list[list[int]]:
        # A generator seeded with text is the same on every platform and Python version.
        order = random.Random(f"{self.seed}:{self.epoch}")
        batches = []
        for pool, size in self.pools:
            shuffled = order.sample(pool, len(pool))
            batches += [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
        order.shuffle(batches)
        return batches
