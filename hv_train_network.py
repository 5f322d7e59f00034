"""Train a LoRA (or another network) for HunyuanVideo on cached latents and text encoder outputs.

Run it with ``accelerate launch hv_train_network.py ...`` or, on one device, with plain ``python``.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, set_seed
from torch import nn
from tqdm import tqdm

import hunyuan_model
from dataset import load_dataset_config
from dataset.batches import (
    Batch,
    CachedDataset,
    CachedGroup,
    CachedItem,
    ShapeBatchSampler,
    collate,
    find_cached_items,
    hold_out,
    require_model_sizes,
)
from dataset.items import name_some
from dataset.reading import EpochReader
from dataset.report import format_table, report_cached_group, require_batches
from hunyuan_model.flow import TIMESTEPS
from hunyuan_model.gradient_checkpointing import enable_gradient_checkpointing
from networks.lora import DEFAULT_RANK
from networks.lora_merging import merge_patch, read_lora_files
from networks.network_checks import check_model_and_network
from networks.network_module import call_if_there, create_network, import_network_module, parameter_groups
from utils.arguments import drawn_seed, public_flags
from utils.config_files import parse_with_config
from utils.devices import choose_dtype, out_of_memory_says
from utils.errors import STATUS_FAILED, STATUS_INTERRUPTED, STATUS_TERMINATED, UserError, first_line, run_script
from utils.files import require_writable_folder
from utils.flow_matching import FlowMatching
from utils.hub import HubUploads
from utils.key_values import parse_key_values
from utils.loss_log import LossLog
from utils.lr_schedules import check_lr_scheduler, make_lr_scheduler, step_schedule
from utils.optimizers import check_optimizer, describe_optimizer, make_optimizer, set_optimizer_mode
from utils.skipped_steps import SkippedSteps, TrainingBroken
from utils.timestep_preview import save_timestep_image, timestep_chart
from utils.timestep_sampling import TimestepSampler, TimestepSettings
from utils.training_arguments import attention_mode, build_training_parser, check_training_arguments
from utils.training_files import (
    SaveRules,
    epoch_name,
    final_name,
    remove_leftovers,
    remove_outdated,
    save_network,
    state_name,
    step_name,
)
from utils.training_logs import TrainingLogs, check_logs, learning_rates, open_logs
from utils.training_metadata import TrainingFacts, finished_metadata, new_session_id, training_metadata
from utils.training_pause import evaluation_weights, paused_training
from utils.training_requests import Request, TrainingRequests
from utils.training_resume import Resumed, check_resumed, find_resumed, is_complete, restore, state_identity
from utils.training_samples import TrainingSamples, check_samples, prepare_samples
from utils.training_state import (
    LATEST,
    Progress,
    Restorable,
    StateFile,
    plain_state,
    recover_state,
    save_state,
)

logger = logging.getLogger("train")

TRAINING_MEMORY_ADVICE = "use --fp8_base, --gradient_checkpointing, a smaller batch_size, fewer frames or a smaller resolution"
SAVE_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_parser() -> argparse.ArgumentParser:
    """Every flag of training."""
    return build_training_parser()


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerate's view of devices, processes and precision. Accumulation is the loop's business, not accelerate's."""
    try:
        handlers = [InitProcessGroupKwargs(timeout=timedelta(minutes=args.ddp_timeout))] if args.ddp_timeout else []
        accelerator = Accelerator(mixed_precision=args.mixed_precision, kwargs_handlers=handlers)
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate refuses this setup: {first_line(error).rstrip('.')}.") from error
    if accelerator.mixed_precision not in SAVE_DTYPES:
        raise UserError(
            f"accelerate was launched with --mixed_precision {accelerator.mixed_precision}, in which nothing can be trained here. "
            "Use bf16; --fp8_base keeps the frozen weights in float8."
        )
    return accelerator


@dataclass(frozen=True)
class Step:
    """What an optimiser step came to.

    Attributes:
        loss: mean over its batches; not finite where the step was skipped for that.
        gradient_norm: before clipping.
        skipped: why nothing was learnt from it, or None.
    """

    loss: float
    gradient_norm: float
    skipped: str | None = None


@dataclass
class Training:
    """What the loop works on."""

    args: argparse.Namespace
    accelerator: Accelerator
    transformer: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    group_names: list[str]
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    reader: EpochReader
    flow_matching: FlowMatching
    steps: int
    save_rules: SaveRules
    progress: Progress
    samples: TrainingSamples
    logs: TrainingLogs
    metadata: dict[str, str] = field(default_factory=dict)
    skipped_steps: SkippedSteps = field(default_factory=SkippedSteps)
    uploads: HubUploads | None = None
    held_out: CachedDataset = field(default_factory=lambda: CachedDataset(()))

    @property
    def restorable(self) -> Restorable:
        """What a state holds of it."""
        loss = self.flow_matching
        return Restorable(self.network, self.optimizer, self.lr_scheduler, loss.noise, loss.timesteps, self.accelerator)

    def paused(self) -> AbstractContextManager[None]:
        """For using the network inside without changing the training."""
        return paused_training(self.transformer, self.network, self.optimizer, self.accelerator.device)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return steps_per_epoch(self.args, self.reader)


def steps_per_epoch(args: argparse.Namespace, reader: EpochReader) -> int:
    """Optimiser steps of an epoch; the last one may accumulate fewer batches than the others."""
    return -(-len(reader) // args.gradient_accumulation_steps)


def batches_of_step(batches: Iterable[Batch], count: int) -> Iterator[list[Batch]]:
    """Group an epoch's batches into those of one optimiser step; the last group may be smaller."""
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, count)):
        yield group


def validation_loss(training: Training) -> float:
    """The loss on what was held out; the training stays as it is."""
    items = (collate([training.held_out[index]]) for index in range(len(training.held_out)))
    with training.paused():
        return training.flow_matching.validation_loss(items)


def average_gradients(accelerator: Accelerator, network: nn.Module) -> None:
    """Give every process the mean gradients. The network is hooked into the transformer's layers: no wrapper can do this."""
    if accelerator.num_processes == 1:
        return
    for parameter in network.parameters():
        if parameter.requires_grad:
            # Dropout may leave a layer out on one process only; all of them must still take part.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(gradient, reduction="mean")


def train_step(training: Training, batches: list[Batch]) -> Step:
    """One optimiser step over the batches it accumulates. A loss or a gradient that is not finite spoils nothing: it is skipped."""
    accelerator, network, args = training.accelerator, training.network, training.args
    call_if_there(network, "on_step_start")
    total, spoiled, learnt = 0.0, None, []
    for batch in batches:
        loss, t = training.flow_matching.loss(batch)
        total += loss.item() / len(batches)
        timesteps = ", ".join(f"{value * TIMESTEPS:.0f}" for value in t.tolist())
        learnt.append(f"{', '.join(batch['names'])} at timestep {timesteps}")
        if not torch.isfinite(loss):
            spoiled = spoiled or f"the loss is {loss.item()} for {learnt[-1]}"
        elif spoiled is None and loss.requires_grad:  # not where dropout leaves out the whole network
            accelerator.backward(loss / len(batches))
    if any_process(accelerator, spoiled is not None):
        training.optimizer.zero_grad(set_to_none=True)
        return Step(total, math.nan, spoiled or "the loss is not finite in another process")
    if not any_process(accelerator, any(parameter.grad is not None for parameter in network.parameters())):
        step_schedule(training.lr_scheduler, total)  # dropout left out the whole network
        return Step(total, 0.0)
    average_gradients(accelerator, network)
    norm = accelerator.clip_grad_norm_(network.parameters(), args.max_grad_norm or math.inf)
    norm = math.nan if norm is None else float(norm)
    if not math.isfinite(norm) and accelerator.scaler is None:  # a scaler finds out by itself, and tries a smaller scale
        training.optimizer.zero_grad(set_to_none=True)
        return Step(total, norm, f"the gradient is not finite for {', '.join(learnt)}")
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    if accelerator.optimizer_step_was_skipped:
        return Step(total, norm, f"the gradient is too large for fp16, whose scale is halved, for {', '.join(learnt)}")
    step_schedule(training.lr_scheduler, total)
    if args.scale_weight_norms:
        call_if_there(network, "apply_max_norm_regularization", args.scale_weight_norms, accelerator.device)
    return Step(total, norm)


def any_process(accelerator: Accelerator, here: bool) -> bool:
    """Whether something is so on any process; all must ask together."""
    if accelerator.num_processes == 1:
        return here
    return bool(accelerator.gather(torch.tensor([int(here)], device=accelerator.device)).max())


def save_model(training: Training, file_name: str, epoch: int) -> None:
    """Save the network under the output folder, on the main process only."""
    if not training.accelerator.is_main_process:
        return
    metadata = finished_metadata(training.metadata, steps=training.progress.step, epoch=epoch, now=time.time())
    dtype = save_dtype(training.args, training.accelerator)
    with evaluation_weights(training.optimizer):
        path = save_network(training.network, Path(training.args.output_dir) / file_name, dtype, metadata)
    if training.uploads is not None:
        training.uploads.upload(path)


def save_dtype(args: argparse.Namespace, accelerator: Accelerator) -> torch.dtype:
    """Of saved models: --save_precision, else the mixed precision's."""
    return SAVE_DTYPES["no" if args.save_precision == "float" else args.save_precision or accelerator.mixed_precision]


def save_training_state(training: Training, model_name: str) -> None:
    """Save the state that belongs to a model's name; all processes together."""
    args = training.args
    state = StateFile(
        progress=training.progress,
        seed=args.seed,
        identity=state_identity(args, training.network, training.optimizer),
        order=batch_order(args, training.reader, training.accelerator),
        flags=public_flags(args),
        saved_at=time.time(),
    )
    folder = Path(args.output_dir) / state_name(model_name)
    save_state(folder, training.restorable, state)
    if training.uploads is not None and training.uploads.states_too:
        training.uploads.upload(folder)


def batch_order(args: argparse.Namespace, reader: EpochReader, accelerator: Accelerator) -> dict[str, object]:
    """What the place inside an epoch depends on, besides the seed."""
    return {
        "data sets": reader.fingerprint(),
        "--gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": accelerator.num_processes,
    }


def save(training: Training, file_name: str, epoch: int, with_state: bool) -> None:
    """Save the model, and the state beside it.

    Raises:
        TrainingBroken: the weights are spoiled; what was saved before them stays.
    """
    require_finite_weights(training)
    save_model(training, file_name, epoch)
    if with_state:
        save_training_state(training, file_name)


def save_for_signal(training: Training, file_name: str, epoch: int) -> None:
    """Save the state; where that cannot be done, at least the model.

    Raises:
        UserError: the state could not be saved; the model was, if anything could.
        TrainingBroken: see ``require_finite_weights``.
    """
    require_finite_weights(training)
    try:
        save_training_state(training, file_name)
    except UserError as error:
        save_model(training, file_name, epoch)
        raise UserError(f"{error} Without a state to go on from, the model {file_name} was saved.") from error


def rotate(training: Training, *, step: int | None = None, epoch: int | None = None) -> None:
    """Remove what the save rules no longer keep, now that what belongs to this step or epoch is saved."""
    if training.accelerator.is_main_process:
        uploaded = training.uploads.wait_for if training.uploads is not None else None
        folder, name = Path(training.args.output_dir), training.args.output_name
        remove_outdated(folder, name, training.save_rules, step=step, epoch=epoch, before_removal=uploaded)


def require_finite_weights(training: Training) -> None:
    """Refuse to save weights that nothing can be learnt from any more, and by that to remove older ones."""
    if not all(torch.isfinite(parameter).all() for parameter in training.network.parameters()):
        raise TrainingBroken(
            f"the network's weights hold NaN or infinity after step {training.progress.step}; they are not saved. The models and "
            "states that were saved before are whole; go on from the last one with a lower --learning_rate or another precision."
        )


def train(training: Training) -> int:
    """The loop: epochs of steps, saving as asked, and once at the end. Returns the exit status."""
    args, progress = training.args, training.progress
    training.network.train()
    set_optimizer_mode(training.optimizer, training=True)
    main_process = training.accelerator.is_main_process
    shown = training.accelerator.is_local_main_process
    loss_log = LossLog(args.loss_log if main_process else None, progress.step)
    requests = TrainingRequests(Path(args.output_dir), training.accelerator)
    bar = tqdm(total=training.steps, initial=progress.step, desc="training", unit="step", disable=not shown)
    with loss_log, requests, bar:
        if progress.step == 0:
            draw_samples(training, requests, progress.epoch)
        while progress.step < training.steps:
            request = train_epoch(training, requests, loss_log, bar)
            if request.stops:
                return stop(training, request)
        require_finite_weights(training)
        if training.save_rules.state_at_end:  # before the model, whose presence says that everything is done
            save_training_state(training, final_name(args.output_name))
        save_model(training, final_name(args.output_name), progress.epoch)
        draw_samples(training, requests, progress.epoch, epoch_ended=progress.batches == len(training.reader))
    return 0


def train_epoch(training: Training, requests: TrainingRequests, loss_log: LossLog, bar: tqdm) -> Request:
    """The rest of the epoch under way, up to the last step of the training; returns early with a request to stop."""
    args, progress, rules = training.args, training.progress, training.save_rules
    name, epoch = args.output_name, progress.epoch
    if progress.batches == 0:
        training.flow_matching.timesteps.begin_epoch()
    call_if_there(training.network, "on_epoch_start", None, training.transformer)
    batches = training.reader.epoch(epoch - 1, progress.batches)
    started = time.monotonic()
    for group in batches_of_step(batches, args.gradient_accumulation_steps):
        rates = learning_rates(training.optimizer, training.group_names)  # of this step: the schedule moves on within it
        step = train_step(training, group)
        seconds = time.monotonic() - started
        progress.step, progress.batches = progress.step + 1, progress.batches + len(group)
        training.skipped_steps.note(progress.step, step.skipped)
        if step.skipped is None:
            progress.losses = [*progress.losses, step.loss][-training.steps_per_epoch :]
        tell_of_step(training, step, rates, seconds, loss_log, bar)
        if progress.step == training.steps:
            return Request.NOTHING
        request, due = requests.poll(), rules.due_after_step(progress.step)
        if due or request in (Request.SAVE, Request.SAVE_AND_STOP):
            asked = request is not Request.NOTHING
            save(training, step_name(name, progress.step), epoch, rules.states or asked)
            if due:
                rotate(training, step=progress.step)
        elif request.is_signal:
            save_for_signal(training, step_name(name, progress.step), epoch)
        if request.stops:
            return request
        if progress.batches < len(training.reader):
            draw_samples(training, requests, epoch)
        started = time.monotonic()
    progress.epoch, progress.batches = epoch + 1, 0
    if rules.due_after_epoch(epoch):
        save(training, epoch_name(name, epoch), epoch, rules.states)
        rotate(training, epoch=epoch)
    draw_samples(training, requests, epoch, epoch_ended=True)
    return Request.NOTHING


def tell_of_step(training: Training, step: Step, rates: Mapping[str, float], seconds: float, loss_log: LossLog, bar: tqdm) -> None:
    """Show and log the step that was just made, with the validation loss where it is due."""
    progress = training.progress
    average = sum(progress.losses) / max(1, len(progress.losses))
    bar.update()
    bar.set_postfix(loss=f"{step.loss:.4f}", average=f"{average:.4f}")
    held_out = validation_loss(training) if training.held_out and validation_due(training) else None
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


def draw_samples(training: Training, requests: TrainingRequests, epoch: int, epoch_ended: bool = False) -> None:
    """Draw samples if this is a step after which they are asked for; a request to stop gives them up."""
    drawn = training.samples.draw_if_due(
        training.transformer,
        training.network,
        training.optimizer,
        training.flow_matching.dtype,
        step=training.progress.step,
        epoch=epoch,
        epoch_ended=epoch_ended,
        stop=lambda: requests.signalled,
    )
    training.logs.samples(drawn, training.progress.step)


def validation_due(training: Training) -> bool:
    """Whether the step that was just made is one after which the held-out items are looked at."""
    if every := training.args.validate_every_n_steps:
        return training.progress.step % every == 0 or training.progress.step == training.steps
    return training.progress.batches == len(training.reader) or training.progress.step == training.steps


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


def load_base_model(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The frozen transformer, with --base_weights merged while it loads."""
    bases = read_lora_files(args.base_weights, args.base_weights_multiplier)
    transformer = hunyuan_model.load_transformer(
        args.dit,
        device=device,
        dtype=dtype,
        attn_mode=attention_mode(args),
        split_attn=args.split_attn,
        fp8=args.fp8_base,
        fp8_scaled=args.fp8_scaled,
        fp8_fast=args.fp8_fast,
        patch=merge_patch(bases, args.dit) if bases else None,
    )
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(transformer)
    return transformer


def base_dtype(args: argparse.Namespace, accelerator: Accelerator) -> torch.dtype:
    """What the transformer computes in: --dit_dtype, else the mixed precision's, else the device's default."""
    if args.dit_dtype is None and accelerator.mixed_precision in ("fp16", "bf16"):
        return SAVE_DTYPES[accelerator.mixed_precision]
    return choose_dtype(args.dit_dtype, "--dit_dtype", accelerator.device, torch.bfloat16)


def prepare(
    args: argparse.Namespace,
    accelerator: Accelerator,
    reader: EpochReader,
    steps: int,
    groups: list[CachedGroup],
    samples: TrainingSamples,
    logs: TrainingLogs,
    resumed: Resumed | None = None,
) -> Training:
    """Load the transformer, hook the network into it, and make what the loop needs; with ``resumed`` as it was saved."""
    module = import_network_module(args.network_module)
    network_args = parse_key_values(args.network_args, "--network_args")
    dtype = base_dtype(args, accelerator)
    transformer = load_base_model(args, accelerator.device, dtype)
    network = create_network(
        module,
        transformer,
        dim=args.network_dim,
        alpha=args.network_alpha,
        dropout=args.network_dropout,
        network_args=network_args,
        weights=args.network_weights,
        dim_from_weights=args.dim_from_weights,
    )
    optimizer_groups, group_names = parameter_groups(network, args.learning_rate)
    optimizer = make_optimizer(args.optimizer_type, optimizer_groups, args.learning_rate, args.optimizer_args)
    rank_seed = args.seed + accelerator.process_index
    progress = Progress(started_at=time.time(), session_id=new_session_id())
    training = Training(
        args=args,
        accelerator=accelerator,
        transformer=transformer,
        network=network,
        optimizer=accelerator.prepare(optimizer),
        group_names=group_names,
        lr_scheduler=make_lr_scheduler(args, optimizer, steps),
        reader=reader,
        flow_matching=FlowMatching(
            transformer,
            accelerator,
            TimestepSampler.from_args(args, torch.Generator().manual_seed(rank_seed)),
            noise=torch.Generator(accelerator.device).manual_seed(rank_seed),
            dtype=dtype,
            guidance_scale=args.guidance_scale,
        ),
        steps=steps,
        save_rules=SaveRules.from_args(args),
        progress=progress,
        samples=samples,
        logs=logs,
    )
    if resumed is not None:
        order = batch_order(args, reader, accelerator)
        training.progress = restore(args, resumed, training.restorable, order, steps)
    training.metadata = training_metadata(args, training_facts(training, groups), network_args)
    return training


def training_facts(training: Training, groups: list[CachedGroup]) -> TrainingFacts:
    """What the run knows beyond its flags, for the metadata."""
    args = training.args
    return TrainingFacts(
        train_items=sum(len(group.items) * group.dataset.num_repeats for group in groups),
        batches_per_epoch=len(training.reader),
        epochs=-(-training.steps // training.steps_per_epoch),
        steps=training.steps,
        optimizer=describe_optimizer(training.optimizer, args.optimizer_args),
        resolution=max((group.dataset.resolution for group in groups), key=lambda size: size[0] * size[1]),
        started_at=training.progress.started_at,
        session_id=training.progress.session_id,
        network_dim="Dynamic" if args.dim_from_weights else args.network_dim or DEFAULT_RANK,
        network_alpha="Dynamic" if args.dim_from_weights else args.network_alpha,
        mixed_precision=training.accelerator.mixed_precision,
        datasets=[describe_group(group) for group in groups],
    )


def check_state_can_be_saved(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, lr_scheduler: torch.optim.lr_scheduler.LRScheduler
) -> None:
    """See to it before anything is loaded that states of this optimiser and this schedule can be saved.

    Raises:
        UserError: they cannot, but are asked for.
    """
    try:
        plain_state({"optimizer": optimizer.state_dict(), "lr_scheduler": lr_scheduler.state_dict()})
    except UserError as error:
        if args.save_state or args.save_state_on_train_end:
            raise
        logger.warning("%s A training that is stopped will save its model only.", error)


def describe_group(group: CachedGroup) -> dict[str, object]:
    """A dataset for the metadata: its settings and how much it holds, and of its paths only the last name."""
    settings = {key: value for key, value in asdict(group.dataset).items() if value is not None and key != "cache_directory"}
    if group.dataset.kind == "image":
        settings = {key: value for key, value in settings.items() if not key.startswith(("target_", "frame_"))}
    paths = {key: value.name for key, value in settings.items() if isinstance(value, Path)}
    return settings | paths | {"items": len(group.items)}


def show_timesteps(args: argparse.Namespace) -> None:
    """Draw the distribution of timesteps in the terminal, or as a picture in --output_dir."""
    settings = TimestepSettings.from_args(args)
    if args.show_timesteps == "console":
        print(timestep_chart(settings))
    else:
        path = require_writable_folder(args.output_dir or ".", "--output_dir") / "timesteps.png"
        save_timestep_image(settings, path)
        print(path)


def main() -> int:
    args = parse_with_config(build_parser())
    if args.show_timesteps:
        show_timesteps(args)
        return 0
    check_training_arguments(args)
    prompts = check_samples(args)
    check_logs(args)
    TimestepSettings.from_args(args)
    planned = check_model_and_network(args)
    accelerator = make_accelerator(args)
    if not accelerator.is_main_process:
        logging.disable(logging.WARNING)  # one process says what all of them do
    groups = find_cached_items(load_dataset_config(args.dataset_config, require_media=False))
    reports = [report_cached_group(group) for group in groups]
    if accelerator.is_main_process:
        print(format_table(reports), flush=True)
    require_batches(reports)
    require_model_sizes(groups, planned.config.in_channels, planned.config.text_dim, planned.config.pooled_dim)

    if args.resume == LATEST and accelerator.is_main_process:
        recover_state(Path(args.output_dir), args.output_name)
    accelerator.wait_for_everyone()
    resumed = find_resumed(args)
    if args.seed is None:
        args.seed = int(broadcast_object_list([drawn_seed()])[0])
        logger.info("seed %d", args.seed)
    set_seed(args.seed)
    held_out: list[CachedItem] = []
    if args.validation_split is not None:
        groups, held_out = hold_out(groups, args.validation_split, args.seed)
        logger.info("held out for validation: %s", name_some(item.latents_path.name for item in held_out))
    sampler = ShapeBatchSampler(groups, args.seed, accelerator.process_index, accelerator.num_processes)
    reader = EpochReader(groups, sampler, args.max_data_loader_n_workers, args.persistent_data_loader_workers)
    steps = args.max_train_epochs * steps_per_epoch(args, reader) if args.max_train_epochs else args.max_train_steps
    optimizer = check_optimizer(
        args.optimizer_type, args.learning_rate, args.optimizer_args, accelerator.device, planned.group_rates
    )
    lr_scheduler = check_lr_scheduler(args, optimizer, steps)
    check_state_can_be_saved(args, optimizer, lr_scheduler)
    if resumed is not None:
        check_resumed(args, resumed, state_identity(args, planned.network, optimizer), steps)
    if args.resume == LATEST and is_complete(args, steps, resumed):
        logger.info("%s is complete: it was trained for %d steps", Path(args.output_dir) / final_name(args.output_name), steps)
        return 0
    uploads = HubUploads.from_args(args) if accelerator.is_main_process else None
    if accelerator.is_main_process:
        remove_leftovers(Path(args.output_dir), args.output_name)

    if accelerator.device.type == "cpu":
        logger.warning("training on the CPU, which the real model makes very slow.")
    logs = open_logs(args, accelerator.device, accelerator.is_main_process)
    with logs, out_of_memory_says("training", TRAINING_MEMORY_ADVICE):
        samples = prepare_samples(args, prompts, accelerator, planned.config)
        training = prepare(args, accelerator, reader, steps, groups, samples, logs, resumed)
        training.held_out = CachedDataset.of_items(held_out)
        training.uploads = uploads
        logger.info(
            "%d batches per epoch, %d per step; %d steps; %d trainable parameters; base model in %s%s",
            len(reader),
            args.gradient_accumulation_steps,
            steps,
            sum(parameter.numel() for parameter in training.network.parameters() if parameter.requires_grad),
            training.flow_matching.dtype,
            " with float8 weights" if args.fp8_base else "",
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
