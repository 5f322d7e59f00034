"""Generate a video or picture from a prompt with HunyuanVideo, optionally with LoRA.

The prompt is encoded and the text encoders dropped, then the transformer samples and is dropped, then the VAE decodes: one
network at a time is in memory.
"""

from __future__ import annotations

import utils.interrupts  # noqa: F401  # isort: skip

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import hunyuan_model
from hunyuan_model.runtime.arguments import (
    add_compile_arguments,
    add_kernel_arguments,
    add_swap_arguments,
    add_weight_format_arguments,
    kernel_settings,
    runtime_settings,
)
from hunyuan_model.runtime.compilation import CompileWatch
from hunyuan_model.runtime.loading import check_transformer_file
from hunyuan_model.runtime.memory import BatchSize
from hunyuan_model.runtime.memory_plan import MemoryPlan
from hunyuan_model.runtime.memory_report import advice, batch_name
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.sampling.arguments import add_sampling_arguments, sampling_settings
from hunyuan_model.sampling.decoding import load_decoder
from hunyuan_model.sampling.generation import generate_latents
from hunyuan_model.sampling.latent_files import LATENT_ENDING, read_latents, save_latents
from hunyuan_model.sampling.settings import SamplingSettings
from hunyuan_model.text.arguments import TextEncoderSettings, add_text_encoder_arguments, text_encoder_settings
from hunyuan_model.text.encoding import TextConditions
from hunyuan_model.transformer.attention import ATTENTION_MODES
from hunyuan_model.vae.arguments import add_vae_arguments, vae_settings
from hunyuan_model.vae.loading import check_vae_file
from hunyuan_model.vae.memory import VAESettings
from networks.lora_merging import MergePatch, complete_multipliers, merge_lora_into_file, merge_patch, read_lora_files
from utils.cli.arguments import (
    add_device_argument,
    finite_float,
    int_up_to,
    require_flags,
    script_parser,
    warn_of_unused,
)
from utils.cli.config_files import add_config_file_argument, parse_with_config
from utils.cli.settings import settings_from
from utils.devices import choose_dtype, explain_out_of_memory, free_memory, pick_device, warn_of_cpu
from utils.errors import UserError, run_script
from utils.files import require_writable_folder
from utils.free_memory import free_device_memory
from utils.media_writing import OutputSettings, unused_stem

MAX_FPS = 1000  # video files hold no higher rate
# The flags that runs without sampling read.
GENERAL_FLAGS = {"config_file", "device", "tf32", "cudnn_benchmark"}
MERGING_FLAGS = GENERAL_FLAGS | {"dit", "lora_weight", "lora_multiplier", "save_merged_model"}
VAE_FLAGS = {"vae", "vae_dtype", "vae_chunk_size", "vae_spatial_tile_sample_min_size"}
DECODING_FLAGS = GENERAL_FLAGS | VAE_FLAGS | {"latent_path", "save_path", "output_type", "fps", "no_metadata"}


@dataclass(frozen=True)
class LoraSettings:
    """LoRA files to merge, and a multiplier for each."""

    lora_weight: tuple[str, ...]
    lora_multiplier: tuple[float, ...]

    def patch(self, dit: str) -> MergePatch | None:
        """What merges the files into the transformer ``dit`` while it loads; None without files."""
        if not self.lora_weight:
            return None
        return merge_patch(read_lora_files(self.lora_weight, self.lora_multiplier), dit)


@dataclass(frozen=True)
class GenerationSettings:
    """A run that samples, as the flags describe it."""

    prompt: str
    dit: str
    dit_dtype: torch.dtype
    runtime: RuntimeSettings
    lora: LoraSettings
    text: TextEncoderSettings
    sampling: SamplingSettings
    vae: VAESettings
    output: OutputSettings

    def metadata(self) -> dict[str, str]:
        """What made the video, for its file; empty with --no_metadata."""
        if self.output.no_metadata:
            return {}
        files = ", ".join(Path(path).name for path in self.lora.lora_weight)
        return {"prompt": self.prompt, **self.sampling.metadata(), "lora": files}


def build_parser() -> argparse.ArgumentParser:
    """Every flag of generation."""
    parser = script_parser("Generate a video, or a picture with --video_length 1, with HunyuanVideo and LoRA.")
    models = parser.add_argument_group("models")
    add_config_file_argument(models)
    models.add_argument("--dit", metavar="PATH", help="transformer checkpoint: .safetensors or .pt")
    models.add_argument(
        "--dit_dtype", metavar="DTYPE", help="precision of the transformer (default: bfloat16 on CUDA, float32 on the CPU)"
    )
    add_weight_format_arguments(models, "--fp8", "--int8")
    add_swap_arguments(models)
    add_vae_arguments(models, required=False, tiling_switch=False)
    add_text_encoder_arguments(models, required=False)
    add_device_argument(models)
    models.add_argument(
        "--attn_mode", choices=ATTENTION_MODES, default="torch", help="attention kernel; sdpa is the same as torch (default: torch)"
    )
    models.add_argument("--split_attn", action="store_true", help="attend sample by sample: less memory for batches (default: off)")
    speed = parser.add_argument_group("speed")
    add_compile_arguments(speed)
    add_kernel_arguments(speed)

    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--lora_weight", nargs="*", default=[], metavar="PATH", help="LoRA files, merged while the transformer loads")
    lora.add_argument(
        "--lora_multiplier", nargs="*", type=finite_float, default=[], metavar="M", help="their multipliers (default: 1.0 each)"
    )
    lora.add_argument("--save_merged_model", metavar="PATH", help="write the transformer with the LoRA merged to PATH, and exit")

    video = parser.add_argument_group("what to sample")
    video.add_argument("--prompt", metavar="TEXT", help="what the video shows")
    add_sampling_arguments(video)

    output = parser.add_argument_group("output")
    output.add_argument("--save_path", metavar="FOLDER", help="folder for what is generated")
    output.add_argument(
        "--fps", type=int_up_to(MAX_FPS), default=24, metavar="N", help="frames per second of the file written (default: 24)"
    )
    output.add_argument(
        "--output_type",
        choices=("video", "images", "latent", "both"),
        default="video",
        help="an MP4, PNG frames, the latent for a later --latent_path, or latent and MP4 (default: video)",
    )
    output.add_argument(
        "--latent_path", nargs="*", default=[], metavar="PATH", help="only decode these latents; no --dit and no --prompt"
    )
    output.add_argument("--no_metadata", action="store_true", help="do not write prompt and settings into the files (default: off)")
    return parser


def generation_settings(args: argparse.Namespace, device: torch.device) -> GenerationSettings:
    """Every flag of a run that samples, read and checked; no weights are read.

    Raises:
        UserError: a flag that is missing, impossible, or names a file that is not what the flag expects.
    """
    require_flags(args, "generation", "save_path", "dit", "text_encoder1", "text_encoder2", "prompt")
    if args.output_type != "latent":
        require_flags(args, f"--output_type {args.output_type}", "vae")
    settings = GenerationSettings(
        prompt=args.prompt,
        dit=args.dit,
        dit_dtype=choose_dtype(args.dit_dtype, "--dit_dtype", device, torch.bfloat16),
        runtime=runtime_settings(args, args.attn_mode),
        lora=lora_settings(args),
        text=text_encoder_settings(args, device),
        sampling=sampling_settings(args),
        vae=vae_settings(args, device),
        output=output_settings(args),
    )
    settings.runtime.check(device, settings.dit_dtype, check_transformer_file(args.dit, "--dit"))
    hunyuan_model.check_text_encoder_files(args.text_encoder1, args.text_encoder2)
    if args.vae:
        check_vae_file(args.vae)
    return settings


def lora_settings(args: argparse.Namespace) -> LoraSettings:
    """The LoRA files and their multipliers."""
    multipliers = complete_multipliers(args.lora_weight, args.lora_multiplier, "--lora_weight", "--lora_multiplier")
    return LoraSettings(tuple(args.lora_weight), multipliers)


def output_settings(args: argparse.Namespace) -> OutputSettings:
    """Where results go; the folder is tried."""
    require_writable_folder(args.save_path, "--save_path")
    return settings_from(OutputSettings, args)


def save_merged(args: argparse.Namespace) -> None:
    """Write the transformer with its LoRA merged to --save_merged_model."""
    require_flags(args, "--save_merged_model", "dit")
    if not args.lora_weight:
        raise UserError("--save_merged_model needs --lora_weight: without it there is nothing to merge.")
    lora = lora_settings(args)
    merge_lora_into_file(args.dit, read_lora_files(lora.lora_weight, lora.lora_multiplier), args.save_merged_model)
    print(args.save_merged_model)


def decode_stored(args: argparse.Namespace, device: torch.device) -> None:
    """Decode every --latent_path; all are read first, so that a bad one is reported before anything is written."""
    require_flags(args, "--latent_path", "vae", "save_path")
    if args.output_type in ("latent", "both"):
        raise UserError(f"--output_type {args.output_type} would write the latents that --latent_path reads; use video or images.")
    vae, output = vae_settings(args, device), output_settings(args)
    check_vae_file(args.vae)
    stored = [(Path(path).stem.removesuffix("_latent"), *read_latents(path, "--latent_path")) for path in args.latent_path]
    warn_of_cpu(args.device, device)
    with explain_out_of_memory("decoding", decoding_advice(vae), device):
        decode = load_decoder(vae, device)
        for stem, latents, metadata in stored:
            frames = decode(latents)[0].numpy()
            print(output.save_frames(unused_stem(Path(output.save_path), stem), frames, metadata))


def generate(settings: GenerationSettings, device: torch.device) -> None:
    """Encode, sample, decode and write."""
    latents = sample(settings, device)
    folder, output = Path(settings.output.save_path), settings.output
    name = f"{time.strftime('%Y%m%d-%H%M%S')}_{settings.sampling.seed}"
    stem = unused_stem(folder, name, endings=("", ".mp4", LATENT_ENDING))
    if output.output_type in ("latent", "both"):  # before decoding, so that running out of memory there loses nothing
        path = folder / f"{stem}{LATENT_ENDING}"
        save_latents(path, latents, settings.metadata())
        print(path)
    if output.output_type != "latent":
        with explain_out_of_memory("decoding", decoding_advice(settings.vae), device):
            frames = load_decoder(settings.vae, device)(latents)[0].numpy()
        print(output.save_frames(stem, frames, settings.metadata()))


def sample(settings: GenerationSettings, device: torch.device) -> Tensor:
    """Latents (1, 16, F, H, W) on the CPU. Text encoders and transformer are loaded one after the other, and gone afterwards."""
    patch = settings.lora.patch(settings.dit)  # first, as it finds out what is wrong with the files
    with explain_out_of_memory("encoding the prompt", "use --fp8_llm", device):
        (text,) = hunyuan_model.encode_prompts([settings.prompt], settings.text, device)
    plan = memory_plan(settings, text, device)
    with explain_out_of_memory(f"sampling {batch_name(plan.batch)}", lambda: advice(plan), device):
        dtype, compiling = settings.dit_dtype, CompileWatch()
        transformer = hunyuan_model.load_transformer(settings.dit, device=device, dtype=dtype, runtime=plan.runtime, patch=patch)
        del patch  # merged: nobody needs the files any more
        latents = generate_latents(
            transformer,
            text,
            settings.sampling,
            device=device,
            dtype=dtype,
            on_step=lambda step: compiling.report(f"step {step}"),
        ).cpu()
    del transformer
    if settings.runtime.compile:
        torch._dynamo.reset()  # it holds on to what it compiled, whose memory decoding needs
    free_memory(device)
    if not torch.isfinite(latents).all():
        raise UserError(
            "the transformer produced NaN or infinity; nothing was written. "
            "Try --dit_dtype bfloat16 or float32, or another --attn_mode."
        )
    return latents


def memory_plan(settings: GenerationSettings, text: TextConditions, device: torch.device) -> MemoryPlan:
    """What sampling takes; an automatic number of swapped blocks is resolved by what is free now."""
    batch = BatchSize(1, settings.sampling.latent_size, int(text.mask.sum()))
    dtype, config = settings.dit_dtype, check_transformer_file(settings.dit, "--dit")
    return MemoryPlan(config, device, settings.runtime, batch, dtype, dtype, trains=False).resolved(free_device_memory(device))


def decoding_advice(vae: VAESettings) -> str:
    """What to change where memory does not suffice to decode."""
    if lighter := vae.lighter_flags:
        return f"use {lighter}, or a shorter --video_length"
    return "use a smaller --video_size or a shorter --video_length"


def main() -> None:
    parser = build_parser()
    args = parse_with_config(parser)
    device = pick_device(args.device)
    kernel_settings(args).apply(device)
    if args.save_merged_model:
        warn_of_unused(parser, args, "--save_merged_model", MERGING_FLAGS)
        save_merged(args)
    elif args.latent_path:
        warn_of_unused(parser, args, "--latent_path", DECODING_FLAGS)
        decode_stored(args, device)
    else:
        settings = generation_settings(args, device)
        warn_of_cpu(args.device, device)
        generate(settings, device)


if __name__ == "__main__":
    run_script(main)
