"""What the network sees of a dataset: the latents of the cache, decoded by the VAE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dataset.cache.files import bucket_of, read_latents
from dataset.cache.freshness import judge_latents
from dataset.cache.names import CacheKey, CacheListing, list_caches, newest, newest_latents
from dataset.cache.preparation import Failure, Finished, Prepared, Result, Target
from dataset.cache.records import latents_made
from dataset.config import DatasetConfig
from dataset.items import Item
from dataset.media.frames import Window
from dataset.preview.facts import Concern, Note
from hunyuan_model.checkpoints.fingerprint import fingerprint_weights
from hunyuan_model.checkpoints.identify import Kind, open_checkpoint_of
from hunyuan_model.sampling.decoding import decoder_of
from hunyuan_model.sampling.flow import LATENT_CHANNELS
from hunyuan_model.vae.loading import load_vae
from hunyuan_model.vae.memory import VAESettings
from hunyuan_model.vae.model import AutoencoderKLCausal3D
from utils.errors import UserError, name_some


class CacheDecoder:
    """Puts pixels that are decoded from the cache in place of those that were prepared from the media.

    Attributes:
        notes: of each item, once its ``Finished`` or ``Failure`` is through, what is wrong with its cache.
    """

    def __init__(self, vae: AutoencoderKLCausal3D, settings: VAESettings, fingerprint: str, device: torch.device) -> None:
        self.notes: dict[Item, list[Note]] = {}
        self._decode, self._scale, self._fingerprint = decoder_of(vae, settings, device), vae.scaling_factor, fingerprint
        self._listings: dict[DatasetConfig, CacheListing] = {}

    @classmethod
    def load(cls, settings: VAESettings, device: torch.device) -> CacheDecoder:
        """With the VAE in the file of ``settings.vae``. Errors as in ``load_vae``."""
        vae = load_vae(settings.vae, device=device, dtype=settings.vae_dtype)
        return cls(vae, settings, fingerprint_weights(open_checkpoint_of(Kind.VAE, settings.vae, "--vae")), device)

    def decode(self, results: Iterable[Result]) -> Iterator[Result]:
        """``results`` of ``prepare``, with the pixels of the caches that training would read; without frames where there is none.

        Of a file of which nothing can be read, the caches come before its ``Failure``: the first one of each length.

        Raises:
            UserError: memory does not suffice.
        """
        faults: dict[CacheKey, str | None] = {}
        for result in results:
            if isinstance(result, Prepared):
                decoded, faults[result.target.key] = self._decoded(result.target)
                pixels = result.pixels[:0] if decoded is None else decoded
                yield replace(result, pixels=pixels)
                continue
            if isinstance(result, Failure) and not faults:
                yield from self._decoded_of(result.item)
            elif isinstance(result, Finished):
                faults |= {target.key: self._judged(target)[1] for target in result.targets if target.key not in faults}
            self.notes[result.item] = list(_notes(faults))
            faults = {}
            yield result

    def _caches(self, dataset: DatasetConfig) -> CacheListing:
        if dataset not in self._listings:
            self._listings[dataset] = list_caches(dataset)
        return self._listings[dataset]

    def _judged(self, target: Target) -> tuple[Path | None, str | None]:
        """The cache that training would read, and what is wrong with it."""
        listing = self._caches(target.item.dataset)
        if not (paths := listing.latents.get(target.key)):
            return None, "has no cache of its latents; run cache_latents.py."
        try:
            latents_made(newest(paths))
        except UserError as error:
            return None, f"has a cache that training cannot use: {error}"
        reason = judge_latents(listing, target, self._fingerprint, skip_existing=True).reason
        again = "has a cache that is not what would be made now ({}); run cache_latents.py again."
        return newest(paths), None if reason is None else again.format(reason)

    def _decoded(self, target: Target) -> tuple[np.ndarray | None, str | None]:
        """Frames (F, H, W, 3), and what is wrong with the cache."""
        path, fault = self._judged(target)
        if path is None:
            return None, fault
        try:
            latents = self._read(path)
        except UserError as error:
            return None, f"has a cache that training cannot use: {error}"
        return self._frames(latents), fault

    def _decoded_of(self, item: Item) -> Iterator[Prepared]:
        """From the caches alone."""
        first: dict[int, tuple[Window | None, Path]] = {}
        for (stem, window), path in newest_latents(self._caches(item.dataset)).items():
            if stem == item.stem:
                first.setdefault(window[1] if window else 1, (window, path))
        for window, path in first.values():
            try:
                latents = self._read(path)
            except UserError:  # what is said of the file itself suffices
                continue
            size = bucket_of(latents.shape)[:2]
            yield Prepared(Target(item, window, size, size), self._frames(latents), {})

    def _read(self, path: Path) -> torch.Tensor:
        latents = read_latents(path)
        if len(latents) != LATENT_CHANNELS:
            raise UserError(f"{path} holds latents of {len(latents)} channels, not {LATENT_CHANNELS}.")
        return latents

    def _frames(self, latents: torch.Tensor) -> np.ndarray:
        return self._decode(latents[None].float() * self._scale)[0].numpy()


def _notes(faults: Mapping[CacheKey, str | None]) -> Iterator[Note]:
    """One for all windows that have the same fault."""
    windows: dict[str, list[Window | None]] = {}
    for (_, window), fault in faults.items():
        if fault is not None:
            windows.setdefault(fault, []).append(window)
    for fault, those in windows.items():
        yield Note(Concern.CACHE, f"{_subject(those)} {fault}")


def _subject(windows: Sequence[Window | None]) -> str:
    if windows[0] is None:
        return "This picture"
    frames = name_some(f"{start} to {start + length - 1}" if length > 1 else str(start) for start, length in sorted(windows))
    return f"{'The clip' if len(windows) == 1 else 'Each of the clips'} of frames {frames}"
