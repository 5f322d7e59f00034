"""Cache the VAE latents of every picture and clip of a dataset, so that training needs neither media nor VAE.

Threads decode and resize while the VAE encodes. Items that cannot be read are listed at the end and do not stop the others.
"""

from __future__ import annotations

import utils.interrupts  # noqa: F401  # isort: skip

import argparse
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

import hunyuan_model
from dataset import load_dataset_config
from dataset.arguments import add_dataset_arguments
from dataset.batches.report import (
    CachingOutcome,
    DatasetReport,
    count_caches,
    deal_with_orphans,
    format_table,
    report_items,
    require_batches,
    require_items,
)
from dataset.cache.debug_view import CONSOLE_BACKS, console_picture, describe, save_clip, save_sheet
from dataset.cache.files import CacheKey, NonFiniteError, list_caches, save_latents
from dataset.cache.freshness import Verdict, judge_latents
from dataset.cache.orphans import abandoned_files, orphaned_latents
from dataset.cache.preparation import Failure, Finished, Prepared, Result, Target, prepare
from dataset.cache.records import latent_record
from dataset.cache.sizes import missing_latents_bytes
from dataset.items import Item, list_items, settle_captions
from hunyuan_model.checkpoints.fingerprint import fingerprint_weights
from hunyuan_model.vae.arguments import add_vae_arguments, next_vae_settings, vae_settings_given, vae_tile_size
from hunyuan_model.vae.loading import check_vae_options, configure_vae
from hunyuan_model.vae.memory import Clip, VAEFit
from hunyuan_model.vae.model import AutoencoderKLCausal3D, DiagonalGaussian
from utils.cli.arguments import add_device_argument, int_up_to, positive_int, script_parser
from utils.cli.config_files import add_config_file_argument, parse_with_config
from utils.devices import choose_dtype, pick_device, warn_of_cpu
from utils.disk_space import require_room
from utils.errors import STATUS_FAILED, UserError, run_script
from utils.files import require_writable_folder
from utils.progress import ProgressBar

logger = logging.getLogger("cache_latents")

CONSOLE_WIDTH = 80
MAX_CONSOLE_WIDTH = 1000  # wider than any terminal; every character of a drawing costs 40 bytes
WAITING_BYTES = 512 * 2**20  # of pixels that wait for others of their size; with many buckets they would fill the memory


def build_parser() -> argparse.ArgumentParser:
    """Every flag of this script."""
    parser = script_parser("Cache the VAE latents of the pictures and clips of a dataset.")
    data = parser.add_argument_group("data")
    add_config_file_argument(data)
    add_dataset_arguments(
        data,
        batch_size="encode at most N at once (default: the dataset's batch_size)",
        num_workers="threads that decode and resize",
        skip_existing="keep caches that were made from the same file, at the same size, by the same VAE (default: make all again)",
    )
    model = parser.add_argument_group("model")
    add_vae_arguments(model, required=False)
    add_device_argument(model)
    debug = parser.add_argument_group("looking at the data, without caching")
    debug.add_argument(
        "--debug_mode",
        choices=("image", "video", "console"),
        help="write contact sheets (image), or clips as MP4 (video), to the folder debug in the cache directory, or draw in the "
        "terminal (console) (default: cache latents)",
    )
    debug.add_argument("--console_width", type=int_up_to(MAX_CONSOLE_WIDTH), metavar="N", help="columns of a drawing (default: 80)")
    debug.add_argument(
        "--console_back",
        type=str.upper,
        choices=tuple(CONSOLE_BACKS),
        help="draw in characters on a background of this colour (default: in half blocks, which cover it)",
    )
    debug.add_argument("--console_num_images", type=positive_int, metavar="N", help="draw only the first N (default: all)")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Everything that can be said before media are read.

    Raises:
        UserError: --vae is missing or not a VAE, or the tile size is impossible.
    """
    if args.debug_mode != "console":
        for name in ("console_width", "console_back", "console_num_images"):
            if getattr(args, name) is not None:
                logger.warning("--%s has an effect only with --debug_mode console.", name)
    if args.debug_mode is not None:
        for name in ("skip_existing", "remove_orphans"):
            if getattr(args, name):
                logger.warning("--%s has no effect with --debug_mode, which caches nothing.", name)
        return
    if args.vae is None:
        raise UserError("--vae is missing: give the VAE checkpoint, or --debug_mode to look at the data only.")
    check_vae_options(args.vae, tile_size=vae_tile_size(args))


def show_items(args: argparse.Namespace, items: Sequence[Item]) -> list[Failure]:
    """Write or draw every picture and window as training will see it; returns the items that could not be read."""
    failures = []
    shown = 0
    for result in prepare(items, args.num_workers):
        if isinstance(result, Failure):
            failures.append(result)
        elif isinstance(result, Prepared):
            print(describe(result))
            if args.debug_mode == "console":
                print(console_picture(result.pixels, args.console_width or CONSOLE_WIDTH, args.console_back))
                shown += 1
                if shown == args.console_num_images:
                    break
            else:
                save = save_sheet if args.debug_mode == "image" else save_clip
                print(f"    {save(result)}")
    return failures


def encode(
    vae: AutoencoderKLCausal3D,
    batch: Sequence[Prepared],
    device: torch.device,
    dtype: torch.dtype,
    fit: VAEFit | None = None,
    lighter: str = "",
) -> list[torch.Tensor]:
    """One sample of the posterior for each, (16, F, H, W). It depends on the item and its cache name, not on the batch or run.

    Args:
        fit: what chooses chunks and tiles by free memory; a batch that would need them goes item by item before. None: as it is.
        lighter: flags that take less memory.
    """
    if fit is not None:
        frames, height, width = batch[0].pixels.shape[:3]
        if len(batch) > 1 and fit.must_split(Clip(len(batch), frames, height, width)):
            return [sample for prepared in batch for sample in encode(vae, [prepared], device, dtype, fit, lighter)]
        fit.fit(Clip(len(batch), frames, height, width))
    try:
        x = torch.stack([pixels_to_input(prepared, device, dtype) for prepared in batch])
        with torch.inference_mode():
            posterior = vae.encode(x)
    except torch.OutOfMemoryError as error:
        frames, height, width = batch[0].pixels.shape[:3]
        advice = " and ".join(filter(None, (lighter, "--batch_size 1" if len(batch) > 1 else "")))
        raise UserError(
            f"out of memory while encoding {len(batch)} x {frames} frame(s) of {width}x{height}; "
            f"use {advice or 'a smaller resolution or fewer target_frames'}."
        ) from error
    samples = []
    for prepared, mean, logvar in zip(batch, posterior.mean, posterior.logvar):
        digest = hashlib.sha256(os.fsencode(prepared.target.cache_path.name)).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        samples.append(DiagonalGaussian(mean, logvar).sample(generator))
    return samples


def pixels_to_input(prepared: Prepared, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Pixels (F, H, W, 3) uint8 -> (3, F, H, W) in [-1, 1]; scaled in float32, then cast, frame by frame."""
    pixels = torch.from_numpy(prepared.pixels).to(device).permute(3, 0, 1, 2)
    out = torch.empty(pixels.shape, dtype=dtype, device=device)
    for frame, place in zip(pixels.unbind(1), out.unbind(1)):
        place.copy_(frame.float().div_(127.5).sub_(1))
    return out


def collect_batches(results: Iterable[Result], batch_size: int) -> Iterator[list[Prepared] | Finished | Failure]:
    """Gather what can be encoded together, of one bucket and number of frames; other results pass at once.

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


def cache_batch(
    vae: AutoencoderKLCausal3D,
    fingerprint: str,
    batch: Sequence[Prepared],
    device: torch.device,
    dtype: torch.dtype,
    fit: VAEFit | None,
    lighter: str,
) -> Iterator[Target | Failure]:
    """Encode and save; yields each target that is cached, and a failure for latents that are not numbers. See ``encode``."""
    for prepared, latents in zip(batch, encode(vae, batch, device, dtype, fit, lighter)):
        target = prepared.target
        record = prepared.source.record() | latent_record(target.bucket, target.window, target.frame_rate, fingerprint)
        try:
            save_latents(target.cache_path, latents, target.original_size, target.window and target.frames, record)
        except NonFiniteError as error:
            yield Failure(target.item, f"{target.label}: {error}")
        else:
            yield target


def cache_dataset(
    args: argparse.Namespace,
    save: Callable[[Sequence[Prepared]], Iterable[Target | Failure]],
    fingerprint: str,
    items: Sequence[Item],
    report: DatasetReport,
) -> list[Failure]:
    """Cache one dataset, fill in its report, and return what failed. ``save``: ``cache_batch`` of the VAE of ``fingerprint``."""
    listing = list_caches(report.dataset)
    batch_size = min(args.batch_size or report.dataset.batch_size, report.dataset.batch_size)
    verdicts: dict[CacheKey, Verdict] = {}

    def wanted(target: Target) -> bool:  # called in threads, once for each target
        verdicts[target.key] = judge_latents(listing, target, fingerprint, args.skip_existing)
        return verdicts[target.key].reason is not None

    failures: list[Failure] = []
    called_for: dict[CacheKey, Path] = {}
    outcome = report.outcome = CachingOutcome(skipped=report.found - len(items))
    report.decoded = report.too_short = 0
    with ProgressBar(total=len(items), desc=report.dataset.label, unit="item") as progress:
        for result in collect_batches(prepare(items, args.num_workers, wanted), batch_size):
            if isinstance(result, list):
                for saved in save(result):
                    if isinstance(saved, Failure):
                        failures.append(saved)
                    else:
                        outcome.count(verdicts[saved.key].reason)
                continue
            progress.update()
            if isinstance(result, Failure):
                failures.append(result)
                continue
            report.decoded += result.decoded
            called_for |= {target.key: verdicts[target.key].path for target in result.targets}
            outcome.kept += sum(verdicts[target.key].reason is None for target in result.targets)
            if not result.targets:
                report.too_short += 1
                logger.warning("%s has fewer frames, at target_fps, than every target_frames and is left out.", result.item.path)
            elif result.targets[0].resampling is not None:
                report.resampled.setdefault(str(result.targets[0].resampling), []).append(result.item.path.name)
    failed = {failure.item.stem for failure in failures}
    report.failed = len(failed)
    orphans = orphaned_latents(report.dataset, called_for, failed) + abandoned_files(report.dataset)
    deal_with_orphans(report, orphans, args.remove_orphans)
    count_caches(report)
    return failures


def warn_of_empty_datasets(reports: Sequence[DatasetReport]) -> None:
    """Say which datasets got nothing where others got something: training refuses them."""
    if any(report.latents for report in reports):
        for report in reports:
            if not report.latents:
                logger.warning(
                    "%s has no latents: the table says what became of its items. Training needs some, or take the data set out.",
                    report.dataset.label,
                )


def main() -> int:
    """Parse, check, load, cache, report."""
    args = parse_with_config(build_parser())
    check_arguments(args)
    device = pick_device(args.device)
    dtype = choose_dtype(args.vae_dtype, "--vae_dtype", device, on_cuda=torch.float16)
    group = load_dataset_config(args.dataset_config)
    listed = [list_items(dataset) for dataset in group.datasets]
    reports = [report_items(dataset, items) for dataset, items in zip(group.datasets, listed)]
    print(format_table(reports), flush=True)
    require_items(reports)
    if args.debug_mode != "console":
        for dataset in group.datasets:
            require_writable_folder(dataset.cache_directory, f"cache_directory of {dataset.label}")

    failures: list[Failure] = []
    if args.debug_mode:
        failures = show_items(args, [item for items in listed for item in items])
    else:
        settled = [settle_captions(items, args.missing_caption) for items in listed]
        require_room(
            {
                dataset.cache_directory: missing_latents_bytes(dataset, items, dtype, args.num_workers)
                for dataset, items in zip(group.datasets, settled)
            },
            "the latents that are still to be cached take",
            "give another cache_directory",
        )
        warn_of_cpu(args.device, device)
        vae = hunyuan_model.load_vae(args.vae, device=device, dtype=dtype)
        configure_vae(vae, chunk_size=args.vae_chunk_size, tile_size=vae_tile_size(args))
        fingerprint = fingerprint_weights(args.vae, "--vae")
        fit = None if vae_settings_given(args) else VAEFit(vae, encode=True)
        save = partial(cache_batch, vae, fingerprint, device=device, dtype=dtype, fit=fit, lighter=next_vae_settings(args))
        for items, report in zip(settled, reports):
            failures += cache_dataset(args, save, fingerprint, items, report)
        print(format_table(reports), flush=True)
        warn_of_empty_datasets(reports)
    if failures:
        print(f"{len(failures)} failure(s):", file=sys.stderr)
    for failure in failures:
        print(f"  {failure.message}", file=sys.stderr)
    if not args.debug_mode:
        require_batches(reports)
    return STATUS_FAILED if failures else 0


if __name__ == "__main__":
    run_script(main)
