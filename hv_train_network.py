"""Train a LoRA (or another network) for HunyuanVideo on cached latents and text encoder outputs.

Run it with ``accelerate launch hv_train_network.py ...`` or, on one device, with plain ``python``.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn
from tqdm import tqdm

import hunyuan_model
import networks.lora
from dataset import load_dataset_config
from dataset.batches import Batch, CachedGroup, ShapeBatchSampler, find_cached_items, require_model_sizes
from dataset.reading import EpochReader
from dataset.report import format_table, report_cached_group, require_batches
from hunyuan_model.architecture import TransformerConfig
from hunyuan_model.flow import GUIDANCE_UNIT, TIMESTEPS
from hunyuan_model.gradient_checkpointing import enable_gradient_checkpointing
from hunyuan_model.loading import check_transformer_file
from hunyuan_model.transformer import HYVideoDiffusionTransformer
from hunyuan_model.vae import SCALING_FACTOR
from networks.lora import DEFAULT_RANK
from networks.lora_files import check_lora_file
from networks.lora_merging import merge_patch, read_lora_files
from networks.lora_options import NetworkOptions
from networks.network_module import call_if_there, create_network, import_network_module, parameter_groups
from utils.arguments import drawn_seed
from utils.config_files import parse_with_config
from utils.devices import choose_dtype, out_of_memory_says
from utils.errors import UserError, run_script
from utils.files import require_file, require_writable_folder
from utils.key_values import parse_key_values
from utils.loss_log import LossLog
from utils.lr_schedules import check_lr_scheduler, make_lr_scheduler, step_schedule
from utils.optimizers import check_optimizer, describe_optimizer, make_optimizer, set_optimizer_mode
from utils.timestep_preview import save_timestep_image, timestep_chart
from utils.timestep_sampling import TimestepSampler, TimestepSettings, noisy_latents
from utils.training_arguments import attention_mode, build_training_parser, check_training_arguments
from utils.training_files import epoch_name, final_name, save_network, step_name
from utils.training_metadata import TrainingFacts, finished_metadata, training_metadata

logger = logging.getLogger("train")

TRAINING_MEMORY_ADVICE = "use --fp8_base, --gradient_checkpointing, a smaller batch_size, fewer frames or a smaller resolution"
SAVE_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_parser() -> argparse.ArgumentParser:
    """Every flag of training."""
    return build_training_parser()


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerate's view of devices, processes and precision. Accumulation is the loop's business, not accelerate's."""
    try:
        return Accelerator(mixed_precision=args.mixed_precision)
    except ValueError as error:
        raise UserError(f"accelerate refuses this setup: {error}.") from error


@dataclass
class Training:
    """What the loop works on."""

    args: argparse.Namespace
    accelerator: Accelerator
    transformer: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    reader: EpochReader
    timesteps: TimestepSampler
    noise: torch.Generator
    dtype: torch.dtype
    steps: int
    metadata: dict[str, str] = field(default_factory=dict)

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


def flow_matching_loss(training: Training, batch: Batch) -> Tensor:
    """Weighted mean squared error between the predicted and the true velocity, noise - latents."""
    args, device = training.args, training.accelerator.device
    latents = batch["latents"].to(device, torch.float32) * SCALING_FACTOR
    noise = torch.randn(latents.shape, generator=training.noise, device=device)
    t = training.timesteps.draw(len(latents)).to(device)  # (B,) in [0, 1]
    noisy = noisy_latents(latents, noise, t)
    guidance = torch.full((len(latents),), args.guidance_scale * GUIDANCE_UNIT, device=device)
    with training.accelerator.autocast():
        velocity = training.transformer(
            noisy.to(training.dtype),
            t * TIMESTEPS,
            batch["text_states"].to(device, training.dtype),
            batch["text_mask"],  # stays on the CPU: the transformer only needs lengths
            batch["text_states_2"].to(device, training.dtype),
            guidance if training.transformer.config.guidance else None,
        )
    loss = nn.functional.mse_loss(velocity.float(), noise - latents, reduction="none").flatten(1).mean(1)
    weight = training.timesteps.loss_weight(t)
    return (loss if weight is None else loss * weight).mean()


def average_gradients(accelerator: Accelerator, network: nn.Module) -> None:
    """Give every process the mean gradients. The network is hooked into the transformer's layers: no wrapper can do this."""
    if accelerator.num_processes == 1:
        return
    for parameter in network.parameters():
        if parameter.requires_grad:
            # Dropout may leave a layer out on one process only; all of them must still take part.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(gradient, reduction="mean")


def train_step(training: Training, batches: list[Batch]) -> float:
    """One optimiser step over the batches it accumulates; returns their mean loss."""
    accelerator, network, args = training.accelerator, training.network, training.args
    call_if_there(network, "on_step_start")
    total = 0.0
    for batch in batches:
        loss = flow_matching_loss(training, batch)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss became {loss.item()} for {', '.join(batch['names'])}; training stopped before it could spoil the "
                "network. Lower --learning_rate, or try another precision."
            )
        if loss.requires_grad:  # not where dropout leaves out the whole network
            accelerator.backward(loss / len(batches))
        total += loss.item() / len(batches)
    average_gradients(accelerator, network)
    if args.max_grad_norm:
        accelerator.clip_grad_norm_(network.parameters(), args.max_grad_norm)
    training.optimizer.step()
    if not accelerator.optimizer_step_was_skipped:
        step_schedule(training.lr_scheduler, total)
    training.optimizer.zero_grad(set_to_none=True)
    if args.scale_weight_norms:
        call_if_there(network, "apply_max_norm_regularization", args.scale_weight_norms, accelerator.device)
    return total


def save(training: Training, file_name: str, step: int, epoch: int) -> None:
    """Save the network under the output folder, on the main process only."""
    if not training.accelerator.is_main_process:
        return
    metadata = finished_metadata(training.metadata, steps=step, epoch=epoch, now=time.time())
    dtype = SAVE_DTYPES[training.accelerator.mixed_precision]
    set_optimizer_mode(training.optimizer, training=False)
    save_network(training.network, Path(training.args.output_dir) / file_name, dtype, metadata)
    set_optimizer_mode(training.optimizer, training=True)


def train(training: Training) -> None:
    """The loop: epochs of steps, saving as asked, and once at the end."""
    args, name = training.args, training.args.output_name
    step, losses = 0, deque(maxlen=training.steps_per_epoch)
    training.network.train()
    set_optimizer_mode(training.optimizer, training=True)
    shown = training.accelerator.is_local_main_process
    loss_log = LossLog(args.loss_log if training.accelerator.is_main_process else None)
    with loss_log, tqdm(total=training.steps, desc="training", unit="step", disable=not shown) as progress:
        for epoch in itertools.count(1):
            call_if_there(training.network, "on_epoch_start", None, training.transformer)
            for batches in batches_of_step(training.reader.epoch(epoch - 1), args.gradient_accumulation_steps):
                learning_rate = training.optimizer.param_groups[0]["lr"]  # of this step: the schedule moves on within it
                losses.append(train_step(training, batches))
                step, average = step + 1, sum(losses) / len(losses)
                progress.update()
                progress.set_postfix(loss=f"{losses[-1]:.4f}", average=f"{average:.4f}")
                loss_log.write(step, epoch, losses[-1], average, learning_rate)
                if step == training.steps:
                    break
                if args.save_every_n_steps and step % args.save_every_n_steps == 0:
                    save(training, step_name(name, step), step, epoch)
            if step == training.steps:
                break
            if args.save_every_n_epochs and epoch % args.save_every_n_epochs == 0:
                save(training, epoch_name(name, epoch), step, epoch)
    save(training, final_name(name), step, epoch)


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
    args: argparse.Namespace, accelerator: Accelerator, reader: EpochReader, steps: int, groups: list[CachedGroup]
) -> Training:
    """Load the transformer, hook the network into it, and make what the loop needs."""
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
    optimizer_groups, _ = parameter_groups(network, args.learning_rate)
    optimizer = make_optimizer(args.optimizer_type, optimizer_groups, args.learning_rate, args.optimizer_args)
    rank_seed = args.seed + accelerator.process_index
    training = Training(
        args=args,
        accelerator=accelerator,
        transformer=transformer,
        network=network,
        optimizer=accelerator.prepare(optimizer),
        lr_scheduler=make_lr_scheduler(args, optimizer, steps),
        reader=reader,
        timesteps=TimestepSampler.from_args(args, torch.Generator().manual_seed(rank_seed)),
        noise=torch.Generator(accelerator.device).manual_seed(rank_seed),
        dtype=dtype,
        steps=steps,
    )
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
        started_at=time.time(),
        network_dim="Dynamic" if args.dim_from_weights else args.network_dim or DEFAULT_RANK,
        network_alpha="Dynamic" if args.dim_from_weights else args.network_alpha,
        mixed_precision=training.accelerator.mixed_precision,
        datasets=[describe_group(group) for group in groups],
    )


def describe_group(group: CachedGroup) -> dict[str, object]:
    """A dataset for the metadata: its settings and how much it holds, and of its paths only the last name."""
    settings = {key: value for key, value in asdict(group.dataset).items() if value is not None and key != "cache_directory"}
    if group.dataset.kind == "image":
        settings = {key: value for key, value in settings.items() if not key.startswith(("target_", "frame_"))}
    paths = {key: value.name for key, value in settings.items() if isinstance(value, Path)}
    return settings | paths | {"items": len(group.items)}


def check_files_and_network(args: argparse.Namespace) -> tuple[TransformerConfig, int]:
    """What the flags name and only other modules can judge.

    Returns:
        The sizes of the transformer in --dit, and how many parameter groups the network will have.

    Raises:
        UserError: a file, the network or its arguments cannot be used.
    """
    TimestepSettings.from_args(args)
    config = check_transformer_file(args.dit, "--dit")
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in HYVideoDiffusionTransformer(config).state_dict().items()}
    for path in args.base_weights:
        check_lora_file(path, shapes)
    if args.fp8_base and args.network_module.startswith("lycoris"):
        raise UserError("LyCORIS computes in the dtype of the base weights, which float8 does not allow; leave --fp8_base out.")
    network_args = parse_key_values(args.network_args, "--network_args")
    module = import_network_module(args.network_module)
    if module is not networks.lora:
        if args.network_weights:
            require_file(args.network_weights, "--network_weights")
        return config, 1
    options = NetworkOptions(network_args, args.network_dropout)
    if args.network_weights:
        ranks = check_lora_file(args.network_weights, shapes).ranks
        rank = args.network_dim or DEFAULT_RANK
        if not args.dim_from_weights and ranks != {rank}:
            raise UserError(
                f"--network_weights {args.network_weights} has rank {', '.join(map(str, sorted(ranks)))}, not {rank}; "
                "give it as --network_dim, or use --dim_from_weights."
            )
    return config, 1 if options.loraplus_lr_ratio is None else 2


def show_timesteps(args: argparse.Namespace) -> None:
    """Draw the distribution of timesteps in the terminal, or as a picture in --output_dir."""
    settings = TimestepSettings.from_args(args)
    if args.show_timesteps == "console":
        print(timestep_chart(settings))
    else:
        path = require_writable_folder(args.output_dir or ".", "--output_dir") / "timesteps.png"
        save_timestep_image(settings, path)
        print(path)


def main() -> None:
    args = parse_with_config(build_parser())
    if args.show_timesteps:
        show_timesteps(args)
        return
    check_training_arguments(args)
    config, parameter_group_count = check_files_and_network(args)
    accelerator = make_accelerator(args)
    if not accelerator.is_main_process:
        logging.disable(logging.WARNING)  # one process says what all of them do
    groups = find_cached_items(load_dataset_config(args.dataset_config, require_media=False))
    reports = [report_cached_group(group) for group in groups]
    if accelerator.is_main_process:
        print(format_table(reports), flush=True)
    require_batches(reports)
    require_model_sizes(groups, config.in_channels, config.text_dim, config.pooled_dim)

    if args.seed is None:
        args.seed = int(broadcast_object_list([drawn_seed()])[0])
        logger.info("seed %d", args.seed)
    set_seed(args.seed)
    sampler = ShapeBatchSampler(groups, args.seed, accelerator.process_index, accelerator.num_processes)
    reader = EpochReader(groups, sampler, args.max_data_loader_n_workers, args.persistent_data_loader_workers)
    steps = args.max_train_epochs * steps_per_epoch(args, reader) if args.max_train_epochs else args.max_train_steps
    optimizer = check_optimizer(
        args.optimizer_type, args.learning_rate, args.optimizer_args, accelerator.device, parameter_group_count
    )
    check_lr_scheduler(args, optimizer, steps)

    if accelerator.device.type == "cpu":
        logger.warning("training on the CPU, which the real model makes very slow.")
    with out_of_memory_says("training", TRAINING_MEMORY_ADVICE):
        training = prepare(args, accelerator, reader, steps, groups)
        logger.info(
            "%d batches per epoch, %d per step; %d steps; %d trainable parameters; base model in %s%s",
            len(reader),
            args.gradient_accumulation_steps,
            steps,
            sum(parameter.numel() for parameter in training.network.parameters() if parameter.requires_grad),
            training.dtype,
            " with float8 weights" if args.fp8_base else "",
        )
        try:
            train(training)
        except RuntimeError as error:
            raise reader.explain(error) from error


if __name__ == "__main__":
    run_script(main)
