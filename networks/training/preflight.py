"""What can be known of a training before anything is loaded. All of it is kept in a plan that the training then uses."""

from __future__ import annotations

import logging
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

import networks.lora
from hunyuan_model.runtime.loading import check_transformer_file
from hunyuan_model.runtime.memory import BatchSize
from hunyuan_model.runtime.memory_plan import MemoryPlan
from hunyuan_model.runtime.memory_report import MAX_TEXT_TOKENS, plan_table
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from networks.formats.reading import LoraFile, check_lora_file, read_lora
from networks.formats.writing import plain_network
from networks.generation.requests import Request, without_effect
from networks.lora import DEFAULT_RANK
from networks.network_module import import_network_module, parameter_groups
from networks.training.accelerator import Precision
from networks.training.data import TrainingData
from networks.training.logging.logs import check_logs
from networks.training.loss.flow_matching import FlowSettings
from networks.training.optim.lr_schedules import check_lr_scheduler
from networks.training.optim.optimizers import (
    check_optimizer,
    describe_optimizer,
    state_bytes_per_value,
    warn_of_low_learning_rate,
)
from networks.training.samples.prompts import DEFAULTS
from networks.training.samples.sampling import check_samples
from networks.training.saving.files import remove_leftovers, require_room_for_save
from networks.training.saving.latest import next_lineage, recover_state
from networks.training.saving.models import check_formats, copied_values, planned_lora
from networks.training.saving.resume import Resumed, check_steps_left, find_resumed, is_complete, require_fitting
from networks.training.saving.state import check_state_can_be_saved
from networks.training.settings import TrainingSettings
from utils.cli.arguments import random_seed
from utils.errors import UserError, first_line, name_some
from utils.files import require_file
from utils.free_memory import free_device_memory, free_host_memory
from utils.output import show

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelPlan:
    """The transformer and the network on it.

    Attributes:
        config: the sizes of the transformer in --dit.
        module: of the network.
        network: the network without its values; None where its module does not make it without the transformer's weights.
        lora: what it will be saved as, see ``planned_lora``.
        sizes: ranks and alphas of our LoRA; empty for other networks.
        highest_rate: of the learning rates of the network.
        optimizer: over scratch parameters, after one step.
        prompts: of the samples.
    """

    config: TransformerConfig
    module: ModuleType
    network: nn.Module | None
    lora: LoraFile | None
    sizes: Collection[tuple[int, float]]
    highest_rate: float
    precision: Precision
    optimizer: torch.optim.Optimizer
    prompts: Sequence[Request]

    @property
    def values(self) -> int | None:
        """Numbers in the network; None for one that adds its layers only when it is applied."""
        return sum(value.numel() for value in self.network.state_dict().values()) or None if self.network is not None else None


@dataclass(frozen=True)
class Beginning:
    """Where a training starts: a state and its seed, or None and a seed.

    Attributes:
        flags: of the training, with the seed, and with what the state keeps in place of what was given.
        lineage: of the states that it will save, see ``StateFile``.
    """

    resumed: Resumed | None
    seed: int
    flags: Mapping[str, Any]
    lineage: int

    @property
    def given_flags(self) -> dict[str, Any]:
        """Those that have a value."""
        return {name: value for name, value in self.flags.items() if value is not None}


@dataclass(frozen=True)
class TrainingPlan:
    """A training that can begin.

    Attributes:
        steps: of the whole training.
        memory: what it needs; its runtime settings are those to load the transformer with.
        complete: whether the model is trained already.
    """

    model: ModelPlan
    beginning: Beginning
    steps: int
    memory: MemoryPlan
    complete: bool = False


def inspect_model(settings: TrainingSettings, accelerator: Accelerator) -> ModelPlan:
    """Read the headers of the files that the settings name, and check all that depends neither on a state nor on the data.

    Raises:
        UserError: a file, the network, the optimizer or runtime settings cannot be used here.
    """
    prompts = check_samples(settings.samples)
    check_logs(settings.logs)
    config = check_transformer_file(settings.model.dit, "--dit")
    precision = Precision.of(settings, accelerator)
    settings.runtime.check(accelerator.device, precision.compute, config)
    devices = settings.runtime.devices(accelerator.device)
    for device in devices:
        settings.kernels.apply(device)
    with torch.device("meta"):
        transformer = HYVideoDiffusionTransformer(config)
    if settings.runtime.sharding is not None and any(prompt.sampling.step_cache for prompt in prompts):
        raise UserError("samples with a step cache cannot be made while FSDP shares out the weights: take it out of the prompts.")
    shapes = {name: tuple(weight.shape) for name, weight in transformer.state_dict().items()}
    for path in settings.model.base_weights:
        check_lora_file(path, shapes, partial=settings.model.lora_partial)
    network, rate = settings.network, settings.optimizer.learning_rate
    if settings.runtime.quantized and network.is_lycoris:
        raise UserError(
            "LyCORIS computes in the dtype of the base weights, which quantized weights do not allow; "
            "leave --fp8_base and --int8_base out."
        )
    module = import_network_module(network.network_module)
    ours, rank, sizes = module is networks.lora, network.network_dim or DEFAULT_RANK, set()
    if ours and network.network_weights:
        sizes = {(lora.rank, lora.alpha) for lora in plain_network(read_lora(network.network_weights)).values()}
        ranks = {rank for rank, _ in sizes}
        check_lora_file(network.network_weights, shapes)
        if not network.dim_from_weights and ranks != {rank}:
            raise UserError(
                f"--network_weights {network.network_weights} has rank {', '.join(map(str, sorted(ranks)))}, not {rank}; "
                "give it as --network_dim, or use --dim_from_weights."
            )
    elif network.network_weights:
        require_file(network.network_weights, "--network_weights")
    planned = _network_without_values(settings, module, transformer)
    if ours and not sizes:
        sizes = {(lora.rank, lora.scale * lora.rank) for lora in planned.loras()}
    rates = [group["lr"] for group in parameter_groups(planned, rate)[0]] if ours else [rate]
    optimizer = check_optimizer(settings.optimizer, rates, *devices)
    for sentence in (*settings.without_effect(), *_guidance_without_effect(settings, config, prompts), *without_effect(prompts)):
        logger.warning("%s", sentence)
    lora = planned_lora(planned)
    check_formats(settings.saving, lora, network.arguments, network.is_lycoris)
    return ModelPlan(config, module, planned, lora, sizes, max(rates), precision, optimizer, prompts)


def _guidance_without_effect(settings: TrainingSettings, config: TransformerConfig, prompts: Sequence[Request]) -> list[str]:
    """A sentence on guidance for a transformer that takes none."""
    given = ["--guidance_scale"] if settings.flow != FlowSettings() else []
    if any(prompt.sampling.embedded_cfg_scale != DEFAULTS.embedded_cfg_scale for prompt in prompts):
        given.append("the guidance of sample prompts")
    if config.guidance or not given:
        return []
    return [f"{' and '.join(given)}: no effect, as the transformer in --dit has no guidance embedding."]


def _network_without_values(
    settings: TrainingSettings, module: ModuleType, transformer: HYVideoDiffusionTransformer
) -> nn.Module | None:
    """The network for a transformer on the meta device, with the names and sizes it will have; None where that cannot be made."""
    network = settings.network
    try:
        if network.dim_from_weights:
            return module.create_network_from_weights(1.0, network.network_weights, None, None, transformer, **network.arguments)[0]
        with torch.device("meta"):
            dim, alpha = network.network_dim, network.network_alpha
            return module.create_network(1.0, dim, alpha, None, None, transformer, **network.arguments)
    except Exception as error:  # another module may look at weights, which are not there yet; its arguments are checked later
        if module is networks.lora:
            raise
        logger.info("not checked: disk space. %s shows its size only later (%s)", network.network_module, first_line(error))
        return None


def find_beginning(settings: TrainingSettings, model: ModelPlan, accelerator: Accelerator) -> Beginning:
    """The state to resume from, if any, and the seed: that of the state, the given one, or a random one.

    Raises:
        UserError: no such state, one that is damaged, or one that does not fit this training.
    """
    if settings.resuming.latest and accelerator.is_main_process:
        recover_state(settings.saving.folder, settings.saving.output_name)
    accelerator.wait_for_everyone()
    resumed, flags = find_resumed(settings.resuming), settings.flags
    _require_same_state(resumed)
    if resumed is not None:
        require_fitting(resumed, flags, describe_optimizer(model.optimizer))
        seed, flags = resumed.state.seed, resumed.flags_used(flags)
    elif (seed := settings.resuming.seed) is None:
        seed = int(broadcast_object_list([random_seed()])[0])
        logger.info("seed %d", seed)
    lineage = next_lineage(settings.saving.folder, settings.saving.output_name)
    return Beginning(resumed, seed, {**flags, "seed": seed}, lineage)


def _require_same_state(resumed: Resumed | None) -> None:
    """Raise a UserError where processes on several machines do not find the same state."""
    places = gather_object([None if resumed is None else (resumed.state.lineage, resumed.state.progress.step)])
    if len(set(places)) > 1:
        found = name_some("none" if place is None else f"step {place[1]}" for place in dict.fromkeys(places))
        raise UserError(
            f"the machines find different states to resume from: {found}. Give an --output_dir that all of them share, or copy the "
            "state to each and give its path as --resume."
        )


def preflight(
    settings: TrainingSettings, model: ModelPlan, beginning: Beginning, data: TrainingData, accelerator: Accelerator
) -> TrainingPlan:
    """Check what depends on the data, still without loading a model, and report the memory once.

    Raises:
        UserError: a schedule, a state or a disk that does not suffice for the steps.
    """
    if data.prior_preservation and settings.runtime.sharding is not None:  # a second forward pass, which all would have to make
        raise UserError(
            "FSDP does not go with prior_preservation; take prior_preservation out of the datasets, or train without FSDP."
        )
    resumed, saving = beginning.resumed, settings.saving
    steps = settings.loop.steps(data.steps_per_epoch)
    schedule = check_lr_scheduler(settings.schedule, model.optimizer, steps)
    check_state_can_be_saved(model.optimizer, schedule, wanted=saving.state_at_end)
    if resumed is not None:
        check_steps_left(settings.resuming, resumed, steps)
    complete = settings.resuming.latest and is_complete(settings.resuming, steps, resumed)
    if model.sizes and not complete:
        _report_scale(settings, model, steps)
    if accelerator.is_main_process and not complete:
        if model.values is not None:
            copied, state_bytes = copied_values(saving, model.lora), state_bytes_per_value(model.optimizer)
            require_room_for_save(saving, model.values, copied, model.precision.saved, state_bytes)
        remove_leftovers(saving.folder, saving.output_name)
    memory = _plan_memory(settings, model, data, accelerator, shown=accelerator.is_main_process and not complete)
    return TrainingPlan(model, beginning, steps, memory, complete)


def _report_scale(settings: TrainingSettings, model: ModelPlan, steps: int) -> None:
    """Log by how much the updates of the LoRA are scaled, with a warning where they cannot grow with that."""
    ordered = sorted(model.sizes)
    scales = sorted(alpha / rank for rank, alpha in ordered)
    if len(ordered) == 1:
        logger.info("LoRA of rank %d, alpha %g: its update is scaled by alpha / rank = %.3g", *ordered[0], scales[0])
    else:
        ranks = ordered[0][0], ordered[-1][0]
        logger.info("LoRA of ranks %d to %d: updates are scaled by alpha / rank, %.3g to %.3g", *ranks, scales[0], scales[-1])
    strongest = max(ordered, key=lambda size: size[1] / size[0] ** 0.5)
    warn_of_low_learning_rate(settings.optimizer, model.highest_rate, steps, *strongest)


def processes_here() -> int:
    """How many of the processes share the RAM of this machine. All call it together."""
    return gather_object([platform.node()]).count(platform.node())


def _plan_memory(
    settings: TrainingSettings, model: ModelPlan, data: TrainingData, accelerator: Accelerator, shown: bool
) -> MemoryPlan:
    """The memory plan, with the same number of swapped blocks in all processes."""
    samplings = [prompt.sampling for prompt in model.prompts]
    sizes = [BatchSize(2 if each.batched else 1, each.latent_size, MAX_TEXT_TOKENS) for each in samplings]
    device, *others = settings.runtime.devices(accelerator.device)
    free = [free_device_memory(each) for each in (device, *others)]
    memory = MemoryPlan(
        model.config,
        device,
        settings.runtime,
        data.largest.size,
        model.precision.base,
        model.precision.compute,
        model.values,
        state_bytes_per_value(model.optimizer),
        sample=max(sizes, key=lambda size: size.tokens(model.config), default=None),
        may_quantize=not settings.network.is_lycoris,
        others=tuple(others),
    ).resolved(free, free_host_memory() // processes_here())
    if shown:
        show(plan_table(memory, free, free_host_memory()))
    # auto goes by the GPU of each process
    if (most := max(gather_object([memory.runtime.blocks_to_swap]))) > memory.runtime.blocks_to_swap:
        logger.info("--blocks_to_swap auto: %d, for the GPU with the least free memory", most)
        memory = memory.with_blocks(most)
    return memory
