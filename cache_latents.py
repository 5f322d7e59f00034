"""Cache the VAE latents of every picture and clip of a dataset, so that training needs neither media nor VAE.

Threads decode and resize while the VAE encodes. Items that cannot be read are listed at the end and do not stop the others.
"""

from __future__ import annotations

import utils.startup  # noqa: F401  # isort: skip

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import hunyuan_model
from dataset.arguments import add_dataset_arguments
from dataset.cache.caching import CachingSettings, Job, close_job, open_caching, open_jobs, print_failures, require_seen
from dataset.cache.debug_view import CONSOLE_BACKS, ViewSettings, show_items
from dataset.cache.freshness import Verdict, judge_latents
from dataset.cache.latents import LatentEncoder, collect_batches
from dataset.cache.names import CacheKey, list_caches
from dataset.cache.preparation import Failure, Target, prepare
from dataset.cache.report import DatasetReport, format_table, require_batches
from dataset.cache.sharing import share_items
from dataset.items import Item
from dataset.preview.decoded import CacheDecoder
from dataset.preview.page import CountTokens, write_preview
from hunyuan_model.text.arguments import TextEncoderSettings, add_text_encoder_arguments
from hunyuan_model.vae.arguments import add_vae_arguments, vae_settings
from hunyuan_model.vae.loading import check_vae_file
from hunyuan_model.vae.memory import VAESettings
from utils.cli.arguments import add_device_argument, int_up_to, positive_int, script_parser
from utils.cli.config_files import add_config_file_argument, parse_with_config
from utils.cli.settings import settings_from
from utils.devices import pick_device, warn_of_cpu
from utils.errors import UserError, run_script
from utils.output import show
from utils.processes.ranks import Ranks, joined_ranks
from utils.processes.watchdog import OTHERS, Watchdog
from utils.progress import ProgressBar

logger = logging.getLogger("cache_latents")

TOKEN_FLAGS = ("--text_encoder1", "--text_encoder2", "--tokenizer1", "--tokenizer2")
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
        choices=("html", "image", "video", "console"),
        help="write one page for a browser (html), contact sheets (image), or clips as MP4 (video), to the folder debug in the "
        "cache directory, or print in the terminal (console) (default: cache latents)",
    )
    debug.add_argument("--console_width", type=int_up_to(MAX_CONSOLE_WIDTH), metavar="N", help="columns of a picture (default: 80)")
    debug.add_argument(
        "--console_back",
        type=str.upper,
        choices=CONSOLE_BACKS,
        help="characters on a background of this colour (default: in half blocks, which cover it)",
    )
    debug.add_argument("--console_num_images", type=positive_int, metavar="N", help="print only the first N (default: all)")
    debug.add_argument(
        "--preview_latents",
        action="store_true",
        help="with --debug_mode html, show what --vae decodes from the latent caches, as the network sees it (default: the media)",
    )
    tokens = parser.add_argument_group("token counts of captions, for --debug_mode html")
    add_text_encoder_arguments(tokens, required=False, weights=False)
    return parser


def warn_of_flags_without_effect(args: argparse.Namespace) -> None:
    """Flags of caching while looking at the data, and the other way round."""
    unused = {f"--{name}": "with --debug_mode" for name in ("skip_existing", "remove_orphans") if args.debug_mode}
    if args.debug_mode != "console":
        unused |= dict.fromkeys(("--console_width", "--console_back", "--console_num_images"), "without --debug_mode console")
    if args.debug_mode != "html":
        unused |= dict.fromkeys(TOKEN_FLAGS, "without --debug_mode html")
    for flag, when in unused.items():
        if getattr(args, flag[2:]):
            logger.warning("%s has no effect %s.", flag, when)


Done = tuple[DatasetReport, list[Failure], list[Path]]
"""Counts, what failed, and the cache files that are there."""


class LatentJob:
    """Caches the latents of one dataset, or a share of them.

    Attributes:
        failures: what failed.
        called_for: the cache file of each picture or window that was looked at.
    """

    def __init__(self, job: Job, encoder: LatentEncoder, skip_existing: bool) -> None:
        self.job, self.failures, self.called_for = job, [], []
        self._encoder, self._skip_existing, self._listing = encoder, skip_existing, list_caches(job.dataset)
        self._verdicts: dict[CacheKey, Verdict] = {}

    def wants(self, target: Target) -> bool:
        """Whether it has to be made. Called in threads."""
        verdict = judge_latents(self._listing, target, self._encoder.fingerprint, self._skip_existing)
        self._verdicts[target.key] = verdict
        return verdict.reason is not None

    def run(self, items: Sequence[Item], settings: CachingSettings, ranks: Ranks, watchdog: Watchdog) -> None:
        """Cache ``items``, and fill in the report."""
        report, dataset, verdicts = self.job.report, self.job.dataset, self._verdicts
        batch_size = min(settings.batch_size or dataset.batch_size, dataset.batch_size)
        report.decoded = report.too_short = 0
        share = f", 1 of {ranks.count} shares" if ranks.count > 1 else ""
        with ProgressBar(total=len(items), desc=f"{dataset.label}{share}", unit="item", disable=not ranks.is_main) as progress:
            results = prepare(items, settings.num_workers, self.wants, watchdog)
            for result in collect_batches(results, batch_size):
                if isinstance(result, list):
                    with watchdog.during("encoding", result[0].target.label.__str__):
                        done = list(self._encoder.save(result))
                    for saved in done:
                        if isinstance(saved, Failure):
                            self.failures.append(saved)
                        else:
                            report.outcome.count(verdicts[saved.key].reason)
                    continue
                progress.update()
                if isinstance(result, Failure):
                    self.failures.append(result)
                    continue
                report.decoded += result.decoded
                if not result.targets:
                    report.too_short += 1
                    message = "%s has fewer frames, at target_fps, than every target_frames and is left out."
                    logger.warning(message, result.item.path)
                else:
                    report.note_changes(result.item, result.targets[0].changes)
                judged = [verdicts[target.key] for target in result.targets]
                self.called_for += [verdict.path for verdict in judged]
                report.outcome.kept += sum(verdict.reason is None for verdict in judged)

    def done(self) -> Done:
        """What another process adds to its own."""
        return self.job.report, self.failures, [path for path in self.called_for if path.exists()]

    def add(self, done: Done) -> None:
        """Add what another process did, and wait for its files."""
        report, failures, written = done
        require_seen(written)
        self.job.report.add(report)
        places = {item: place for place, item in enumerate(self.job.items)}
        self.failures = sorted([*self.failures, *failures], key=lambda failure: places[failure.item])
        self.called_for += written

    def close(self, remove_orphans: bool) -> None:
        """As ``close_job``."""
        unknown = {failure.item.stem for failure in self.failures}
        listed = list_caches(self.job.dataset).latents.items()
        there = (path for (stem, _), paths in listed if stem not in unknown for path in paths)
        close_job(self.job, self.failures, there, self.called_for, remove_orphans)


def cache(settings: CachingSettings, encoder: LatentEncoder, jobs: Sequence[Job], ranks: Ranks) -> list[Failure]:
    """Cache all datasets, each process its share, and fill in the reports of the main process; returns what failed."""
    works = [LatentJob(job, encoder, settings.skip_existing) for job in jobs]
    shares = share_items([job.items for job in jobs], ranks, settings.num_workers, [work.wants for work in works])
    with Watchdog(process=ranks.index) as watchdog:
        for work, items in zip(works, shares):
            work.run(items, settings, ranks, watchdog)
        with watchdog.during(OTHERS):
            _, *others = ranks.gather([work.done() for work in works])
    for work, *done in zip(works, *others) if ranks.is_main else ():
        for each in done:
            work.add(each)
        work.close(settings.remove_orphans)
    return [failure for work in works for failure in work.failures]


def token_counter(args: argparse.Namespace) -> CountTokens | None:
    """What counts the tokens of captions by the flags of the text encoders, of which no weights are read."""
    if not any(getattr(args, flag[2:]) for flag in TOKEN_FLAGS):
        return None
    if not (args.text_encoder1 and args.text_encoder2):
        raise UserError("to count tokens, give both --text_encoder1 and --text_encoder2, or neither.")
    tokenizers = hunyuan_model.load_tokenizers(settings_from(TextEncoderSettings, args, text_encoder_dtype=torch.float32))
    return partial(hunyuan_model.text_lengths, tokenizers=tokenizers)


def look(
    settings: CachingSettings, view: ViewSettings, vae: VAESettings, device: torch.device, count_tokens: CountTokens | None
) -> int:
    """Show the data, in this process alone."""
    if view.preview_latents:
        if vae.vae is None:
            raise UserError("--preview_latents needs --vae: give the VAE checkpoint that made the latents.")
        check_vae_file(vae.vae)
    jobs = open_jobs(settings.dataset_config, writes=view.debug_mode != "console")
    if view.debug_mode != "html":
        return print_failures(show_items([item for job in jobs for item in job.items], view, settings.num_workers))
    decoder = CacheDecoder.load(vae, device) if view.preview_latents else None
    path, failures = write_preview(jobs, settings.dataset_config, settings.num_workers, count_tokens, decoder)
    status = print_failures(failures)
    show(path)
    return status


def main() -> int:
    """Settings, data, VAE, one dataset after the other, report."""
    args = parse_with_config(build_parser())
    with joined_ranks(args.device) as ranks:
        settings, view = settings_from(CachingSettings, args), settings_from(ViewSettings, args)
        warn_of_flags_without_effect(args)
        device = pick_device(args.device, ranks)
        vae = vae_settings(args, device)
        if view.preview_latents:
            warn_of_cpu(args.device, device)
        if view.debug_mode:
            return look(settings, view, vae, device, token_counter(args)) if ranks.is_main else 0
        if vae.vae is None:
            raise UserError("--vae is missing: give the VAE checkpoint, or --debug_mode to look at the data only.")
        check_vae_file(vae.vae)

        with open_caching(settings, "latents", ranks) as jobs:
            warn_of_cpu(args.device, device)
            failures = cache(settings, LatentEncoder.load(vae, device), jobs, ranks)
        if not ranks.is_main:
            return 0
        reports = [job.report for job in jobs]
        show(format_table(reports))
        status = print_failures(failures)
        require_batches(reports)
        return status


if __name__ == "__main__":
    run_script(main)
