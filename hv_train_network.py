"""Train a LoRA (or another network) for HunyuanVideo on cached latents and text encoder outputs.

Run it with ``accelerate launch hv_train_network.py ...`` or, on one device, with plain ``python``.
"""

from __future__ import annotations

import utils.startup  # noqa: F401  # isort: skip

import argparse
import logging

from accelerate import Accelerator
from accelerate.utils import set_seed

from dataset import load_dataset_config
from dataset.batches.batches import largest_batch
from dataset.batches.cached_items import find_cached_items, hold_out, require_model_sizes
from dataset.batches.order import BatchOrder
from dataset.batches.reading import EpochReader, HeldOut
from dataset.batches.report import data_facts, report_cached_group
from dataset.cache.report import format_table, require_batches
from hunyuan_model.runtime.memory_report import advice
from hunyuan_model.transformer.config import TransformerConfig
from networks.training.accelerator import make_accelerator, with_sharding
from networks.training.arguments import build_training_parser, training_settings
from networks.training.build import build_training, open_run_logs
from networks.training.data import TrainingData
from networks.training.loop import run_training
from networks.training.loss.timestep_preview import show_timesteps
from networks.training.loss.timestep_sampling import TimestepSettings
from networks.training.preflight import find_beginning, inspect_model, preflight
from networks.training.saving.lock import sole_training
from networks.training.saving.models import add_missing_copies
from networks.training.settings import TrainingSettings
from utils.cli.config_files import parse_with_config
from utils.cli.settings import settings_from
from utils.devices import explain_out_of_memory
from utils.errors import name_some, run_script
from utils.output import show

logger = logging.getLogger("train")

NOTEWORTHY = 0.01  # of the time


def build_parser() -> argparse.ArgumentParser:
    """Every flag of training."""
    return build_training_parser()


def open_training_data(settings: TrainingSettings, config: TransformerConfig, seed: int, accelerator: Accelerator) -> TrainingData:
    """The caches of the datasets, in the order in which this process takes its batches; a table of them is printed.

    Args:
        config: of the transformer, which the caches must fit.

    Raises:
        UserError: a dataset config or caches that cannot be trained on.
    """
    groups = find_cached_items(load_dataset_config(settings.dataset_config, require_media=False))
    reports = [report_cached_group(group) for group in groups]
    table = format_table(reports)
    if accelerator.is_main_process:
        show(table)
    require_batches(reports)
    require_model_sizes(groups, config.in_channels, config.text_dim, config.pooled_dim)
    loop, held_out = settings.loop, []
    if loop.validation_split is not None:
        groups, held_out = hold_out(groups, loop.validation_split, seed)
        logger.info("held out for validation: %s", name_some(item.latents_path.name for item in held_out))
    processes = accelerator.num_processes
    order = BatchOrder(groups, seed, loop.gradient_accumulation_steps, accelerator.process_index, processes)
    if processes > 1 and (share := order.imbalance()) >= NOTEWORTHY:
        few = f"an epoch has {len(order)} batch(es) for {processes} processes"
        why = few if len(order) < processes else "batches differ in size"
        logger.info("the processes wait for each other for about %.0f %% of the time: %s", 100 * share, why)
    return TrainingData(
        reader=EpochReader(groups, order, loop.max_data_loader_n_workers, loop.persistent_data_loader_workers),
        largest=largest_batch(groups, config),
        facts=data_facts(groups),
        table=table,
        held_out=HeldOut(held_out),
        prior_preservation=any(group.dataset.prior_preservation for group in groups),
    )


def train(settings: TrainingSettings, accelerator: Accelerator) -> int:
    """Check everything, then train. Returns the exit status.

    Raises:
        UserError: settings, files, memory or a disk that do not suffice.
    """
    if not accelerator.is_main_process:
        logging.disable(logging.WARNING)  # one process says what all of them do
    model = inspect_model(settings, accelerator)
    beginning = find_beginning(settings, model, accelerator)
    set_seed(beginning.seed)
    data = open_training_data(settings, model.config, beginning.seed, accelerator)
    plan = preflight(settings, model, beginning, data, accelerator)
    if plan.complete:
        if accelerator.is_main_process:
            add_missing_copies(settings.resuming.final_model, settings.saving)
        logger.info("%s is complete: it was trained for %d steps", settings.resuming.final_model, plan.steps)
        return 0
    if accelerator.device.type == "cpu":
        logger.warning("training on the CPU, which the real model makes very slow.")
    with (
        open_run_logs(settings, plan, accelerator) as logs,
        explain_out_of_memory("training", lambda: advice(plan.memory), *plan.memory.devices),
    ):
        return run_training(build_training(settings, plan, data, logs, accelerator))


def main() -> int:
    args = parse_with_config(build_parser())
    if args.show_timesteps:
        show_timesteps(args.show_timesteps, settings_from(TimestepSettings, args), args.output_dir)
        return 0
    settings = training_settings(args)
    accelerator = make_accelerator(settings)
    settings = with_sharding(settings, accelerator)
    with sole_training(settings.saving, accelerator):
        status = train(settings, accelerator)
    accelerator.end_training()  # Python must not end before the threads of the process group: they would abort the process
    return status


if __name__ == "__main__":
    run_script(main)
