"""Generate a video or picture from a prompt with HunyuanVideo, optionally with LoRA.

The prompt is encoded and the text encoders dropped, then the transformer samples and is dropped, then the VAE decodes: one
network at a time is in memory.
"""

from __future__ import annotations

import utils.startup  # noqa: F401  # isort: skip

import argparse
import logging
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
from hunyuan_model.runtime.memory import BatchSize, weight_shapes
from hunyuan_model.runtime.memory_plan import MemoryPlan
from hunyuan_model.runtime.memory_report import advice, batch_name
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.sampling.arguments import add_output_arguments, add_sampling_arguments, output_settings, sampling_settings
from hunyuan_model.sampling.decoding import OutputSettings, load_decoder, read_latents
from hunyuan_model.sampling.generation import SamplingSettings, generate_latents
from hunyuan_model.text.arguments import TextEncoderSettings, add_text_encoder_arguments, text_encoder_settings
from hunyuan_model.transformer.attention import ATTENTION_MODES
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.vae.arguments import add_vae_arguments, vae_settings
from hunyuan_model.vae.memory import VAESettings
from networks.formats.reading import check_lora_file
from networks.injection import InjectedLoras, injected_bytes
from networks.merging import MergePatch, complete_multipliers, merge_lora_into_file, read_lora_files
from utils.cli.arguments import add_device_argument, finite_float, require_flags, script_parser, warn_of_unused
from utils.cli.config_files import add_config_file_argument, parse_with_config
from utils.cli.settings import settings_from
from utils.devices import choose_dtype, explain_out_of_memory, free_memory, pick_device, warn_of_cpu
from utils.errors import UserError, run_script
from utils.free_memory import free_device_memory

logger = logging.getLogger("generate")

# The flags that runs without sampling read.
GENERAL_FLAGS = {"config_file", "device", "tf32", "cudnn_benchmark", "gpu_memory_fraction", "no_fused_kernels"}
MERGING_FLAGS = GENERAL_FLAGS | {"dit", "lora_weight", "lora_multiplier", "lora_partial", "save_merged_model"}
VAE_FLAGS = {"vae", "vae_dtype", "vae_chunk_size", "vae_spatial_tile_sample_min_size"}
DECODING_FLAGS = GENERAL_FLAGS | VAE_FLAGS | {"latent_path", "save_path", "output_type", "fps", "no_metadata"}


@dataclass(frozen=True)
class GenerationSettings:
    """A run that samples, as the flags describe it. ``config`` is read from the header of ``dit``."""

    prompt: str
    dit: str
    dit_dtype: torch.dtype
    config: TransformerConfig
    runtime: RuntimeSettings
    lora_weight: tuple[str, ...]
    lora_multiplier: tuple[float, ...]
    lora_mode: str
    lora_partial: bool
    text: TextEncoderSettings
    sampling: SamplingSettings
    vae: VAESettings
    output: OutputSettings


def build_parser() -> argparse.ArgumentParser:
    """Every flag of generation."""
    parser = script_parser("Generate a video, or a picture with --video_length 1, with HunyuanVideo and LoRA.")
    models = parser.add_argument_group("models")
    add_config_file_argument(models)
    models.add_argument("--dit", metavar="PATH", help="transformer: a .safetensors, .pt or .gguf file, or a folder")
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
    lora.add_argument("--lora_weight", nargs="*", default=[], metavar="PATH", help="LoRA files of any layout and kind")
    lora.add_argument(
        "--lora_multiplier", nargs="*", type=finite_float, default=[], metavar="M", help="their multipliers (default: 1.0 each)"
    )
    lora.add_argument(
        "--lora_mode",
        choices=("merge", "inject"),
        default="merge",
        help="merge LoRA into the weights while they load, or compute it beside them in every step (default: merge)",
    )
    lora.add_argument("--lora_partial", action="store_true", help="use LoRA files that fit the model only in part (default: off)")
    lora.add_argument("--save_merged_model", metavar="PATH", help="write the transformer with the LoRA merged to PATH, and exit")

    video = parser.add_argument_group("what to sample")
    video.add_argument("--prompt", metavar="TEXT", help="what the video shows")
    add_sampling_arguments(video)

    add_output_arguments(parser.add_argument_group("output"))
    return parser


def generation_settings(args: argparse.Namespace, device: torch.device) -> GenerationSettings:
    """Every flag of a run that samples, read and checked; no weights are read.

    Raises:
        UserError: a flag that is missing, impossible, or names a file that is not what the flag expects.
    """
    require_flags(args, "generation", "save_path", "dit", "text_encoder1", "text_encoder2", "prompt")
    if args.output_type != "latent":
        require_flags(args, f"--output_type {args.output_type}", "vae")
    settings = settings_from(
        GenerationSettings,
        args,
        dit_dtype=choose_dtype(args.dit_dtype, "--dit_dtype", device, torch.bfloat16),
        runtime=runtime_settings(args, args.attn_mode),
        lora_multiplier=lora_multipliers(args),
        text=text_encoder_settings(args, device),
        sampling=sampling_settings(args),
        vae=vae_settings(args, device),
        output=output_settings(args),
        config=hunyuan_model.check_transformer_file(args.dit, "--dit"),
    )
    settings.runtime.check(device, settings.dit_dtype, settings.config)
    for path in settings.lora_weight:
        check_lora_file(path, weight_shapes(settings.config), partial=settings.lora_partial)
    if not settings.config.guidance and settings.sampling.embedded_cfg_scale != SamplingSettings.embedded_cfg_scale:
        logger.warning("--embedded_cfg_scale: no effect, as the transformer in --dit has no guidance embedding.")
    hunyuan_model.check_text_encoder_files(args.text_encoder1, args.text_encoder2)
    if args.vae:
        hunyuan_model.check_vae_file(args.vae)
    return settings


def lora_multipliers(args: argparse.Namespace) -> tuple[float, ...]:
    """One for each --lora_weight."""
    return complete_multipliers(args.lora_weight, args.lora_multiplier, "--lora_weight", "--lora_multiplier")


def save_merged(args: argparse.Namespace) -> None:
    """Write the transformer with its LoRA merged to --save_merged_model."""
    require_flags(args, "--save_merged_model", "dit")
    if not args.lora_weight:
        raise UserError("--save_merged_model needs --lora_weight: without it there is nothing to merge.")
    loras = read_lora_files(args.lora_weight, lora_multipliers(args), partial=args.lora_partial)
    merge_lora_into_file(args.dit, loras, args.save_merged_model)
    print(args.save_merged_model)


def decode_stored(args: argparse.Namespace, device: torch.device) -> None:
    """Decode every --latent_path; all are read first, so that a bad one is reported before anything is written."""
    require_flags(args, "--latent_path", "vae", "save_path")
    if args.output_type in ("latent", "both"):
        raise UserError(f"--output_type {args.output_type} would write the latents that --latent_path reads; use video or images.")
    vae, output = vae_settings(args, device), output_settings(args)
    hunyuan_model.check_vae_file(args.vae)
    stored = [(Path(path).stem.removesuffix("_latent"), *read_latents(path, "--latent_path")) for path in args.latent_path]
    warn_of_cpu(args.device, device)
    decode = load_decoder(vae, device)
    for stem, latents, metadata in stored:
        print(output.save_frames(output.unused_stem(stem), decode(latents)[0], metadata))


def generate(settings: GenerationSettings, device: torch.device) -> None:
    """Encode, sample, decode and write."""
    latents, output = sample(settings, device), settings.output
    files = ", ".join(Path(path).name for path in settings.lora_weight)
    metadata = {"prompt": settings.prompt, **settings.sampling.metadata(), "lora": files}
    stem = output.unused_stem(f"{time.strftime('%Y%m%d-%H%M%S')}_{settings.sampling.seed}")
    if output.output_type in ("latent", "both"):  # before decoding, so that running out of memory there loses nothing
        print(output.save_latents(stem, latents, metadata))
    if output.output_type != "latent":
        frames = load_decoder(settings.vae, device)(latents)[0]
        print(output.save_frames(stem, frames, metadata))


def sample(settings: GenerationSettings, device: torch.device) -> Tensor:
    """Latents (1, 16, F, H, W) on the CPU. Text encoders and transformer are loaded one after the other, and gone afterwards."""
    # First, as it finds out what is wrong with the files.
    loras = read_lora_files(settings.lora_weight, settings.lora_multiplier, partial=settings.lora_partial)
    injected = loras if settings.lora_mode == "inject" else []
    patch = MergePatch(loras, weight_shapes(settings.config)) if loras and not injected else None
    with explain_out_of_memory("encoding the prompt", "use --fp8_llm", device):
        (text,) = hunyuan_model.encode_prompts([settings.prompt], settings.text, device)
    batch, dtype = BatchSize(1, settings.sampling.latent_size, int(text.mask.sum())), settings.dit_dtype
    beside = injected_bytes(injected)
    plan = MemoryPlan(settings.config, device, settings.runtime, batch, dtype, dtype, trains=False, injected_bytes=beside)
    plan = plan.resolved(free_device_memory(device))
    with explain_out_of_memory(f"sampling {batch_name(batch)}", lambda: advice(plan), device):
        compiling = CompileWatch()
        transformer = hunyuan_model.load_transformer(settings.dit, device=device, dtype=dtype, runtime=plan.runtime, patch=patch)
        InjectedLoras(transformer, injected, device)
        del patch, loras, injected  # nobody needs the files any more
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
        if not args.lora_weight:
            warn_of_unused(parser, args, "no --lora_weight", vars(args).keys() - {"lora_mode", "lora_partial"})
        settings = generation_settings(args, device)
        warn_of_cpu(args.device, device)
        generate(settings, device)


if __name__ == "__main__":
    run_script(main)
