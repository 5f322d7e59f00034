"""Generate a video or picture from a prompt with HunyuanVideo, optionally with LoRA.

Text is encoded first and the encoders dropped, then the transformer samples and is dropped, then the VAE decodes: one
network at a time is in memory.
"""

from __future__ import annotations

import utils.interrupts  # noqa: F401  # isort: skip

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
from hunyuan_model.sampling.decoding import decode_latents
from hunyuan_model.sampling.euler import LATENT_CHANNELS, initial_noise, latent_size, sample_latents
from hunyuan_model.sampling.flow import flow_sigmas
from hunyuan_model.sampling.step_cache import StepCache, check_step_cache
from hunyuan_model.text.arguments import add_text_encoder_arguments, text_encoder_settings
from hunyuan_model.transformer.attention import ATTENTION_MODES
from hunyuan_model.vae.arguments import add_vae_arguments, next_vae_settings, vae_settings_given, vae_tile_size
from hunyuan_model.vae.loading import check_vae_options, configure_vae
from hunyuan_model.vae.memory import Clip, VAEFit
from networks.lora_merging import merge_lora_into_file, merge_patch, read_lora_files
from utils.cli.arguments import (
    add_device_argument,
    finite_float,
    int_up_to,
    non_negative_float,
    positive_float,
    random_seed,
    script_parser,
    seed,
    whole_number,
)
from utils.cli.config_files import add_config_file_argument, parse_with_config
from utils.devices import choose_dtype, explain_out_of_memory, free_memory, pick_device, warn_of_cpu
from utils.errors import UserError, run_script
from utils.files import require_writable_folder
from utils.free_memory import free_device_memory
from utils.media_writing import save_pictures, save_video, unused_stem
from utils.progress import ProgressBar
from utils.safetensors_io import read_tensors, save_tensors

if TYPE_CHECKING:
    from hunyuan_model.text.encoding import TextConditions

logger = logging.getLogger("generate")

Draw = Callable[[Callable[..., Tensor], str], Tensor]
"""A transformer, or what takes its place, and a title for the progress bar -> latents (1, 16, F, H, W)."""

MAX_FPS = 1000  # video files hold no higher rate
MAX_STEPS = 10_000  # the schedule has 1000 timesteps
LATENT_ENDING = "_latent.safetensors"
# What a run without sampling does not read.
SAMPLING_FLAGS = [
    "dit_dtype",
    "fp8",
    "int8",
    "blocks_to_swap",
    "img_in_txt_in_offloading",
    "no_pinned_swap_memory",
    "fp8_scaled",
    "fp8_fast",
    "compile",
    "compile_mode",
    "text_encoder1",
    "text_encoder2",
    "tokenizer1",
    "tokenizer2",
    "text_encoder_dtype",
    "fp8_llm",
    "attn_mode",
    "split_attn",
    "prompt",
    "video_size",
    "video_length",
    "infer_steps",
    "seed",
    "embedded_cfg_scale",
    "flow_shift",
    "step_cache",
    "step_cache_check",
]
# What a run that writes no pictures does not read either.
OUTPUT_FLAGS = [
    "vae",
    "vae_dtype",
    "vae_chunk_size",
    "vae_spatial_tile_sample_min_size",
    "save_path",
    "output_type",
    "fps",
    "latent_path",
    "no_metadata",
]


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

    video = parser.add_argument_group("what to draw")
    video.add_argument("--prompt", metavar="TEXT", help="what the video shows")
    video.add_argument(
        "--video_size",
        nargs=2,
        type=whole_number,
        default=[256, 256],
        metavar=("H", "W"),
        help="height and width, multiples of 16 (default: 256 256)",
    )
    video.add_argument(
        "--video_length", type=whole_number, default=129, metavar="N", help="frames, 4n+1; 1 is a picture (default: 129)"
    )
    video.add_argument(
        "--fps", type=int_up_to(MAX_FPS), default=24, metavar="N", help="frames per second of the file written (default: 24)"
    )
    video.add_argument("--infer_steps", type=int_up_to(MAX_STEPS), default=50, metavar="N", help="sampling steps (default: 50)")
    video.add_argument("--seed", type=seed, metavar="N", help="seed of the noise (default: drawn, and logged)")
    video.add_argument(
        "--embedded_cfg_scale", type=finite_float, default=6.0, metavar="G", help="distilled guidance (default: 6.0)"
    )
    video.add_argument(
        "--flow_shift", type=positive_float, default=7.0, metavar="S", help="shift of the schedule towards noise (default: 7.0)"
    )
    video.add_argument(
        "--step_cache",
        type=non_negative_float,
        default=0.0,
        metavar="THRESHOLD",
        help="skip steps while the input of the transformer's blocks changes by less than this share, 0.1 say: faster, coarser; "
        "0 skips none (default: 0)",
    )
    video.add_argument(
        "--step_cache_check",
        action="store_true",
        help="with --step_cache, draw with all steps as well and tell how far the latents are apart: saves no time (default: off)",
    )

    output = parser.add_argument_group("output")
    output.add_argument("--save_path", metavar="FOLDER", help="folder for what is generated")
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


def check_arguments(args: argparse.Namespace, device: torch.device) -> None:
    """Everything that can be said before a model is loaded.

    Raises:
        UserError: a flag that is missing, impossible, or names a file that is not what the flag expects.
    """
    if len(args.lora_multiplier) > len(args.lora_weight):
        raise UserError(
            f"--lora_multiplier has {len(args.lora_multiplier)} values for {len(args.lora_weight)} --lora_weight files."
        )
    if args.save_merged_model:
        _require(args, "--save_merged_model", "dit")
        if not args.lora_weight:
            raise UserError("--save_merged_model needs --lora_weight: without it there is nothing to merge.")
        _warn_of_unused(args, "--save_merged_model", [*SAMPLING_FLAGS, *OUTPUT_FLAGS])
        return
    _require(args, "generation", "save_path")
    require_writable_folder(args.save_path, "--save_path")
    if args.latent_path:
        _check_decoding(args)
    else:
        _check_sampling(args, device)
    if args.vae:
        check_vae_options(args.vae, tile_size=args.vae_spatial_tile_sample_min_size)


def _check_decoding(args: argparse.Namespace) -> None:
    _require(args, "--latent_path", "vae")
    if args.output_type in ("latent", "both"):
        raise UserError(f"--output_type {args.output_type} would write the latents that --latent_path reads; use video or images.")
    _warn_of_unused(args, "--latent_path", [*SAMPLING_FLAGS, "dit", "lora_weight", "lora_multiplier"])


def _check_sampling(args: argparse.Namespace, device: torch.device) -> None:
    _require(args, "generation", "dit", "text_encoder1", "text_encoder2", "prompt")
    if args.output_type != "latent":
        _require(args, f"--output_type {args.output_type}", "vae")
    latent_size(*args.video_size, args.video_length)
    check_step_cache(args.step_cache, args.infer_steps)
    if args.step_cache_check and not args.step_cache:
        raise UserError("--step_cache_check shows the error of --step_cache; give that as well, or leave it out.")
    for name in ("dit_dtype", "text_encoder_dtype"):
        choose_dtype(getattr(args, name), f"--{name}", device, torch.float16)
    runtime = runtime_settings(args, args.attn_mode)
    config = check_transformer_file(args.dit, "--dit")
    runtime.check(device, choose_dtype(args.dit_dtype, "--dit_dtype", device, torch.bfloat16), config)
    hunyuan_model.check_text_encoder_files(args.text_encoder1, args.text_encoder2)


def _warn_of_unused(args: argparse.Namespace, mode: str, names: Sequence[str]) -> None:
    parser = build_parser()
    given = [f"--{name}" for name in names if getattr(args, name) != parser.get_default(name)]
    if given:
        logger.warning("%s: no effect with %s.", ", ".join(given), mode)


def _require(args: argparse.Namespace, purpose: str, *names: str) -> None:
    missing = [f"--{name}" for name in names if getattr(args, name) is None]
    if missing:
        raise UserError(f"{purpose} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} missing.")


def encode_prompt(args: argparse.Namespace, device: torch.device) -> TextConditions:
    """The prompt as the transformer takes it; the encoders are gone afterwards."""
    (text,) = hunyuan_model.encode_prompts([args.prompt], text_encoder_settings(args, device), device)
    return text


def sample(args: argparse.Namespace, device: torch.device) -> Tensor:
    """Encode the prompt, load the transformer with its LoRA, and draw latents (1, 16, F, H, W) from ``args.seed``."""
    loras = read_lora_files(args.lora_weight, args.lora_multiplier)
    patch = merge_patch(loras, args.dit) if loras else None
    text = encode_prompt(args, device)
    dtype = choose_dtype(args.dit_dtype, "--dit_dtype", device, torch.bfloat16)
    config = check_transformer_file(args.dit, "--dit")
    batch = BatchSize(1, latent_size(*args.video_size, args.video_length), int(text.mask.sum()))
    plan = MemoryPlan(config, device, runtime_settings(args, args.attn_mode), batch, dtype, dtype, trains=False)
    plan = plan.resolved(free_device_memory(device))
    with explain_out_of_memory(f"sampling {batch_name(plan.batch)}", lambda: advice(plan), device):
        transformer = load_base_model(args, plan.runtime, patch, device, dtype)
        del loras, patch  # merged: nobody needs their files any more
        latents = integrate(args, transformer, text, device, dtype)
        if args.compile:
            torch._dynamo.reset()  # it holds on to what it compiled, whose memory decoding needs
    if not torch.isfinite(latents).all():
        raise UserError(
            "the transformer produced NaN or infinity; nothing was written. "
            "Try --dit_dtype bfloat16 or float32, or another --attn_mode."
        )
    return latents.cpu()


def load_base_model(
    args: argparse.Namespace,
    runtime: RuntimeSettings,
    patch: Callable[[str, Tensor], Tensor] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.nn.Module:
    """The transformer, changed by ``patch`` while it loads."""
    return hunyuan_model.load_transformer(args.dit, device=device, dtype=dtype, runtime=runtime, patch=patch)


def integrate(
    args: argparse.Namespace, transformer: torch.nn.Module, text: TextConditions, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Follow the flow from noise: latents (1, 16, F, H, W) on ``device``."""
    noise = initial_noise(latent_size(*args.video_size, args.video_length), torch.Generator().manual_seed(args.seed))

    def draw(network: Callable[..., Tensor], title: str) -> Tensor:
        compiling = CompileWatch()

        def advance(step: int) -> None:
            compiling.tell(f"step {step}")
            progress.update()

        with ProgressBar(total=args.infer_steps, desc=title, unit="step") as progress:
            return sample_latents(
                network,
                noise,
                *text,
                sigmas=flow_sigmas(args.infer_steps, args.flow_shift),
                guidance_scale=args.embedded_cfg_scale,
                device=device,
                dtype=dtype,
                on_step=advance,
            )

    return draw_with_step_cache(args, transformer, draw) if args.step_cache else draw(transformer, "sampling")


def draw_with_step_cache(args: argparse.Namespace, transformer: torch.nn.Module, draw: Draw) -> Tensor:
    """Latents (1, 16, F, H, W) of a transformer that skips steps. How many were computed is logged, and the error if asked for."""
    cache = StepCache(transformer, args.infer_steps, args.step_cache)
    latents = draw(cache, "sampling")
    logger.info("step cache: %d of %d steps computed", len(cache.computed), args.infer_steps)
    if args.step_cache_check:
        whole = draw(transformer, "sampling with all steps")
        error = 100 * ((latents - whole).norm() / whole.norm()).item()
        logger.info("step cache: latents %.3g %% (rms) off those of all steps, which took the time that the cache saves", error)
    return latents


def load_decoder(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What turns latents (1, 16, F, H, W) into frames (T, H, W, 3), with chunks and tiles as the flags or free memory say."""
    vae = hunyuan_model.load_vae(args.vae, device=device, dtype=dtype)
    configure_vae(vae, chunk_size=args.vae_chunk_size, tile_size=vae_tile_size(args))
    fit = None if vae_settings_given(args) else VAEFit(vae, encode=False)

    def decode(latents: Tensor) -> Tensor:
        if fit is not None:
            fit.fit(Clip.of_latents(latents))
        return decode_latents(vae, latents, device=device, dtype=dtype)[0]

    return decode


def decoding_memory_advice(args: argparse.Namespace) -> str:
    """What to change where memory does not suffice to decode."""
    lighter = next_vae_settings(args)
    return f"use {lighter}, or a shorter --video_length" if lighter else "use a smaller --video_size or a shorter --video_length"


def settings(args: argparse.Namespace) -> dict[str, str]:
    """What made the picture, for the metadata of the files."""
    height, width = args.video_size
    return {
        "prompt": args.prompt,
        "seed": str(args.seed),
        "height": str(height),
        "width": str(width),
        "video_length": str(args.video_length),
        "infer_steps": str(args.infer_steps),
        "embedded_cfg_scale": f"{args.embedded_cfg_scale:g}",
        "flow_shift": f"{args.flow_shift:g}",
        "step_cache": f"{args.step_cache:g}",
        "lora": ", ".join(Path(path).name for path in args.lora_weight),
    }


def read_latent(path: str) -> tuple[Tensor, dict[str, str]]:
    """A latent (1, 16, F, H, W) that --output_type latent or both wrote, with its metadata."""
    file = read_tensors(path, "--latent_path")
    if "latent" not in file.tensors:
        raise UserError(f"--latent_path {path} holds no tensor named latent; give a file that --output_type latent wrote.")
    latent = file.tensors["latent"]
    if latent.ndim != 4 or latent.shape[0] != LATENT_CHANNELS or 0 in latent.shape:
        raise UserError(
            f"--latent_path {path}: the latent has the shape {tuple(latent.shape)}, expected (16, frames, height, width)."
        )
    if not torch.isfinite(latent).all():
        raise UserError(f"--latent_path {path} holds NaN or infinity; sample it again.")
    return latent[None].float(), file.metadata


def write_latent(args: argparse.Namespace, stem: str, latents: Tensor) -> None:
    """Save (1, 16, F, H, W) as the tensor ``latent`` (16, F, H, W)."""
    path = Path(args.save_path) / f"{stem}{LATENT_ENDING}"
    save_tensors(path, {"latent": latents[0]}, None if args.no_metadata else settings(args))
    print(path)


def write_frames(args: argparse.Namespace, stem: str, frames: Tensor, metadata: dict[str, str]) -> None:
    """Save frames (T, H, W, 3) as a folder of PNG or as MP4, as --output_type says, and print where."""
    metadata = {} if args.no_metadata else metadata
    if args.output_type == "images":
        folder = Path(args.save_path) / stem
        save_pictures(folder, frames.numpy(), metadata)
        print(folder)
    else:
        path = Path(args.save_path) / f"{stem}.mp4"
        save_video(path, frames.numpy(), args.fps, metadata)
        print(path)


def decode_stored(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Decode every --latent_path; all are read first, so that a bad one is told before anything is written."""
    stored = [(Path(path).stem.removesuffix("_latent"), *read_latent(path)) for path in args.latent_path]
    warn_of_cpu(args.device, device)
    with explain_out_of_memory("decoding", decoding_memory_advice(args), device):
        decode = load_decoder(args, device, dtype)
        for stem, latents, metadata in stored:
            frames = decode(latents)
            write_frames(args, unused_stem(Path(args.save_path), stem), frames, metadata)


def main() -> None:
    args = parse_with_config(build_parser())
    device = pick_device(args.device)
    vae_dtype = choose_dtype(args.vae_dtype, "--vae_dtype", device, torch.float16)
    check_arguments(args, device)
    kernel_settings(args).apply(device)
    if args.save_merged_model:
        merge_lora_into_file(args.dit, read_lora_files(args.lora_weight, args.lora_multiplier), args.save_merged_model)
        print(args.save_merged_model)
        return
    if args.latent_path:
        decode_stored(args, device, vae_dtype)
        return
    if args.seed is None:
        args.seed = random_seed()
        logger.info("seed %d", args.seed)
    warn_of_cpu(args.device, device)
    with explain_out_of_memory("encoding the prompt", "use --fp8_llm", device):
        latents = sample(args, device)
    free_memory(device)
    stem = unused_stem(Path(args.save_path), f"{time.strftime('%Y%m%d-%H%M%S')}_{args.seed}", endings=("", ".mp4", LATENT_ENDING))
    if args.output_type in ("latent", "both"):  # before decoding, so that running out of memory there loses nothing
        write_latent(args, stem, latents)
    if args.output_type != "latent":
        with explain_out_of_memory("decoding", decoding_memory_advice(args), device):
            frames = load_decoder(args, device, vae_dtype)(latents)
        write_frames(args, stem, frames, settings(args))


if __name__ == "__main__":
    run_script(main)
