"""From prepared pixels to saved latents: batches of one size, the VAE, and a sample that depends on the item alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch

from dataset.cache.files import NonFiniteError, save_latents
from dataset.cache.preparation import Failure, Finished, Prepared, Result, Target
from dataset.cache.records import VAE
from hunyuan_model.checkpoints.fingerprint import fingerprint_weights
from hunyuan_model.checkpoints.identify import Kind, open_checkpoint_of
from hunyuan_model.sampling.encoding import pixels_to_input
from hunyuan_model.vae.loading import load_vae
from hunyuan_model.vae.memory import Clip, VAEFit, VAESettings
from hunyuan_model.vae.model import AutoencoderKLCausal3D, DiagonalGaussian
from utils.devices import explain_out_of_memory

WAITING_BYTES = 512 * 2**20  # of pixels that wait for others of their size; with many buckets they would fill the memory


def collect_batches(results: Iterable[Result], batch_size: int) -> Iterator[list[Prepared] | Finished | Failure]:
    """Gather what can be encoded together, of one bucket and number of frames; other results pass through.

    Batches are not full at the end, and where more than ``WAITING_BYTES`` wait: then the fullest goes first.
    """
    waiting: dict[tuple[tuple[int, int], int], list[Prepared]] = {}

    def size(key: tuple[tuple[int, int], int]) -> int:
        return sum(prepared.pixels.nbytes for prepared in waiting[key])

    for result in results:
        if not isinstance(result, Prepared):
            yield result
            continue
        key = (result.target.bucket, result.target.frames)
        waiting.setdefault(key, []).append(result)
        if len(waiting[key]) == batch_size:
            yield waiting.pop(key)
        while sum(map(size, waiting)) > WAITING_BYTES:
            yield waiting.pop(max(waiting, key=lambda key: (len(waiting[key]), size(key))))
    yield from waiting.values()


class LatentEncoder:
    """A VAE that makes cache files. ``fingerprint``: of its weights, for the records."""

    def __init__(self, vae: AutoencoderKLCausal3D, settings: VAESettings, fingerprint: str) -> None:
        self.vae, self.settings, self.fingerprint = vae, settings, fingerprint
        self.fit = VAEFit(vae, settings, encode=True)

    @classmethod
    def load(cls, settings: VAESettings, device: torch.device) -> LatentEncoder:
        """From the file of ``settings.vae``. Errors as in ``load_vae``."""
        vae = load_vae(settings.vae, device=device, dtype=settings.vae_dtype)
        return cls(vae, settings, fingerprint_weights(open_checkpoint_of(Kind.VAE, settings.vae, "--vae")))

    def encode(self, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        """One sample of the posterior for each, (16, F, H, W). It depends on the item and its cache name, not on the batch or run.

        A batch that would need chunks or tiles goes item by item before.
        """
        frames, height, width = batch[0].pixels.shape[:3]
        clip = Clip(len(batch), frames, height, width)
        if len(batch) > 1 and self.fit.must_split(clip):
            return [sample for prepared in batch for sample in self.encode([prepared])]
        self.fit.fit(clip)
        weight = next(self.vae.parameters())
        lighter = " and ".join(filter(None, (self.settings.lighter_flags, "--batch_size 1" if len(batch) > 1 else "")))
        advice = f"use {lighter or 'a smaller resolution or fewer target_frames'}"
        with explain_out_of_memory(f"encoding {len(batch)} x {frames} frame(s) of {width}x{height}", advice, weight.device):
            x = torch.stack([pixels_to_input(prepared.pixels, weight.device, weight.dtype) for prepared in batch])
            with torch.inference_mode():
                posterior = self.vae.encode(x)
        samples = []
        for prepared, mean, logvar in zip(batch, posterior.mean, posterior.logvar):
            digest = hashlib.sha256(prepared.target.cache_path.name.encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
            samples.append(DiagonalGaussian(mean, logvar).sample(generator))
        return samples

    def save(self, batch: Sequence[Prepared]) -> Iterator[Target | Failure]:
        """Encode and save; yields each target that is cached, and a failure for latents that are not finite."""
        for prepared, latents in zip(batch, self.encode(batch)):
            target = prepared.target
            record = {**prepared.source, **target.record, VAE: self.fingerprint}
            try:
                save_latents(target.cache_path, latents, target.original_size, target.window and target.frames, record)
            except NonFiniteError as error:
                yield Failure(target.item, f"{target.label}: {error}")
            else:
                yield target
