"""A training under way: what the loop works on, and saving it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import nn

from networks.training.data import BatchReader, TrainingData
from networks.training.logging.logs import TrainingLogs
from networks.training.logging.update_size import ChangedWeights, log_size
from networks.training.loss.flow_matching import FlowMatching
from networks.training.optim.optimizers import describe_optimizer
from networks.training.pause import evaluation_weights
from networks.training.preflight import TrainingPlan
from networks.training.samples.sampling import TrainingSamples
from networks.training.saving.files import remove_outdated, state_name
from networks.training.saving.metadata import finished_metadata
from networks.training.saving.models import save_network
from networks.training.saving.state import Progress, Restorable, StateFile, save_state
from networks.training.settings import TrainingSettings
from utils.errors import UserError
from utils.hub import HubUploads

logger = logging.getLogger(__name__)


class TrainingBroken(Exception):
    """Training cannot continue; the message gives the reason and what to do."""


@dataclass
class Training:
    """What the loop works on. ``settings``, ``plan`` and ``data`` stay as they are.

    ``changed`` is there on the main process, for networks whose updates can be measured.
    """

    settings: TrainingSettings
    plan: TrainingPlan
    data: TrainingData
    accelerator: Accelerator
    transformer: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    group_names: list[str]
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    flow_matching: FlowMatching
    progress: Progress
    samples: TrainingSamples
    logs: TrainingLogs
    changed: ChangedWeights | None = None
    uploads: HubUploads | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """--output_name."""
        return self.settings.saving.output_name

    @property
    def restorable(self) -> Restorable:
        """What a state holds of it."""
        loss = self.flow_matching
        return Restorable(self.network, self.optimizer, self.lr_scheduler, loss.noise, loss.timesteps, self.accelerator)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.settings.loop.steps_per_epoch(len(self.data.reader))


def batch_order(settings: TrainingSettings, reader: BatchReader, accelerator: Accelerator) -> dict[str, object]:
    """What the place inside an epoch depends on, besides the seed."""
    return {
        "data sets": reader.fingerprint(),  # the name in states that people have
        "--gradient_accumulation_steps": settings.loop.gradient_accumulation_steps,
        "processes": accelerator.num_processes,
    }


def save(training: Training, file_name: str, epoch: int, with_state: bool) -> None:
    """Save the model, and the state beside it; see ``require_finite_weights``."""
    require_finite_weights(training)
    save_model(training, file_name, epoch)
    if with_state:
        save_training_state(training, file_name)


def save_model(training: Training, file_name: str, epoch: int, at_end: bool = False) -> None:
    """Save the network under the output folder, on the main process only, with copies in other layouts; log how large it is."""
    if not training.accelerator.is_main_process:
        return
    saving, step = training.settings.saving, training.progress.step
    metadata = finished_metadata(training.metadata, steps=step, epoch=epoch, now=time.time())
    with evaluation_weights(training.optimizer):
        precision = training.plan.model.precision.saved
        files = save_network(training.network, saving.folder / file_name, precision, metadata, saving, at_end)
        size = training.changed.share(training.network) if training.changed is not None else None
    if size is not None:
        log_size(size, at_end)
        training.logs.values(step, {"update/relative_norm": size})
    if training.uploads is not None:
        for path in files:
            training.uploads.upload(path)


def save_training_state(training: Training, model_name: str) -> None:
    """Save the state that belongs to a model's name; all processes together."""
    state = StateFile(
        progress=training.progress,
        seed=training.plan.beginning.seed,
        optimizer=describe_optimizer(training.optimizer),
        order=batch_order(training.settings, training.data.reader, training.accelerator),
        flags=training.plan.beginning.given_flags,
        saved_at=time.time(),
        lineage=training.plan.beginning.lineage,
    )
    folder = training.settings.saving.folder / state_name(model_name)
    save_state(folder, training.restorable, state)
    if training.uploads is not None and training.uploads.settings.save_state_to_huggingface:
        training.uploads.upload(folder)


def save_for_signal(training: Training, file_name: str, epoch: int) -> None:
    """Save the state, then the model, of a training that was sent a signal; the model also where the state cannot be saved."""
    require_finite_weights(training)
    try:
        save_training_state(training, file_name)
    except UserError as error:
        save_model(training, file_name, epoch)
        raise UserError(f"{error} Without a state to resume from, the model {file_name} was saved.") from error
    save_model(training, file_name, epoch)


def rotate(training: Training, *, step: int | None = None, epoch: int | None = None) -> None:
    """Remove what is no longer kept, now that what belongs to this step or epoch is saved."""
    if training.accelerator.is_main_process:
        uploaded = training.uploads.wait_for if training.uploads is not None else None
        remove_outdated(training.settings.saving, step=step, epoch=epoch, before_removal=uploaded)


def require_finite_weights(training: Training) -> None:
    """Raise TrainingBroken rather than save weights that are not finite, and by that remove older ones."""
    if not all(torch.isfinite(parameter).all() for parameter in training.network.parameters()):
        raise TrainingBroken(
            f"the network's weights hold NaN or infinity after step {training.progress.step}; they are not saved. The models and "
            "states that were saved before are whole; start from the last model with --network_weights, and a lower "
            "--learning_rate or another precision."
        )
