"""Train a LoRA (or another network) for HunyuanVideo on cached latents and text encoder outputs.

Run it with ``accelerate launch hv_train_network.py ...`` or, on one device, with plain ``python``.
"""

from __future__ import annotations

import utils.interrupts  # noqa: F401  # isort: skip

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import nn

import hunyuan_model
from dataset import load_dataset_config
from dataset.batches.batches import (
    Batch,
    CachedGroup,
    CachedItem,
    ShapeBatchSampler,
    find_cached_items,
    hold_out,
    require_model_sizes,
)
from dataset.batches.data_facts import data_facts
from dataset.batches.largest_batch import largest_batch
from dataset.batches.reading import EpochReader, HeldOut
from dataset.batches.report import report_cached_group
from dataset.cache.report import format_table, require_batches
from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime.arguments import kernel_settings, runtime_settings
from hunyuan_model.runtime.compilation import CompileWatch
from hunyuan_model.runtime.memory_plan import MemoryPlan
from hunyuan_model.runtime.memory_report import advice, explain_batch_out_of_memory, plan_table, sample_size
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.runtime.shared_memory import SharedMemory
from networks.lora import DEFAULT_RANK
from networks.lora_merging import merge_patch, read_lora_files
from networks.network_module import create_network, import_network_module, network_off, parameter_groups, require_switch
from networks.optional_methods import call_if_there
from networks.training.accelerator import base_dtype, compute_dtype, make_accelerator, save_dtype
from networks.training.arguments import attention_mode, build_training_parser, check_training_arguments
from networks.training.dry_step import dry_step, wants_dry_step
from networks.training.logging.logs import LogSettings, TrainingLogs, check_logs, open_logs
from networks.training.logging.loss_log import LossLog
from networks.training.loss.flow_matching import FlowMatching
from networks.training.loss.timestep_preview import show_timesteps
from networks.training.loss.timestep_sampling import TimestepSampler, TimestepSettings
from networks.training.optim.lr_schedules import ScheduleSettings, check_lr_scheduler, make_lr_scheduler
from networks.training.optim.optimizers import (
    OptimizerSettings,
    check_optimizer,
    learning_rates,
    make_optimizer,
    set_optimizer_mode,
    state_bytes_per_value,
)
from networks.training.preflight import check_model_and_network
from networks.training.requests import Request, TrainingRequests
from networks.training.run import (
    Training,
    batch_order,
    require_finite_weights,
    rotate,
    save,
    save_for_signal,
    save_model,
    save_training_state,
    steps_per_epoch,
    training_facts,
)
from networks.training.samples.arguments import sample_settings
from networks.training.samples.sampling import TrainingSamples, check_samples, prepare_samples
from networks.training.saving.disk_space import require_room_for_save
from networks.training.saving.files import SaveSettings, epoch_name, final_name, remove_leftovers, state_name, step_name
from networks.training.saving.metadata import new_session_id, training_metadata
from networks.training.saving.resume import (
    Resumed,
    ResumeSettings,
    check_resumed,
    find_resumed,
    is_complete,
    restore,
    state_identity,
)
from networks.training.saving.state import LATEST, Progress, check_state_can_be_saved, recover_state
from networks.training.shared_weights import shared_host_memory
from networks.training.skipped_steps import TrainingBroken, count_skipped
from networks.training.step import Step, train_step
from utils.cli.arguments import hide_secrets, public_flags, random_seed
from utils.cli.config_files import parse_with_config
from utils.cli.settings import settings_from
from utils.devices import explain_out_of_memory, pick_device
from utils.errors import STATUS_FAILED, STATUS_INTERRUPTED, STATUS_TERMINATED, name_some, run_script
from utils.free_memory import free_device_memory, free_host_memory
from utils.hub import HubSettings, open_uploads
from utils.key_values import parse_key_values
from utils.progress import ProgressBar

logger = logging.getLogger("train")


def build_parser() -> argparse.ArgumentParser:
    """Every flag of training."""
    return build_training_parser()


def batches_of_step(batches: Iterable[Batch], count: int) -> Iterator[list[Batch]]:
    """Group an epoch's batches into those of one optimiser step; the last group may be smaller."""
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, count)):
        yield group


def train(training: Training) -> int:
    """The loop: epochs of steps, saving as asked, and once at the end. Returns the exit status."""
    args, progress = training.args, training.progress
    training.network.train()
    set_optimizer_mode(training.optimizer, training=True)
    main_process = training.accelerator.is_main_process
    shown = training.accelerator.is_local_main_process
    loss_log = LossLog(args.loss_log if main_process else None, progress.step)
    requests = TrainingRequests(Path(args.output_dir), training.accelerator)
    bar = ProgressBar(total=training.steps, initial=progress.step, desc="training", unit="step", disable=not shown)
    with loss_log, requests, bar:
        if training.dry_batch is not None:
            compiling = CompileWatch()
            dry_step(training, training.dry_batch)
            compiling.tell("the dry step")
            training.dry_batch = None
        if progress.step == 0:
            make_samples(training, requests, progress.epoch)
        while progress.step < training.steps:
            request = train_epoch(training, requests, loss_log, bar)
            if request.stops:
                return stop(training, request)
        require_finite_weights(training)
        if training.saving.state_at_end:  # before the model, whose presence says that everything is done
            save_training_state(training, final_name(args.output_name))
        save_model(training, final_name(args.output_name), progress.epoch)
        make_samples(training, requests, progress.epoch, epoch_ended=progress.batches == len(training.reader))
    return 0


def train_epoch(training: Training, requests: TrainingRequests, loss_log: LossLog, bar: ProgressBar) -> Request:
    """The rest of the epoch under way, up to the last step of the training; returns early with a request to stop."""
    args, progress, rules = training.args, training.progress, training.saving
    name, epoch = args.output_name, progress.epoch
    if progress.batches == 0:
        training.flow_matching.timesteps.begin_epoch()
    call_if_there(training.network, "on_epoch_start", None, training.transformer)
    batches = training.reader.epoch(epoch - 1, progress.batches)
    started = time.monotonic()
    for group in batches_of_step(batches, args.gradient_accumulation_steps):
        rates = learning_rates(training.optimizer, training.group_names)  # of this step: the schedule moves on within it
        compiling = CompileWatch()
        with explain_batch_out_of_memory(training.memory, group, "training on"):
            step = train_step(training, group)
        seconds = time.monotonic() - started
        progress.step, progress.batches = progress.step + 1, progress.batches + len(group)
        compiling.tell(f"step {progress.step}")
        progress.skipped = count_skipped(progress.skipped, progress.step, step.skipped)
        if step.skipped is None:
            progress.losses = [*progress.losses, step.loss][-training.steps_per_epoch :]
        tell_of_step(training, step, rates, seconds, loss_log, bar)
        if progress.step == training.steps:
            return Request.NOTHING
        request, due = requests.poll(), rules.due_after_step(progress.step)
        if due or request in (Request.SAVE, Request.SAVE_AND_STOP):
            asked = request is not Request.NOTHING
            save(training, step_name(name, progress.step), epoch, rules.save_state or asked)
            if due:
                rotate(training, step=progress.step)
        elif request.is_signal:
            save_for_signal(training, step_name(name, progress.step), epoch)
        if request.stops:
            return request
        if progress.batches < len(training.reader):
            make_samples(training, requests, epoch)
        started = time.monotonic()
    progress.epoch, progress.batches = epoch + 1, 0
    if rules.due_after_epoch(epoch):
        save(training, epoch_name(name, epoch), epoch, rules.save_state)
        rotate(training, epoch=epoch)
    make_samples(training, requests, epoch, epoch_ended=True)
    return Request.NOTHING


def tell_of_step(
    training: Training, step: Step, rates: Mapping[str, float], seconds: float, loss_log: LossLog, bar: ProgressBar
) -> None:
    """Show and log the step that was just made, with the validation loss where it is due."""
    progress = training.progress
    average = sum(progress.losses) / max(1, len(progress.losses))
    bar.set_postfix(loss=f"{step.loss:.4f}", average=f"{average:.4f}")
    bar.update()
    held_out = training.validation_loss() if training.validation_due else None
    if held_out is not None:
        logger.info("step %d: validation loss %.6g", progress.step, held_out)
    loss_log.write(progress.step, progress.epoch, step.loss, average, next(iter(rates.values()), None), held_out)
    training.logs.step(
        progress.step,
        loss=step.loss,
        average=average,
        rates=rates,
        gradient_norm=step.gradient_norm,
        seconds=seconds,
        validation_loss=held_out,
    )


def make_samples(training: Training, requests: TrainingRequests, epoch: int, epoch_ended: bool = False) -> None:
    """Make and log samples if they are due; a request to stop gives them up."""
    saved = training.samples.sample_if_due(
        training.transformer,
        training.network,
        training.optimizer,
        training.flow_matching.dtype,
        step=training.progress.step,
        epoch=epoch,
        epoch_ended=epoch_ended,
        stop=lambda: requests.signalled,
    )
    training.logs.samples(saved, training.progress.step)


def stop(training: Training, request: Request) -> int:
    """Say where to go on from; returns the exit status that the request asks for."""
    model_name = step_name(training.args.output_name, training.progress.step)
    if training.accelerator.is_main_process:
        logger.info(
            "stopped after step %d of %d; go on with --resume %s",
            training.progress.step,
            training.steps,
            Path(training.args.output_dir) / state_name(model_name),
        )
    return {Request.INTERRUPT: STATUS_INTERRUPTED, Request.TERMINATE: STATUS_TERMINATED}.get(request, 0)


def load_base_model(
    args: argparse.Namespace,
    runtime: RuntimeSettings,
    device: torch.device,
    dtype: torch.dtype,
    shared: SharedMemory | None = None,
) -> nn.Module:
    """The frozen transformer, with --base_weights merged while it loads.

    Args:
        shared: for weights that are swapped.
    """
    bases = read_lora_files(args.base_weights, args.base_weights_multiplier, "--base_weights", "--base_weights_multiplier")
    patch = merge_patch(bases, args.dit) if bases else None
    return hunyuan_model.load_transformer(args.dit, device=device, dtype=dtype, runtime=runtime, shared=shared, patch=patch)


def prepare(
    args: argparse.Namespace,
    accelerator: Accelerator,
    reader: EpochReader,
    steps: int,
    groups: list[CachedGroup],
    samples: TrainingSamples,
    logs: TrainingLogs,
    memory: MemoryPlan,
    resumed: Resumed | None = None,
) -> Training:
    """Load the transformer, hook the network into it, and make what the loop needs; with ``resumed`` as it was saved."""
    module = import_network_module(args.network_module)
    network_args = parse_key_values(args.network_args, "--network_args")
    dtype = base_dtype(args, accelerator)
    runtime = memory.runtime
    layout = f"{dtype} {runtime.blocks_to_swap}"
    with shared_host_memory(accelerator, layout) if runtime.swaps else nullcontext() as shared:
        transformer = load_base_model(args, runtime, accelerator.device, dtype, shared)
    network = create_network(
        module,
        transformer,
        dim=args.network_dim,
        alpha=args.network_alpha,
        dropout=args.network_dropout,
        network_args=network_args,
        weights=args.network_weights,
        dim_from_weights=args.dim_from_weights,
        device=accelerator.device,
    )
    if any(group.dataset.prior_preservation for group in groups):
        require_switch(network, args.network_module)
    optimizer_groups, group_names = parameter_groups(network, args.learning_rate)
    optimizer = make_optimizer(settings_from(OptimizerSettings, args), optimizer_groups)
    # Before accelerate wraps the optimiser: the schedule watches the method that accelerate calls.
    lr_scheduler = make_lr_scheduler(settings_from(ScheduleSettings, args), optimizer, steps)
    rank_seed = args.seed + accelerator.process_index
    progress = Progress(started_at=time.time(), session_id=new_session_id())
    training = Training(
        args=args,
        accelerator=accelerator,
        transformer=transformer,
        network=network,
        optimizer=accelerator.prepare(optimizer),
        group_names=group_names,
        lr_scheduler=lr_scheduler,
        reader=reader,
        flow_matching=FlowMatching(
            transformer,
            accelerator,
            TimestepSampler(settings_from(TimestepSettings, args), torch.Generator().manual_seed(rank_seed)),
            noise=torch.Generator(accelerator.device).manual_seed(rank_seed),
            dtype=dtype,
            guidance_scale=args.guidance_scale,
            network_off=partial(network_off, network),
        ),
        steps=steps,
        saving=settings_from(SaveSettings, args),
        progress=progress,
        samples=samples,
        logs=logs,
        memory=memory,
    )
    if resumed is not None:
        order = batch_order(args, reader, accelerator)
        training.progress = restore(
            settings_from(ResumeSettings, args), resumed, training.restorable, order, public_flags(args), steps
        )
    training.progress.log_runs = logs.runs
    training.metadata = training_metadata(vars(args), training_facts(training, data_facts(groups), DEFAULT_RANK), network_args)
    return training


def main() -> int:
    args = parse_with_config(build_parser())
    hide_secrets(args)
    if args.show_timesteps:
        show_timesteps(args.show_timesteps, settings_from(TimestepSettings, args), args.output_dir)
        return 0
    check_training_arguments(args)
    for_samples = sample_settings(args, pick_device(None))
    prompts = check_samples(for_samples)
    check_logs(settings_from(LogSettings, args))
    made = [settings_from(settings, args) for settings in (TimestepSettings, ScheduleSettings, LogSettings)]
    for settings in (*made, for_samples):
        for sentence in settings.without_effect():
            logger.warning(sentence)
    planned = check_model_and_network(args)
    accelerator = make_accelerator(args)
    if not accelerator.is_main_process:
        logging.disable(logging.WARNING)  # one process says what all of them do
    kernel_settings(args).apply(accelerator.device)
    runtime = runtime_settings(args, attention_mode(args))
    runtime.check(accelerator.device, compute_dtype(args, accelerator), planned.config)
    groups = find_cached_items(load_dataset_config(args.dataset_config, require_media=False))
    reports = [report_cached_group(group) for group in groups]
    if accelerator.is_main_process:
        print(format_table(reports), flush=True)
    require_batches(reports)
    require_model_sizes(groups, planned.config.in_channels, planned.config.text_dim, planned.config.pooled_dim)

    if args.resume == LATEST and accelerator.is_main_process:
        recover_state(Path(args.output_dir), args.output_name)
    accelerator.wait_for_everyone()
    resuming = settings_from(ResumeSettings, args)
    resumed = find_resumed(resuming)
    if args.seed is None and resumed is not None:
        args.seed = resumed.state.seed
    if args.seed is None:
        args.seed = int(broadcast_object_list([random_seed()])[0])
        logger.info("seed %d", args.seed)
    set_seed(args.seed)
    held_out: list[CachedItem] = []
    if args.validation_split is not None:
        groups, held_out = hold_out(groups, args.validation_split, args.seed)
        logger.info("held out for validation: %s", name_some(item.latents_path.name for item in held_out))
    sampler = ShapeBatchSampler(groups, args.seed, accelerator.process_index, accelerator.num_processes)
    reader = EpochReader(groups, sampler, args.max_data_loader_n_workers, args.persistent_data_loader_workers)
    steps = args.max_train_epochs * steps_per_epoch(args, reader) if args.max_train_epochs else args.max_train_steps
    optimizer = check_optimizer(settings_from(OptimizerSettings, args), accelerator.device, planned.group_rates)
    lr_scheduler = check_lr_scheduler(settings_from(ScheduleSettings, args), optimizer, steps)
    check_state_can_be_saved(optimizer, lr_scheduler, wanted=args.save_state or args.save_state_on_train_end)
    if resumed is not None:
        check_resumed(resuming, resumed, state_identity(vars(args), planned.network, optimizer), public_flags(args), steps)
    if resuming.latest and is_complete(resuming, steps, resumed):
        logger.info("%s is complete: it was trained for %d steps", Path(args.output_dir) / final_name(args.output_name), steps)
        return 0
    if planned.size is not None and accelerator.is_main_process:
        require_room_for_save(
            Path(args.output_dir),
            planned.size.model_bytes(save_dtype(args, accelerator)),
            planned.size.state_bytes(state_bytes_per_value(optimizer)) if settings_from(SaveSettings, args).state_at_end else 0,
        )
    largest = largest_batch(groups, planned.config)
    sizes = [sample_size(prompt.height, prompt.width, prompt.frame_count) for prompt in prompts]
    free = free_device_memory(accelerator.device)
    memory = MemoryPlan(
        planned.config,
        accelerator.device,
        runtime,
        largest.size,
        base_dtype(args, accelerator),
        compute_dtype(args, accelerator),
        None if planned.size is None else planned.size.values,
        state_bytes_per_value(optimizer),
        sample=max(sizes, key=lambda size: size.tokens(planned.config), default=None),
        may_quantize=not args.network_module.startswith("lycoris"),
    ).resolved(free)
    if accelerator.is_main_process:
        print(plan_table(memory, free, free_host_memory()), flush=True)
    # auto goes by the GPU of each process
    if (most := max(gather_object([memory.runtime.blocks_to_swap]))) > memory.runtime.blocks_to_swap:
        logger.info("--blocks_to_swap auto: %d, for the GPU with the least free memory", most)
        memory = memory.with_blocks(most)
    uploads = open_uploads(settings_from(HubSettings, args)) if accelerator.is_main_process else None
    if accelerator.is_main_process:
        remove_leftovers(Path(args.output_dir), args.output_name)

    if accelerator.device.type == "cpu":
        logger.warning("training on the CPU, which the real model makes very slow.")
    same_run = resumed is not None and resumed.state.flags.get("output_name") == args.output_name
    logs = open_logs(
        settings_from(LogSettings, args),
        accelerator.device,
        main_process=accelerator.is_main_process,
        flags=public_flags(args),
        runs=resumed.state.progress.log_runs if same_run else None,
        step=resumed.state.progress.step if same_run else 0,
    )
    with logs, explain_out_of_memory("training", lambda: advice(memory), accelerator.device):
        samples = prepare_samples(for_samples, prompts, accelerator, planned.config)
        training = prepare(args, accelerator, reader, steps, groups, samples, logs, memory, resumed)
        training.held_out = HeldOut(held_out)
        training.uploads = uploads
        training.dry_batch = largest.load() if wants_dry_step(args.dry_step, accelerator.device) else None
        logger.info(
            "%d batches per epoch, %d per step; %d steps; %d trainable parameters; base model in %s%s",
            len(reader),
            args.gradient_accumulation_steps,
            steps,
            sum(parameter.numel() for parameter in training.network.parameters() if parameter.requires_grad),
            training.flow_matching.dtype,
            "" if memory.runtime.weights is WeightFormat.PLAIN else f" with {memory.runtime.weights.value} weights",
        )
        try:
            status = train(training)
            if uploads is not None:
                uploads.finish()
            return status
        except TrainingBroken as error:
            print(f"error: {error}", file=sys.stderr)
            return STATUS_FAILED
        except RuntimeError as error:
            raise reader.explain(error) from error


if __name__ == "__main__":
    run_script(main)
