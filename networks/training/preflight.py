"""What can be known of a training before anything is loaded. All of it is kept in a plan that the training then uses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

import networks.lora
from hunyuan_model.runtime.loading import check_transformer_file
from hunyuan_model.runtime.memory_plan import MemoryPlan
from hunyuan_model.runtime.memory_report import plan_table, sample_size
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from networks.lora import DEFAULT_RANK
from networks.lora_files import check_lora_file
from networks.network_module import import_network_module, parameter_groups
from networks.training.accelerator import Precision
from networks.training.data import TrainingData
from networks.training.logging.logs import check_logs
from networks.training.optim.lr_schedules import check_lr_scheduler
from networks.training.optim.optimizers import check_optimizer, state_bytes_per_value, warn_of_low_learning_rate
from networks.training.samples.prompts import SamplePrompt
from networks.training.samples.sampling import check_samples
from networks.training.saving.files import remove_leftovers, require_room_for_save
from networks.training.saving.resume import Resumed, check_resumed, find_resumed, is_complete, state_identity
from networks.training.saving.state import check_state_can_be_saved, recover_state
from networks.training.settings import NetworkSettings, TrainingSettings
from utils.cli.arguments import random_seed
from utils.errors import UserError, first_line
from utils.files import require_file
from utils.free_memory import free_device_memory, free_host_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelPlan:
    """The transformer and the network on it.

    Attributes:
        config: the sizes of the transformer in --dit.
        module: of the network.
        network: the network without its values; None where its module does not make it without the transformer's weights.
        group_rates: the learning rates of its parameter groups.
        prompts: of the samples.
    """

    config: TransformerConfig
    module: ModuleType
    network: nn.Module | None
    group_rates: Sequence[float]
    prompts: Sequence[SamplePrompt]

    @property
    def values(self) -> int | None:
        """Numbers in the network; None for one that adds its layers only when it is applied."""
        return sum(value.numel() for value in self.network.state_dict().values()) or None if self.network is not None else None


@dataclass(frozen=True)
class Beginning:
    """Where a training starts: a state and its seed, or None and a seed."""

    resumed: Resumed | None
    seed: int


@dataclass(frozen=True)
class TrainingPlan:
    """A training that can begin.

    Attributes:
        steps: of the whole training.
        memory: what it needs; its runtime settings are those to load the transformer with.
        complete: whether the model is trained already.
    """

    model: ModelPlan
    precision: Precision
    beginning: Beginning
    steps: int
    memory: MemoryPlan
    complete: bool = False


def inspect_model(settings: TrainingSettings) -> ModelPlan:
    """Read the headers of the files that the settings name.

    Raises:
        UserError: a file, the network or its arguments cannot be used.
    """
    prompts = check_samples(settings.samples)
    check_logs(settings.logs)
    config = check_transformer_file(settings.model.dit, "--dit")
    with torch.device("meta"):
        transformer = HYVideoDiffusionTransformer(config)
    shapes = {name: tuple(weight.shape) for name, weight in transformer.state_dict().items()}
    for path in settings.model.base_weights:
        check_lora_file(path, shapes)
    network, rate = settings.network, settings.optimizer.learning_rate
    if settings.runtime.quantized and network.is_lycoris:
        raise UserError(
            "LyCORIS computes in the dtype of the base weights, which quantized weights do not allow; "
            "leave --fp8_base and --int8_base out."
        )
    module = import_network_module(network.network_module)
    if module is not networks.lora:
        if network.network_weights:
            require_file(network.network_weights, "--network_weights")
        return ModelPlan(config, module, _other_network(network, module, transformer), [rate], prompts)
    planned = _network_without_values(network, module, transformer, network.arguments)
    if network.network_weights:
        ranks, rank = check_lora_file(network.network_weights, shapes).ranks, network.network_dim or DEFAULT_RANK
        if not network.dim_from_weights and ranks != {rank}:
            raise UserError(
                f"--network_weights {network.network_weights} has rank {', '.join(map(str, sorted(ranks)))}, not {rank}; "
                "give it as --network_dim, or use --dim_from_weights."
            )
    group_rates = [group["lr"] for group in parameter_groups(planned, rate)[0]]
    return ModelPlan(config, module, planned, group_rates, prompts)


def _other_network(settings: NetworkSettings, module: ModuleType, transformer: HYVideoDiffusionTransformer) -> nn.Module | None:
    try:
        return _network_without_values(settings, module, transformer, settings.arguments)
    except Exception as error:  # a module may look at weights, which are not there yet; its arguments are checked later
        reason = first_line(error)
        logger.info("not checked: disk space. %s shows its size only later (%s)", settings.network_module, reason)
        return None


def _network_without_values(
    settings: NetworkSettings, module: ModuleType, transformer: HYVideoDiffusionTransformer, arguments: dict[str, str]
) -> nn.Module:
    """The network for a transformer on the meta device; its names and sizes are those it will have."""
    if settings.dim_from_weights:
        return module.create_network_from_weights(1.0, settings.network_weights, None, None, transformer, **arguments)[0]
    with torch.device("meta"):
        return module.create_network(1.0, settings.network_dim, settings.network_alpha, None, None, transformer, **arguments)


def find_beginning(settings: TrainingSettings, accelerator: Accelerator) -> Beginning:
    """The state to resume from, if any, and the seed: that of the state, the given one, or a random one.

    Raises:
        UserError: no such state, one that is damaged, or one with another seed.
    """
    if settings.resuming.latest and accelerator.is_main_process:
        recover_state(settings.saving.folder, settings.saving.output_name)
    accelerator.wait_for_everyone()
    resumed = find_resumed(settings.resuming)
    if resumed is not None:
        return Beginning(resumed, resumed.state.seed)
    if settings.resuming.seed is not None:
        return Beginning(None, settings.resuming.seed)
    seed = int(broadcast_object_list([random_seed()])[0])
    logger.info("seed %d", seed)
    return Beginning(None, seed)


def preflight(
    settings: TrainingSettings, model: ModelPlan, beginning: Beginning, data: TrainingData, accelerator: Accelerator
) -> TrainingPlan:
    """Check everything that can be checked without loading a model, and report it once.

    Raises:
        UserError: optimiser, schedule, state, disk or runtime settings that cannot work here.
    """
    main, resumed = accelerator.is_main_process, beginning.resumed
    precision = Precision.of(settings, accelerator)
    settings.runtime.check(accelerator.device, precision.compute, model.config)
    settings.kernels.apply(accelerator.device)
    for sentence in settings.without_effect():
        logger.warning("%s", sentence)
    if model.module is networks.lora and not settings.network.dim_from_weights:
        warn_of_low_learning_rate(settings.optimizer, settings.network.network_dim or DEFAULT_RANK, settings.network.network_alpha)
    steps = settings.loop.steps(len(data.reader))
    optimizer = check_optimizer(settings.optimizer, accelerator.device, model.group_rates)
    schedule = check_lr_scheduler(settings.schedule, optimizer, steps)
    check_state_can_be_saved(optimizer, schedule, wanted=settings.saving.state_at_end)
    if resumed is not None:
        # Other modules may add their layers only when they are applied: their sizes are compared once they are loaded.
        known = model.network if model.module is networks.lora else None
        identity = state_identity(settings.flags, known, optimizer)
        check_resumed(settings.resuming, resumed, identity, settings.given_flags, steps)
    complete = settings.resuming.latest and is_complete(settings.resuming, steps, resumed)
    optimizer_bytes = state_bytes_per_value(optimizer)
    if main and not complete:
        if model.values is not None:
            require_room_for_save(settings.saving, model.values, precision.saved, optimizer_bytes)
        remove_leftovers(settings.saving.folder, settings.saving.output_name)
    memory = _plan_memory(settings, model, data, precision, optimizer_bytes, accelerator, shown=main and not complete)
    return TrainingPlan(model, precision, beginning, steps, memory, complete)


def _plan_memory(
    settings: TrainingSettings,
    model: ModelPlan,
    data: TrainingData,
    precision: Precision,
    optimizer_bytes: float,
    accelerator: Accelerator,
    shown: bool,
) -> MemoryPlan:
    """The memory plan, with the same number of swapped blocks in all processes."""
    sizes = [sample_size(prompt.height, prompt.width, prompt.frame_count) for prompt in model.prompts]
    free = free_device_memory(accelerator.device)
    memory = MemoryPlan(
        model.config,
        accelerator.device,
        settings.runtime,
        data.largest.size,
        precision.base,
        precision.compute,
        model.values,
        optimizer_bytes,
        sample=max(sizes, key=lambda size: size.tokens(model.config), default=None),
        may_quantize=not settings.network.is_lycoris,
    ).resolved(free)
    if shown:
        print(plan_table(memory, free, free_host_memory()), flush=True)
    # auto goes by the GPU of each process
    if (most := max(gather_object([memory.runtime.blocks_to_swap]))) > memory.runtime.blocks_to_swap:
        logger.info("--blocks_to_swap auto: %d, for the GPU with the least free memory", most)
        memory = memory.with_blocks(most)
    return memory
