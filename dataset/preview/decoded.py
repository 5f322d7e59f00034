"""What the network sees of a dataset: the latents of the cache, decoded by the VAE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from dataset.cache.files import bucket_of, read_latents
from dataset.cache.freshness import judge_latents
from dataset.cache.names import CacheListing, list_caches, newest
from dataset.cache.preparation import Prepared, Result, Target
from dataset.cache.records import latents_made
from dataset.config import DatasetConfig
from dataset.items import Item
from dataset.preview.facts import Concern, Note
from hunyuan_model.checkpoints.fingerprint import fingerprint_weights
from hunyuan_model.checkpoints.identify import Kind, open_checkpoint_of
from hunyuan_model.sampling.decoding import decoder_of
from hunyuan_model.vae.loading import load_vae
from hunyuan_model.vae.memory import VAESettings
from hunyuan_model.vae.model import AutoencoderKLCausal3D
from utils.errors import UserError, name_some
from utils.processes.watchdog import Watchdog


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

    def decode(self, results: Iterable[Result], watchdog: Watchdog) -> Iterator[Result]:
        """``results`` of ``prepare``, with the pixels of the cache that training would read; those without a cache are left out.

        Raises a UserError where memory does not suffice.
        """
        faults: dict[str, list[Target]] = {}
        for result in results:
            if isinstance(result, Prepared):
                with watchdog.during("decoding", result.target.label.__str__):
                    decoded, fault = self._decoded(result)
                if decoded is not None:
                    yield decoded
                if fault is not None:
                    faults.setdefault(fault, []).append(result.target)
            else:
                self.notes[result.item] = [Note(Concern.CACHE, _sentence(fault, targets)) for fault, targets in faults.items()]
                faults = {}
                yield result

    def _decoded(self, prepared: Prepared) -> tuple[Prepared | None, str | None]:
        """What the cache holds, if that can be shown, and what is wrong with it."""
        target = prepared.target
        dataset = target.item.dataset
        if dataset not in self._listings:
            self._listings[dataset] = list_caches(dataset)
        listing = self._listings[dataset]
        paths = listing.latents.get(target.key)
        if not paths:
            return None, "has no cache of its latents; run cache_latents.py."
        path = newest(paths)
        try:
            latents_made(path)
            latents = read_latents(path)
        except UserError as error:
            return None, f"has a cache that training cannot use: {error}"
        reason = judge_latents(listing, target, self._fingerprint, skip_existing=True).reason
        pixels = self._decode(latents[None].float() * self._scale)[0].numpy()
        fault = (
            None if reason is None else f"has a cache that is not what would be made now ({reason}); run cache_latents.py again."
        )
        return replace(prepared, target=replace(target, bucket=bucket_of(latents.shape)[:2]), pixels=pixels), fault


def _sentence(fault: str, targets: Sequence[Target]) -> str:
    windows = [f"{target.window[0]} to {target.window[0] + target.window[1] - 1}" for target in targets if target.window]
    return f"{f'The clip of frames {name_some(windows)}' if windows else 'This picture'} {fault}"
