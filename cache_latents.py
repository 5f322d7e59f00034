"""Cache the VAE latents of every picture and clip of a dataset, so that training needs neither media nor VAE.

Threads decode and resize while the VAE encodes. Items that cannot be read are listed at the end and do not stop the others.
"""

from __future__ import annotations

import utils.startup  # noqa: F401  # isort: skip

import argparse
import logging

from dataset.arguments import add_dataset_arguments
from dataset.cache.caching import CachingSettings, Job, close_job, open_caching, open_jobs, print_failures
from dataset.cache.debug_view import CONSOLE_BACKS, ViewSettings, show_items
from dataset.cache.freshness import Verdict, judge_latents
from dataset.cache.latents import LatentEncoder, collect_batches
from dataset.cache.names import CacheKey, list_caches
from dataset.cache.preparation import Failure, Target, prepare
from dataset.cache.report import CachingOutcome, format_table, require_batches
from hunyuan_model.vae.arguments import add_vae_arguments, vae_settings
from hunyuan_model.vae.loading import check_vae_file
from utils.cli.arguments import add_device_argument, int_up_to, positive_int, script_parser
from utils.cli.config_files import add_config_file_argument, parse_with_config
from utils.cli.settings import settings_from
from utils.devices import pick_device, warn_of_cpu
from utils.errors import UserError, run_script
from utils.output import show
from utils.progress import ProgressBar

logger = logging.getLogger("cache_latents")

MAX_CONSOLE_WIDTH = 1000  # more than any terminal has; every character of a picture costs 40 bytes


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
        help="write contact sheets (image), or clips as MP4 (video), to the folder debug in the cache directory, or print in the "
        "terminal (console) (default: cache latents)",
    )
    debug.add_argument("--console_width", type=int_up_to(MAX_CONSOLE_WIDTH), metavar="N", help="columns of a picture (default: 80)")
    debug.add_argument(
        "--console_back",
        type=str.upper,
        choices=CONSOLE_BACKS,
        help="characters on a background of this colour (default: in half blocks, which cover it)",
    )
    debug.add_argument("--console_num_images", type=positive_int, metavar="N", help="print only the first N (default: all)")
    return parser


def warn_of_flags_without_effect(args: argparse.Namespace) -> None:
    """Flags of caching while looking at the data, and the other way round."""
    unused = {f"--{name}": "with --debug_mode" for name in ("skip_existing", "remove_orphans") if args.debug_mode}
    if args.debug_mode != "console":
        unused |= dict.fromkeys(("--console_width", "--console_back", "--console_num_images"), "without --debug_mode console")
    for flag, when in unused.items():
        if getattr(args, flag[2:]):
            logger.warning("%s has no effect %s.", flag, when)


def cache_dataset(settings: CachingSettings, encoder: LatentEncoder, job: Job) -> list[Failure]:
    """Cache one dataset, fill in its report, and return what failed."""
    report, listing = job.report, list_caches(job.dataset)
    batch_size = min(settings.batch_size or job.dataset.batch_size, job.dataset.batch_size)
    verdicts: dict[CacheKey, Verdict] = {}

    def wanted(target: Target) -> bool:  # called in threads, once for each target
        verdicts[target.key] = judge_latents(listing, target, encoder.fingerprint, settings.skip_existing)
        return verdicts[target.key].reason is not None

    failures: list[Failure] = []
    called_for = []
    outcome = report.outcome = CachingOutcome(skipped=report.found - len(job.items))
    report.decoded = report.too_short = 0
    with ProgressBar(total=len(job.items), desc=job.dataset.label, unit="item") as progress:
        for result in collect_batches(prepare(job.items, settings.num_workers, wanted), batch_size):
            if isinstance(result, list):
                for saved in encoder.save(result):
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
            if not result.targets:
                report.too_short += 1
                logger.warning("%s has fewer frames, at target_fps, than every target_frames and is left out.", result.item.path)
            else:
                report.note_changes(result.item, result.targets[0].changes)
            judged = [verdicts[target.key] for target in result.targets]
            called_for += [verdict.path for verdict in judged]
            outcome.kept += sum(verdict.reason is None for verdict in judged)
    unknown = {failure.item.stem for failure in failures}
    there = (path for (stem, _), paths in list_caches(job.dataset).latents.items() if stem not in unknown for path in paths)
    close_job(job, failures, there, called_for, settings.remove_orphans)
    return failures


def main() -> int:
    """Settings, data, VAE, one dataset after the other, report."""
    args = parse_with_config(build_parser())
    settings, view = settings_from(CachingSettings, args), settings_from(ViewSettings, args)
    warn_of_flags_without_effect(args)
    device = pick_device(args.device)
    vae = vae_settings(args, device)
    if view.debug_mode:
        jobs = open_jobs(settings.dataset_config, writes=view.debug_mode != "console")
        return print_failures(show_items([item for job in jobs for item in job.items], view, settings.num_workers))
    if vae.vae is None:
        raise UserError("--vae is missing: give the VAE checkpoint, or --debug_mode to look at the data only.")
    check_vae_file(vae.vae)

    with open_caching(settings, "latents") as jobs:
        warn_of_cpu(args.device, device)
        encoder = LatentEncoder.load(vae, device)
        failures = [failure for job in jobs for failure in cache_dataset(settings, encoder, job)]

    reports = [job.report for job in jobs]
    show(format_table(reports))
    status = print_failures(failures)
    require_batches(reports)
    return status


if __name__ == "__main__":
    run_script(main)
