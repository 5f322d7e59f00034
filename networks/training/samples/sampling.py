"""Samples while training: when they are due, their prompts, and how they are made. The training stays as it is."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

import hunyuan_model
from hunyuan_model.runtime.device_split import devices_of
from hunyuan_model.sampling.decoding import load_decoder
from hunyuan_model.sampling.generation import generate_latents
from hunyuan_model.sampling.prompts import shortened
from hunyuan_model.text.arguments import TextEncoderSettings
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.vae.loading import check_vae_file
from hunyuan_model.vae.memory import VAESettings
from networks.generation.requests import Request
from networks.training.pause import kept_random_state, paused_training
from networks.training.samples.prompts import read_sample_prompts
from utils.cli.arguments import MAX_SEED
from utils.devices import explain_out_of_memory, free_memory
from utils.errors import UserError, first_line
from utils.files import MAX_NAME_BYTES, require_writable_folder
from utils.media.writing import save_picture, save_video, unused_stem
from utils.processes.ranks import split_by_cost
from utils.progress import ProgressBar

if TYPE_CHECKING:
    from hunyuan_model.text.conditions import TextConditions

logger = logging.getLogger(__name__)

FOLDER = "sample"  # in --output_dir
FPS = 24  # what the model knows
SCHEDULE_FLAGS = ("sample_at_first", "sample_every_n_steps", "sample_every_n_epochs")


@dataclass(frozen=True)
class SampleSettings:
    """The flags of the samples."""

    vae_settings: VAESettings
    text_settings: TextEncoderSettings
    output_dir: str
    output_name: str
    sample_prompts: str | None = None
    sample_at_first: bool = False
    sample_every_n_steps: int | None = None
    sample_every_n_epochs: int | None = None
    no_metadata: bool = False

    def __post_init__(self) -> None:
        if self.sample_prompts is None:
            if self.scheduled:
                raise UserError(f"--{self.scheduled[0]} needs --sample_prompts, a file with the prompts to sample.")
            return
        encoders = self.text_settings
        paths = {"vae": self.vae_settings.vae, "text_encoder1": encoders.text_encoder1, "text_encoder2": encoders.text_encoder2}
        if missing := [f"--{name}" for name, path in paths.items() if path is None]:
            raise UserError(f"--sample_prompts needs {', '.join(missing)}, or leave it out.")

    @property
    def scheduled(self) -> list[str]:
        """The flags that say when samples are made."""
        return [name for name in SCHEDULE_FLAGS if getattr(self, name)]

    @property
    def folder(self) -> Path:
        """Where samples go."""
        return Path(self.output_dir) / FOLDER

    def without_effect(self) -> list[str]:
        """A sentence on prompts that nothing asks for."""
        if self.sample_prompts is None or self.scheduled:
            return []
        return [f"--sample_prompts has no effect without {' or '.join(f'--{name}' for name in SCHEDULE_FLAGS)}."]

    def due(self, step: int, epoch: int, epoch_ended: bool = False) -> str | None:
        """The epoch or step for the names of the samples to make after ``step`` optimizer steps; None for no samples.

        Args:
            step: 0 is the beginning of a training that is not resumed.
            epoch: the current epoch, from 1.
            epoch_ended: whether ``step`` was its last.
        """
        if self.sample_prompts is None:
            return None
        if step == 0:
            return f"{step:06d}" if self.sample_at_first else None
        if epoch_ended and self.sample_every_n_epochs is not None and epoch % self.sample_every_n_epochs == 0:
            return f"e{epoch:06d}"
        return f"{step:06d}" if self.sample_every_n_steps is not None and step % self.sample_every_n_steps == 0 else None


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt, its place in its file from 0, and its texts as the transformer takes them, on the CPU."""

    index: int
    prompt: Request
    text: TextConditions
    negative: TextConditions | None

    def __str__(self) -> str:
        return f"{self.index:02d} ({self.prompt.where}: {shortened(self.prompt.prompt)})"


@dataclass(frozen=True)
class SavedSample:
    """A sample on disk: a PNG where it has one frame, an MP4 where it has more."""

    path: Path
    index: int
    prompt: Request


def check_samples(settings: SampleSettings) -> list[Request]:
    """The prompts to sample, none where nothing asks for them. Reads the headers of the VAE and the text encoders.

    Raises:
        UserError: a file that is missing or not what its flag expects, or a prompt that cannot be sampled.
    """
    if settings.sample_prompts is None:
        return []
    prompts = read_sample_prompts(settings.sample_prompts)
    check_vae_file(settings.vae_settings.vae)
    hunyuan_model.check_text_encoder_files(settings.text_settings.text_encoder1, settings.text_settings.text_encoder2)
    longest = _stem(settings.output_name, f"e{0:06d}", len(prompts) - 1, MAX_SEED)
    if len(os.fsencode(longest)) + len(".png") > MAX_NAME_BYTES:
        raise UserError(f"--output_name is too long for the names of samples, which have at most {MAX_NAME_BYTES} bytes.")
    require_writable_folder(settings.folder, f"the folder {FOLDER} of --output_dir,")
    return prompts if settings.scheduled else []


def prepare_samples(
    settings: SampleSettings,
    prompts: Sequence[Request],
    accelerator: Accelerator,
    config: TransformerConfig,
    seed: int,
    *,
    together: bool = False,
) -> TrainingSamples:
    """Encode the prompts on the main process, before the transformer is loaded; the text encoders are gone afterwards.

    Each process gets a share of them, of about the same cost.

    Every process calls this. Random state stays as it is.

    Args:
        prompts: from ``check_samples``.
        config: of the transformer.
        seed: of the training; a prompt without a seed gets this one plus its place in the file.
        together: all processes sample, as where they share sharded weights.

    Raises:
        UserError: as the loading of text encoders; or they do not belong to the transformer, or memory does not suffice.
    """
    encoded: list[EncodedPrompt] = []
    if prompts and accelerator.is_main_process:
        device = accelerator.device
        with kept_random_state(device), explain_out_of_memory("encoding the sample prompts", "use --fp8_llm"):
            texts = list(dict.fromkeys(text for prompt in prompts for text in prompt.texts))
            conditions = dict(zip(texts, hunyuan_model.encode_prompts(texts, settings.text_settings, device)))
        first = conditions[texts[0]]
        for number, given, width in ((1, first.states, config.text_dim), (2, first.pooled, config.pooled_dim)):
            if given.shape[-1] != width:
                raise UserError(
                    f"--text_encoder{number} gives vectors of {given.shape[-1]} numbers, the transformer in --dit takes {width}: "
                    "they do not belong together."
                )
        for index, prompt in enumerate(prompts):
            seeded = prompt if prompt.seed_given else prompt.changed({"seed": (seed + index) % (MAX_SEED + 1)})
            text, *negative = (conditions[text] for text in prompt.texts)
            encoded.append(EncodedPrompt(index, seeded, text, negative[0] if negative else None))
    if prompts and accelerator.num_processes > 1:
        encoded = broadcast_object_list([encoded])[0]
        if not together:
            costs = [math.prod(entry.prompt.sampling.latent_size) * _steps(entry) for entry in encoded]
            own = split_by_cost(costs, accelerator.num_processes)[accelerator.process_index]
            encoded = [encoded[index] for index in own]
    return TrainingSamples(settings, accelerator, encoded, together)


def _steps(entry: EncodedPrompt) -> int:
    """Forward passes of a sample."""
    return entry.prompt.sampling.infer_steps * (1 if entry.negative is None else 2)


@dataclass
class TrainingSamples:
    """The encoded prompts of this process, and the step they were sampled at last."""

    settings: SampleSettings
    accelerator: Accelerator
    prompts: Sequence[EncodedPrompt]
    together: bool = False
    sampled_at: int | None = None

    def sample_if_due(
        self,
        transformer: nn.Module,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype,
        *,
        step: int,
        epoch: int,
        epoch_ended: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[SavedSample]:
        """Sample every prompt if ``SampleSettings.due`` and not done at this step already.

        Every process calls this at the same steps; each makes its own samples, or all make all of them together.

        Args:
            dtype: what the transformer computes in while training.
            stop: asked between sampling steps; once it is True the rest is given up, as training is to end.

        Returns:
            What was written, by all processes. What failed is missing here, and was logged as a warning.
        """
        name = self.settings.due(step, epoch, epoch_ended)
        if name is None or step == self.sampled_at:
            return []
        self.sampled_at = step
        sample_round = SampleRound(self.settings, self.accelerator, transformer, dtype, name, step, stop, self.together)
        with paused_training(transformer, network, optimizer, self.accelerator.device):
            saved = sample_round.run(self.prompts)
        if self.accelerator.num_processes == 1:
            return saved
        rounds = gather_object([(saved, sample_round.failures)])
        for others, failures in rounds[1:]:  # which only the main process says
            for sample in others:
                logger.info("saved %s", sample.path)
            for failure in failures if not self.together else ():
                logger.warning("%s", failure)
        return sorted((sample for others, _ in rounds for sample in others), key=lambda sample: sample.index)


class _Stopped(Exception):
    """Training is to end: the rest of the round is given up."""


class _NotFinite(UserError):
    """A sample that holds NaN or infinity."""


@dataclass(frozen=True)
class SampleRound:
    """One round of samples. A prompt that fails, for want of memory or disk space say, is a warning and is left out.

    Attributes:
        transformer: with the network as it is now.
        dtype: what the transformer computes in.
        name: the epoch or step in the names of files.
        step: optimizer steps done, for the metadata.
        stop: once it is True the round is given up.
        together: all processes make this round; the main one writes the samples.
        failures: the warnings of this process.
    """

    settings: SampleSettings
    accelerator: Accelerator
    transformer: nn.Module
    dtype: torch.dtype
    name: str
    step: int
    stop: Callable[[], bool]
    together: bool = False
    failures: list[str] = field(default_factory=list)

    def run(self, prompts: Sequence[EncodedPrompt]) -> list[SavedSample]:
        """First the latents of all prompts; then the VAE is loaded, decodes them and goes. Call it under ``paused_training``."""
        started = time.monotonic()
        sampled: list[tuple[EncodedPrompt, Tensor]] = []
        saved: list[SavedSample] = []
        steps = sum(entry.prompt.sampling.infer_steps for entry in prompts)
        try:
            shown = self.accelerator.is_main_process
            with ProgressBar(total=steps, desc="samples", unit="step", leave=False, disable=not shown) as progress:
                for entry in prompts:
                    with self._training_goes_on(f"sample {entry} was not made", self.together):
                        sampled.append((entry, self._sample(entry, progress)))
            if sampled and (self.accelerator.is_main_process or not self.together):
                with self._training_goes_on("no sample was written, as --vae failed"):
                    self._decode_all(sampled, saved)
        except _Stopped:
            logger.info("the rest of the samples is given up: training is to end.")
        free_memory(self.accelerator.device)
        logger.info("%d of %d samples in %.1f s", len(saved), len(prompts), time.monotonic() - started)
        return saved

    def _sample(self, entry: EncodedPrompt, progress: ProgressBar) -> Tensor:
        """Latents (1, 16, F, H, W) on the CPU."""

        def advance(_: int) -> None:
            progress.update()
            self._stop_if_asked(self.together)

        devices = devices_of(self.transformer, self.accelerator.device)
        smaller = explain_out_of_memory("sampling", "make it smaller or shorter", *devices)
        with smaller, self.accelerator.autocast():  # as in training
            latents = generate_latents(
                self.transformer,
                entry.text,
                entry.prompt.sampling,
                device=self.accelerator.device,
                dtype=self.dtype,
                negative=entry.negative,
                on_step=advance,
            )
        if not torch.isfinite(latents).all():
            raise _NotFinite("the network gives NaN or infinity")
        return latents.cpu()

    def _decode_all(self, sampled: Sequence[tuple[EncodedPrompt, Tensor]], saved: list[SavedSample]) -> None:
        """Write the samples, and add them to ``saved``. The VAE is gone afterwards."""
        decode = load_decoder(self.settings.vae_settings, self.accelerator.device)
        for entry, latents in sampled:
            self._stop_if_asked()
            with self._training_goes_on(f"sample {entry} was not written"):
                saved.append(SavedSample(self._save(entry, decode(latents)[0].numpy()), entry.index, entry.prompt))
                logger.info("saved %s", saved[-1].path)

    def _save(self, entry: EncodedPrompt, frames: np.ndarray) -> Path:
        """Frames (T, H, W, 3), as a picture or a clip under a name that is free."""
        folder = self.settings.folder
        metadata = {} if self.settings.no_metadata else {**entry.prompt.metadata(), "training_steps": str(self.step)}
        stem = _stem(self.settings.output_name, self.name, entry.index, entry.prompt.sampling.seed)
        stem = unused_stem(folder, stem, endings=(".png", ".mp4"))
        if len(frames) == 1:
            path = folder / f"{stem}.png"
            save_picture(path, frames[0], metadata)
        else:
            path = folder / f"{stem}.mp4"
            save_video(path, frames, FPS, metadata)
        return path

    def _stop_if_asked(self, together: bool = False) -> None:
        asked = self.stop()
        if together:  # or those that are not asked would wait for this one
            asked = self.accelerator.reduce(torch.tensor(float(asked), device=self.accelerator.device)).item() > 0
        if asked:
            raise _Stopped

    @contextmanager
    def _training_goes_on(self, failed: str, together: bool = False) -> Iterator[None]:
        """A warning for what fails inside: training is worth more than its samples.

        Not where processes compute ``together``: whoever goes on would wait for ever for the one that failed.
        """
        free_memory(self.accelerator.device)  # of a sample that failed before
        try:
            yield
        except _Stopped:
            raise
        except Exception as error:  # encoders of videos, drivers and file systems fail in many ways
            if together and not isinstance(error, _NotFinite):
                raise
            self.failures.append(f"{failed}: {first_line(error).rstrip('.')}; training continues.")
            logger.warning("%s", self.failures[-1])


def _stem(name: str, place: str, index: int, seed: int) -> str:
    return f"{name}_{place}_{index:02d}_{time.strftime('%Y%m%d%H%M%S')}_{seed}"
