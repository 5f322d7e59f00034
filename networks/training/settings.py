"""The settings of a training by subject. ``arguments.training_settings`` reads each flag once; nothing writes to them later."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hunyuan_model.runtime.settings import KernelSettings, RuntimeSettings
from networks.merging import complete_multipliers
from networks.training.logging.trackers import LogSettings
from networks.training.loss.flow_matching import FlowSettings
from networks.training.loss.timestep_sampling import TimestepSettings
from networks.training.optim.lr_schedules import ScheduleSettings
from networks.training.optim.optimizers import OptimizerSettings
from networks.training.samples.sampling import SampleSettings
from networks.training.saving.files import SaveSettings, copy_name, final_name, state_name, step_name
from networks.training.saving.resume import ResumeSettings
from utils.errors import UserError
from utils.files import MAX_NAME_BYTES, require_possible_file, require_writable_folder
from utils.hub import HubSettings
from utils.key_values import parse_key_values


@dataclass(frozen=True)
class ModelSettings:
    """The frozen transformer, and LoRA files that are merged into it while it loads."""

    dit: str
    dit_dtype: str | None = None
    base_weights: tuple[str, ...] = ()
    base_weights_multiplier: tuple[float, ...] = ()
    lora_partial: bool = False

    def __post_init__(self) -> None:
        complete_multipliers(self.base_weights, self.base_weights_multiplier, "--base_weights", "--base_weights_multiplier")


@dataclass(frozen=True)
class NetworkSettings:
    """What is trained; ``network_args`` are ``key=value`` words for the network module."""

    network_module: str = "networks.lora"
    network_weights: str | None = None
    network_dim: int | None = None
    network_alpha: float = 1.0
    network_dropout: float | None = None
    network_args: tuple[str, ...] = ()
    dim_from_weights: bool = False
    scale_weight_norms: float | None = None

    def __post_init__(self) -> None:
        if self.network_dropout is not None and self.network_dropout >= 1:
            raise UserError(f"--network_dropout {self.network_dropout:g} is not between 0 and 1.")
        if self.dim_from_weights and not self.network_weights:
            raise UserError("--dim_from_weights takes the ranks from --network_weights, which is missing.")

    @property
    def arguments(self) -> dict[str, str]:
        """``network_args`` by their names."""
        return parse_key_values(self.network_args, "--network_args")

    @property
    def is_lycoris(self) -> bool:
        return self.network_module.startswith("lycoris")


@dataclass(frozen=True)
class LoopSettings:
    """How long the training is, how it goes through the data, and in which precision."""

    max_train_steps: int = 1600
    max_train_epochs: int | None = None
    gradient_accumulation_steps: int = 1
    mixed_precision: str | None = None
    save_precision: str | None = None
    validation_split: float | None = None
    validate_every_n_steps: int | None = None
    max_data_loader_n_workers: int = 8
    persistent_data_loader_workers: bool = True
    dry_step: str = "auto"
    ddp_timeout: int | None = None
    ddp_gradient_as_bucket_view: bool = False
    ddp_static_graph: bool = False

    def __post_init__(self) -> None:
        if self.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise UserError("--mixed_precision fp16 needs a CUDA device and torch finds none here; use bf16 or no.")
        if self.validation_split is not None and self.validation_split >= 1:
            raise UserError(f"--validation_split {self.validation_split:g} is a share of the items, below 1, such as 0.1.")
        if self.validate_every_n_steps and self.validation_split is None:
            raise UserError("--validate_every_n_steps measures what --validation_split holds out; give --validation_split as well.")

    def without_effect(self) -> list[str]:
        """A sentence on flags of torch's wrapper for several processes, which is not used."""
        given = [f"--{name}" for name in ("ddp_gradient_as_bucket_view", "ddp_static_graph") if getattr(self, name)]
        return [f"{', '.join(given)}: no effect, as gradients are averaged without torch's wrapper."] if given else []

    def steps(self, per_epoch: int) -> int:
        """Of the whole training, with ``per_epoch`` optimizer steps in an epoch."""
        return self.max_train_epochs * per_epoch if self.max_train_epochs else self.max_train_steps


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that the flags say.

    Attributes:
        flags: every flag by name, without secrets, for metadata and states.
    """

    dataset_config: str
    model: ModelSettings
    runtime: RuntimeSettings
    kernels: KernelSettings
    loop: LoopSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    timesteps: TimestepSettings
    flow: FlowSettings
    network: NetworkSettings
    saving: SaveSettings
    resuming: ResumeSettings
    samples: SampleSettings
    logs: LogSettings
    hub: HubSettings
    flags: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.hub.save_state_to_huggingface and not self.saving.state_at_end:
            raise UserError(
                "--save_state_to_huggingface uploads saved states; give --save_state or --save_state_on_train_end as well."
            )
        name = self.saving.output_name
        if any(separator in name for separator in "/\\"):
            raise UserError(f"--output_name {name!r} holds a path separator; folders belong into --output_dir.")
        if not name.strip() or not name.isprintable():
            raise UserError(f"--output_name {name!r} is no file name; give one, without .safetensors.")
        model = step_name(name, 0)
        copies = [copy_name(model, copy) for copy in self.saving.copies(at_end=False)]
        if max(len(os.fsencode(file)) for file in (model, *copies)) > MAX_NAME_BYTES:
            raise UserError(
                f"--output_name is too long: with what is added for steps and layouts it has at most {MAX_NAME_BYTES} bytes."
            )
        folder = require_writable_folder(self.saving.output_dir, "--output_dir")
        require_possible_file(folder / final_name(name), "the LoRA")
        if (folder / state_name(name)).is_file():  # a state would take its place
            raise UserError(f"{folder / state_name(name)} is a file, but the state of that name is a folder; move it away.")

    def without_effect(self) -> list[str]:
        """Sentences on flags that do nothing beside the others."""
        parts = (self.loop, self.schedule, self.timesteps, self.samples, self.logs)
        return [sentence for part in parts for sentence in part.without_effect()]
