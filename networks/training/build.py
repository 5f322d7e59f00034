"""From a plan to a training that can run: load the transformer, hook the network into it, make everything the loop uses."""

from __future__ import annotations

import logging
import time
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn

import hunyuan_model
from hunyuan_model.quantization.formats import WeightFormat
from networks.lora import DEFAULT_RANK
from networks.merging import merge_patch, read_lora_files
from networks.network_module import create_network, network_off, parameter_groups, require_switch
from networks.training.distributed.gradients import SharedGradients, same_in_all
from networks.training.logging.logs import TrainingLogs, open_logs
from networks.training.logging.update_size import measure_changed_weights
from networks.training.loss.flow_matching import FlowMatching
from networks.training.loss.timestep_sampling import TimestepSampler
from networks.training.optim.lr_schedules import make_lr_scheduler
from networks.training.optim.optimizers import describe_optimizer, make_optimizer
from networks.training.preflight import TrainingPlan
from networks.training.report.beginning import begin_report
from networks.training.run import Training, TrainingData, batch_order
from networks.training.samples.sampling import prepare_samples
from networks.training.saving.metadata import new_session_id, training_metadata
from networks.training.saving.resume import restore
from networks.training.saving.state import Progress
from networks.training.settings import TrainingSettings
from networks.training.step import VALUES
from utils.hub import open_uploads
from utils.processes.ranks import Ranks
from utils.processes.watchdog import Watchdog

logger = logging.getLogger(__name__)


def open_run_logs(settings: TrainingSettings, plan: TrainingPlan, accelerator: Accelerator) -> TrainingLogs:
    """The logs of a training; those of the same run continue where it is resumed."""
    resumed = plan.beginning.resumed
    same_run = resumed is not None and resumed.state.flags.get("output_name") == settings.saving.output_name
    return open_logs(
        settings.logs,
        accelerator.device,
        main_process=accelerator.is_main_process,
        flags=plan.beginning.given_flags,
        runs=resumed.state.progress.log_runs if same_run else None,
        step=resumed.state.progress.step if same_run else 0,
    )


def build_training(
    settings: TrainingSettings, plan: TrainingPlan, data: TrainingData, logs: TrainingLogs, accelerator: Accelerator
) -> Training:
    """Load and connect everything; with a state, as it was saved."""
    uploads = open_uploads(settings.hub) if accelerator.is_main_process else None
    sharded = plan.memory.runtime.sharding is not None
    measures = sharded or accelerator.is_main_process
    samples = prepare_samples(
        settings.samples, plan.model.prompts, accelerator, plan.model.config, plan.beginning.seed, together=sharded
    )
    transformer = load_base_model(settings, plan, accelerator)
    network = create_network(
        plan.model.module,
        transformer,
        dim=settings.network.network_dim,
        alpha=settings.network.network_alpha,
        dropout=settings.network.network_dropout,
        network_args=settings.network.arguments,
        weights=settings.network.network_weights,
        dim_from_weights=settings.network.dim_from_weights,
        device=accelerator.device,
    )
    if data.prior_preservation:
        require_switch(network, settings.network.network_module)
    groups, group_names = parameter_groups(network, settings.optimizer.learning_rate)
    optimizer = make_optimizer(settings.optimizer, groups)
    # Before accelerate wraps the optimizer: the schedule watches the method that accelerate calls.
    lr_scheduler = make_lr_scheduler(settings.schedule, optimizer, plan.steps)
    gradients = None
    if accelerator.num_processes > 1:
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        same_in_all(trained)
        gradients = SharedGradients(trained, values=VALUES)
    seed = plan.beginning.seed
    flow_matching = FlowMatching(
        transformer,
        accelerator,
        TimestepSampler(settings.timesteps, torch.Generator().manual_seed(seed)),
        noise=torch.Generator(accelerator.device).manual_seed(seed),
        dtype=plan.model.precision.base,
        guidance_scale=settings.flow.guidance_scale,
        network_off=partial(network_off, network),
    )
    training = Training(
        settings=settings,
        plan=plan,
        data=data,
        accelerator=accelerator,
        transformer=transformer,
        network=network,
        optimizer=accelerator.prepare_optimizer(optimizer),  # `prepare` would want the model, too, where that is sharded
        group_names=group_names,
        lr_scheduler=lr_scheduler,
        flow_matching=flow_matching,
        progress=Progress(started_at=time.time(), session_id=new_session_id()),
        samples=samples,
        logs=logs,
        gradients=gradients,
        watchdog=Watchdog(process=accelerator.process_index),
        changed=measure_changed_weights(network, transformer, accelerator.device) if measures else None,
        uploads=uploads,
    )
    if (resumed := plan.beginning.resumed) is not None:
        order = batch_order(settings, data.reader, accelerator)
        training.progress = restore(resumed, training.restorable, order, settings.flags)
    training.progress.log_runs = logs.runs
    if accelerator.is_main_process:
        training.report = begin_report(settings, plan, data, training.progress, accelerator)
        logs.trackers.append(training.report)
    known = {
        "session_id": training.progress.session_id,
        "training_started_at": training.progress.started_at,
        "num_batches_per_epoch": len(data.reader),
        "num_epochs": -(-plan.steps // data.steps_per_epoch),
        "max_train_steps": plan.steps,
        "optimizer": describe_optimizer(optimizer, plan.beginning.flags["optimizer_args"]),
        "mixed_precision": accelerator.mixed_precision,
        "network_dim": settings.network.network_dim or DEFAULT_RANK,
    }
    if settings.network.dim_from_weights:
        known |= {"network_dim": "Dynamic", "network_alpha": "Dynamic"}
    training.metadata = training_metadata(plan.beginning.flags, data.facts, known, settings.network.arguments)
    weights = plan.memory.runtime.weights
    logger.info(
        "%d batches per epoch, %d per step; %d steps; %d trainable parameters; base model in %s%s",
        len(data.reader),
        data.reader.batches_per_step,
        plan.steps,
        sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad),
        plan.model.precision.base,
        "" if weights is WeightFormat.PLAIN else f" with {weights.value} weights",
    )
    return training


def load_base_model(settings: TrainingSettings, plan: TrainingPlan, accelerator: Accelerator) -> nn.Module:
    """The frozen transformer, with --base_weights merged while it loads. Processes of a machine share swapped weights."""
    model, runtime = settings.model, plan.memory.runtime
    bases = read_lora_files(model.base_weights, model.base_weights_multiplier, partial=model.lora_partial)
    return hunyuan_model.load_transformer(
        model.dit,
        device=accelerator.device,
        dtype=plan.model.precision.base,
        runtime=runtime,
        ranks=Ranks(accelerator.process_index, accelerator.num_processes, accelerator.local_process_index),
        patch=merge_patch(bases, model.dit) if bases else None,
    )
