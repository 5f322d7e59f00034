"""Generate videos or pictures from prompts with HunyuanVideo, optionally with LoRA.

All prompts are encoded and the text encoders dropped, then the transformer samples everything and is dropped, then the VAE decodes:
one network at a time is in memory. With --interactive the transformer and the VAE stay.
"""

from __future__ import annotations

import utils.startup  # noqa: F401  # isort: skip

import argparse
import logging
from pathlib import Path

import torch

import hunyuan_model
from dataset.media.starts import find_starts, read_start
from hunyuan_model.runtime.arguments import (
    add_compile_arguments,
    add_kernel_arguments,
    add_swap_arguments,
    add_weight_format_arguments,
    kernel_settings,
)
from hunyuan_model.sampling.arguments import (
    add_output_arguments,
    add_sampling_arguments,
    add_start_arguments,
    output_settings,
)
from hunyuan_model.sampling.decoding import load_decoder, read_latents
from hunyuan_model.sampling.generation import SamplingSettings
from hunyuan_model.text.arguments import add_text_encoder_arguments
from hunyuan_model.transformer.attention import ATTENTION_MODES
from hunyuan_model.vae.arguments import add_vae_arguments, vae_settings
from networks.generation.arguments import (
    Asked,
    add_background_argument,
    add_lora_arguments,
    add_record_arguments,
    add_request_arguments,
    asked_for,
    block_strengths,
    generation_settings,
    line_settings,
    lora_multipliers,
)
from networks.generation.batch import Batch
from networks.generation.interactive import Session, run_session
from networks.generation.record import REPEAT_FLAG, Recorder, described, recorded_flags, versions_of, warn_of_changes, with_flags
from networks.generation.sampler import sample_for_main
from networks.merging import merge_lora_into_file, read_lora_files
from utils.cli.arguments import add_device_argument, given_flags, require_flags, script_parser, warn_of_unused
from utils.cli.config_files import add_config_file_argument, parse_with_config
from utils.devices import pick_device, warn_of_cpu
from utils.errors import STATUS_FAILED, UserError, run_script
from utils.output import show
from utils.processes.ranks import ALONE, Ranks, joined_ranks

logger = logging.getLogger("generate")

# The flags that runs without sampling read.
GENERAL_FLAGS = {"config_file", "device", "tf32", "cudnn_benchmark", "gpu_memory_fraction", "no_fused_kernels"}
BLOCK_FLAGS = {"lora_block_multiplier", "exclude_single_blocks"}
MERGING_FLAGS = GENERAL_FLAGS | {"dit", "lora_weight", "lora_multiplier", "lora_partial", "save_merged_model"} | BLOCK_FLAGS
VAE_FLAGS = {"vae", "vae_dtype", "vae_chunk_size", "vae_spatial_tile_sample_min_size"}
DECODING_FLAGS = GENERAL_FLAGS | VAE_FLAGS | {"latent_path", "save_path", "output_type", "fps", "no_metadata"}


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
    add_text_encoder_arguments(models, required=False, cache=True)
    add_device_argument(models)
    models.add_argument(
        "--attn_mode", choices=ATTENTION_MODES, default="torch", help="attention kernel; sdpa is the same as torch (default: torch)"
    )
    models.add_argument("--split_attn", action="store_true", help="attend sample by sample: less memory for batches (default: off)")
    speed = parser.add_argument_group("speed")
    add_compile_arguments(speed)
    add_kernel_arguments(speed)
    add_background_argument(speed)

    add_lora_arguments(parser.add_argument_group("LoRA"))
    video = parser.add_argument_group("what to sample")
    add_request_arguments(video)
    add_sampling_arguments(video)
    add_start_arguments(parser.add_argument_group("what to start from"))

    output = parser.add_argument_group("output")
    add_output_arguments(output)
    add_record_arguments(output)
    return parser


def save_merged(args: argparse.Namespace) -> None:
    """Write the transformer with its LoRA merged to --save_merged_model."""
    require_flags(args, "--save_merged_model", "dit")
    if not args.lora_weight:
        raise UserError("--save_merged_model needs --lora_weight: without it there is nothing to merge.")
    blocks = block_strengths(args, hunyuan_model.check_transformer_file(args.dit, "--dit"))
    loras = read_lora_files(args.lora_weight, lora_multipliers(args), partial=args.lora_partial, blocks=blocks)
    merge_lora_into_file(args.dit, loras, args.save_merged_model)
    show(args.save_merged_model)


def decode_stored(parser: argparse.ArgumentParser, args: argparse.Namespace, device: torch.device) -> None:
    """Decode every --latent_path; all are read first, so that a bad one is reported before anything is written."""
    require_flags(args, "--latent_path", "vae", "save_path")
    if args.output_type in ("latent", "both"):
        raise UserError(f"--output_type {args.output_type} would write the latents that --latent_path reads; use video or images.")
    vae, output = vae_settings(args, device), output_settings(args)
    hunyuan_model.check_vae_file(args.vae)
    stored = [(Path(path).stem.removesuffix("_latent"), *read_latents(path, "--latent_path")) for path in args.latent_path]
    warn_of_cpu(args.device, device)
    decode = load_decoder(vae, device)
    own = {name: value for name, value in given_flags(parser, args).items() if name in {*VAE_FLAGS, "fps", "output_type"}}
    for stem, latents, metadata in stored:
        stem = output.unused_stem(stem, beside_latents=True)
        show(output.save_frames(stem, decode(latents)[0], with_flags(metadata, own)))


def generate(parser: argparse.ArgumentParser, args: argparse.Namespace, device: torch.device, ranks: Ranks) -> int:
    """Encode, sample, decode and write what the flags ask for. Returns the exit status.

    Several processes share out the results, or compute each together where results are fewer.
    """
    if args.interactive and ranks.count > 1:
        raise UserError("--interactive runs in one process; start it without a launcher.")
    flags = given_flags(parser, args)
    lines = line_settings(args) if args.interactive else None
    # Seeds, times in names and folders are those that the main process finds.
    asked = Asked([lines.base], lines.files) if lines else ranks.from_main(lambda: asked_for(args, find_starts))
    together = len(asked.requests) < ranks.count
    settings = generation_settings(args, device, asked, processes=ranks.count if together else 1)
    for other in settings.runtime.devices(device)[1:]:
        kernel_settings(args).apply(other)
    if not settings.config.guidance and args.embedded_cfg_scale != SamplingSettings.embedded_cfg_scale:
        logger.warning("--embedded_cfg_scale: no effect, as the transformer in --dit has no guidance embedding.")
    warn_of_cpu(args.device, device)
    if together and not ranks.is_main:
        sample_for_main(settings, device, ranks)
        return 0
    versions = versions_of(args.attn_mode, device, settings.runtime.sequence_parallel)
    recorder = Recorder(flags, settings.lora_weight, settings.lora_mode, versions)
    metadata = [recorder.metadata(request) for request in asked.requests]  # before the files that make it may change
    if args.repeat:
        warn_of_changes(args.repeat, metadata[0])
    if lines:
        return run_session(Session(settings, device, recorder.metadata, find_starts, read_start), lines)
    groups = {"helpers": ranks} if together else {"ranks": ranks}
    batch = Batch(settings, asked.requests, device, recorder, read_start, asked.sheet, **groups)
    batch.run()
    if not ranks.is_main:
        return 0
    if batch.failures:
        logger.error("%d of %d were not made: %s", len(batch.failures), len(asked.requests), "; ".join(batch.failures))
    return STATUS_FAILED if batch.failures else 0


def run(parser: argparse.ArgumentParser, args: argparse.Namespace, ranks: Ranks) -> int | None:
    """What the flags ask for. Several processes share out what is sampled; the main one does everything else."""
    decodes = args.latent_path and not args.interactive and (args.prompt, args.from_file, args.xy) == (None, None, None)
    if args.show is not None or args.save_merged_model or decodes:
        if not ranks.is_main:
            return None
        ranks = ALONE
    if args.show is not None:
        return show(described(args.show))
    device = pick_device(args.device, ranks)
    kernel_settings(args).apply(device)
    if args.save_merged_model:
        warn_of_unused(parser, args, "--save_merged_model", MERGING_FLAGS)
        save_merged(args)
    elif decodes:
        warn_of_unused(parser, args, "--latent_path", DECODING_FLAGS)
        decode_stored(parser, args, device)
    else:
        if not (args.lora_weight or args.xy):
            warn_of_unused(parser, args, "no --lora_weight", vars(args).keys() - {"lora_mode", "lora_partial"} - BLOCK_FLAGS)
        return generate(parser, args, device, ranks)
    return None


def main() -> int | None:
    parser = build_parser()
    args = parse_with_config(parser, sources={REPEAT_FLAG: recorded_flags})
    with joined_ranks(args.device) as ranks:
        return run(parser, args, ranks)


if __name__ == "__main__":
    run_script(main)
