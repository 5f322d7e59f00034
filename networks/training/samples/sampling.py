"""Samples that training draws of itself: when they are due, their prompts, and the drawing, which training does not feel."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import hunyuan_model
from hunyuan_model.sampling.decoding import decode_latents
from hunyuan_model.sampling.euler import initial_noise, latent_size, sample_latents
from hunyuan_model.sampling.flow import flow_sigmas
from hunyuan_model.text.arguments import text_encoder_settings
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.vae.arguments import next_vae_settings, vae_settings_given, vae_tile_size
from hunyuan_model.vae.loading import check_vae_options, configure_vae
from hunyuan_model.vae.memory import Clip, VAEFit
from networks.training.arguments import MAX_NAME_BYTES
from networks.training.pause import kept_random_state, paused_training
from networks.training.samples.prompts import SamplePrompt, read_sample_prompts, shortened
from utils.cli.arguments import random_seed
from utils.devices import choose_dtype, explain_out_of_memory, free_memory, parse_dtype
from utils.errors import UserError, first_line
from utils.files import require_writable_folder
from utils.media_writing import save_picture, save_video, unused_stem
from utils.progress import ProgressBar

if TYPE_CHECKING:
    from hunyuan_model.text.encoding import TextConditions

logger = logging.getLogger(__name__)

FOLDER = "sample"  # in --output_dir
FPS = 24  # what the model knows
SCHEDULE_FLAGS = ("sample_at_first", "sample_every_n_steps", "sample_every_n_epochs")

Result = TypeVar("Result")


class _StopAskedFor(Exception):
    """Training is to end: the samples that are being drawn are given up."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt and its text as the transformer takes it, on the CPU."""

    prompt: SamplePrompt
    text: TextConditions


@dataclass(frozen=True)
class SavedSample:
    """A sample on disk: a PNG where it has one frame, an MP4 where it has more.

    Attributes:
        index: place of the prompt in its file, from 0.
        seed: of the noise; drawn where the prompt has none.
    """

    path: Path
    index: int
    prompt: SamplePrompt
    seed: int


def check_samples(args: argparse.Namespace) -> list[SamplePrompt]:
    """The prompts to draw, none where no samples are asked for, once everything they need has been looked at.

    Raises:
        UserError: a flag that is missing or has no effect without another, a file that is missing or not what its flag expects,
            or a prompt that cannot be drawn.
    """
    scheduled = [f"--{name}" for name in SCHEDULE_FLAGS if getattr(args, name)]
    if args.sample_prompts is None:
        if scheduled:
            raise UserError(f"{scheduled[0]} needs --sample_prompts, a file with the prompts to draw.")
        return []
    prompts = read_sample_prompts(args.sample_prompts)
    missing = [f"--{name}" for name in ("vae", "text_encoder1", "text_encoder2") if getattr(args, name) is None]
    if missing:
        raise UserError(f"--sample_prompts needs {', '.join(missing)} to draw samples, or leave it out.")
    for name in ("vae_dtype", "text_encoder_dtype"):
        if getattr(args, name) is not None:
            parse_dtype(getattr(args, name), f"--{name}")
    check_vae_options(args.vae, tile_size=vae_tile_size(args))
    hunyuan_model.check_text_encoder_files(args.text_encoder1, args.text_encoder2)
    longest = _stem(args.output_name, f"e{0:06d}", len(prompts) - 1, 2**32 - 1)
    if len(os.fsencode(longest)) + len(".png") > MAX_NAME_BYTES:
        raise UserError(f"--output_name is too long for the names of samples, which have at most {MAX_NAME_BYTES} bytes.")
    require_writable_folder(Path(args.output_dir) / FOLDER, f"the folder {FOLDER} of --output_dir,")
    if not scheduled:
        logger.warning("--sample_prompts has no effect without --%s or --%s or --%s.", *SCHEDULE_FLAGS)
        return []
    return prompts


def samples_due(args: argparse.Namespace, step: int, epoch: int, epoch_ended: bool = False) -> bool:
    """Whether samples are drawn after ``step`` optimiser steps; step 0 is the beginning of a training that is not resumed.

    Args:
        epoch: the current epoch, from 1.
        epoch_ended: whether ``step`` was its last.
    """
    if args.sample_prompts is None:
        return False
    if step == 0:
        return bool(args.sample_at_first)
    by_steps = args.sample_every_n_steps is not None and step % args.sample_every_n_steps == 0
    return by_steps or _due_by_epoch(args, epoch, epoch_ended)


def _due_by_epoch(args: argparse.Namespace, epoch: int, epoch_ended: bool) -> bool:
    return epoch_ended and args.sample_every_n_epochs is not None and epoch % args.sample_every_n_epochs == 0


def prepare_samples(
    args: argparse.Namespace, prompts: Sequence[SamplePrompt], accelerator: Accelerator, config: TransformerConfig
) -> TrainingSamples:
    """Encode the prompts on the main process, before the transformer is loaded; the text encoders are gone afterwards.

    Every process calls this. Random state stays as it is.

    Args:
        prompts: from ``check_samples``.
        config: of the transformer that will draw.

    Raises:
        UserError: as the loading of text encoders; or they do not belong to the transformer, or memory does not suffice.
    """
    encoded: list[EncodedPrompt] = []
    if prompts and accelerator.is_main_process:
        device = accelerator.device
        with kept_random_state(device), explain_out_of_memory("encoding the sample prompts", "use --fp8_llm"):
            texts = hunyuan_model.encode_prompts([prompt.prompt for prompt in prompts], text_encoder_settings(args, device), device)
        encoded = [EncodedPrompt(prompt, text) for prompt, text in zip(prompts, texts)]
        _require_widths(encoded[0].text, config)
    if prompts:
        accelerator.wait_for_everyone()
    return TrainingSamples(args, accelerator, encoded)


def _require_widths(text: TextConditions, config: TransformerConfig) -> None:
    for number, given, expected in ((1, text.states, config.text_dim), (2, text.pooled, config.pooled_dim)):
        if given.shape[-1] != expected:
            raise UserError(
                f"--text_encoder{number} gives vectors of {given.shape[-1]} numbers, the transformer in --dit takes {expected}: "
                "they do not belong together."
            )


@dataclass
class TrainingSamples:
    """The encoded prompts of a training, and when they were drawn last."""

    args: argparse.Namespace
    accelerator: Accelerator
    prompts: Sequence[EncodedPrompt]
    drawn_at: int | None = None

    def draw_if_due(
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
        """Draw every prompt if ``samples_due`` says so and this step has not been drawn.

        Every process calls this at the same steps; the main one draws and the others wait for it.

        Args:
            dtype: what the transformer computes in while training.
            stop: asked between sampling steps; once it says True the samples are given up, as training is to end.

        Returns:
            What was written, on the main process. What failed is missing here, and was told in a warning.
        """
        if step == self.drawn_at or not samples_due(self.args, step, epoch, epoch_ended):
            return []
        self.drawn_at = step
        drawn: list[SavedSample] = []
        if self.accelerator.is_main_process:
            place = f"e{epoch:06d}" if step and _due_by_epoch(self.args, epoch, epoch_ended) else f"{step:06d}"
            drawing = Drawing(self.args, self.accelerator, transformer, dtype, place, step, stop)
            with paused_training(transformer, network, optimizer, self.accelerator.device):
                drawn = draw_samples(drawing, self.prompts)
        self.accelerator.wait_for_everyone()
        return drawn


@dataclass(frozen=True)
class Drawing:
    """One round of samples: what draws them, and how they are called.

    Attributes:
        transformer: with the network as it is now.
        dtype: what the transformer computes in.
        place: the epoch or step as file names have it.
        step: optimiser steps done, for the metadata.
        stop: once it says True the round is given up.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    transformer: nn.Module
    dtype: torch.dtype
    place: str
    step: int
    stop: Callable[[], bool] = lambda: False

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def give_up_if_asked(self) -> None:
        if self.stop():
            raise _StopAskedFor


def draw_samples(drawing: Drawing, prompts: Sequence[EncodedPrompt]) -> list[SavedSample]:
    """Draw every prompt and write the pictures and videos into the folder of samples. Call it under ``paused_training``.

    First the latents of all, then the VAE is loaded, decodes them and goes. A prompt that fails, for want of memory or disk
    space say, is a warning and is left out.
    """
    started = time.monotonic()
    drawn: list[SavedSample] = []
    try:
        sampled = _sample_all(drawing, prompts)
        if sampled:
            _write_all(drawing, sampled, drawn)
    except _StopAskedFor:
        logger.info("the samples are given up: training is to end.")
    free_memory(drawing.device)
    logger.info("%d of %d samples in %.1f s", len(drawn), len(prompts), time.monotonic() - started)
    return drawn


def _sample_all(drawing: Drawing, prompts: Sequence[EncodedPrompt]) -> list[tuple[int, EncodedPrompt, int, Tensor]]:
    """(index, prompt, seed, latents (1, 16, F, H, W) on the CPU) of every prompt that did not fail."""
    sampled = []
    with ProgressBar(
        total=sum(entry.prompt.sample_steps for entry in prompts), desc="samples", unit="step", leave=False
    ) as progress:
        for index, entry in enumerate(prompts):
            seed = random_seed() if entry.prompt.seed is None else entry.prompt.seed
            failed = f"sample {_called(index, entry.prompt)} was not drawn"
            latents = _or_warn(failed, drawing, _sample, drawing, entry, seed, progress)
            if latents is not None:
                sampled.append((index, entry, seed, latents))
    return sampled


def _sample(drawing: Drawing, entry: EncodedPrompt, seed: int, progress: ProgressBar) -> Tensor:
    def advance(_: int) -> None:
        progress.update()
        drawing.give_up_if_asked()

    prompt = entry.prompt
    size = latent_size(prompt.height, prompt.width, prompt.frame_count)
    with drawing.accelerator.autocast():  # as in training
        latents = sample_latents(
            drawing.transformer,
            initial_noise(size, torch.Generator().manual_seed(seed)),
            *entry.text,
            sigmas=flow_sigmas(prompt.sample_steps, prompt.discrete_flow_shift),
            guidance_scale=prompt.guidance_scale,
            device=drawing.device,
            dtype=drawing.dtype,
            on_step=advance,
        )
    if not torch.isfinite(latents).all():
        raise UserError("the network gives NaN or infinity")
    return latents.cpu()


def _write_all(drawing: Drawing, sampled: Sequence[tuple[int, EncodedPrompt, int, Tensor]], drawn: list[SavedSample]) -> None:
    """Load the VAE, decode and write, and add to ``drawn`` what did not fail. The VAE is gone afterwards."""
    vae = _or_warn("no sample was written, as --vae failed", drawing, _load_vae, drawing)
    if vae is None:
        return
    fit = None if vae_settings_given(drawing.args) else VAEFit(vae, encode=False)
    for index, entry, seed, latents in sampled:
        drawing.give_up_if_asked()
        failed = f"sample {_called(index, entry.prompt)} was not written"
        path = _or_warn(failed, drawing, _decode_and_write, drawing, vae, fit, index, entry.prompt, seed, latents)
        if path is not None:
            logger.info("saved %s", path)
            drawn.append(SavedSample(path, index, entry.prompt, seed))


def _load_vae(drawing: Drawing) -> nn.Module:
    args = drawing.args
    dtype = choose_dtype(args.vae_dtype, "--vae_dtype", drawing.device, torch.float16)
    vae = hunyuan_model.load_vae(args.vae, device=drawing.device, dtype=dtype)
    configure_vae(vae, chunk_size=args.vae_chunk_size, tile_size=vae_tile_size(args))
    return vae


def _decode_and_write(
    drawing: Drawing, vae: nn.Module, fit: VAEFit | None, index: int, prompt: SamplePrompt, seed: int, latents: Tensor
) -> Path:
    if fit is not None:
        fit.fit(Clip.of_latents(latents))
    dtype = next(vae.parameters()).dtype
    frames = decode_latents(vae, latents, device=drawing.device, dtype=dtype)[0].numpy()  # (T, H, W, 3)
    args, folder = drawing.args, Path(drawing.args.output_dir) / FOLDER
    settings = {} if args.no_metadata else sample_settings(prompt, seed, drawing.step)
    stem = unused_stem(folder, _stem(args.output_name, drawing.place, index, seed), endings=(".png", ".mp4"))
    if len(frames) == 1:
        path = folder / f"{stem}.png"
        save_picture(path, frames[0], settings)
    else:
        path = folder / f"{stem}.mp4"
        save_video(path, frames, FPS, settings)
    return path


def sample_settings(prompt: SamplePrompt, seed: int, step: int) -> dict[str, str]:
    """What made a sample, for the metadata of its file."""
    return {
        "prompt": prompt.prompt,
        "seed": str(seed),
        "width": str(prompt.width),
        "height": str(prompt.height),
        "frame_count": str(prompt.frame_count),
        "sample_steps": str(prompt.sample_steps),
        "guidance_scale": f"{prompt.guidance_scale:g}",
        "discrete_flow_shift": f"{prompt.discrete_flow_shift:g}",
        "training_steps": str(step),
    }


def _stem(name: str, place: str, index: int, seed: int) -> str:
    return f"{name}_{place}_{index:02d}_{time.strftime('%Y%m%d%H%M%S')}_{seed}"


def _called(index: int, prompt: SamplePrompt) -> str:
    return f"{index:02d} ({prompt.where}: {shortened(prompt.prompt)})"


def _or_warn(failed: str, drawing: Drawing, function: Callable[..., Result], *arguments: object) -> Result | None:
    """What ``function`` returns; where it fails, a warning and None: training is worth more than its samples."""
    try:
        return function(*arguments)
    except _StopAskedFor:
        raise
    except torch.OutOfMemoryError:
        lighter = next_vae_settings(drawing.args)
        advice = f"Make it smaller or shorter{', or give ' if lighter else ''}{lighter}."
        logger.warning("%s: out of memory; training goes on. %s", failed, advice)
    except Exception as error:  # encoders of videos, drivers and file systems fail in many ways
        logger.warning("%s: %s; training goes on.", failed, first_line(error).rstrip("."))
    free_memory(drawing.device)  # the error is gone by now, and with it what its frames held
    return None
