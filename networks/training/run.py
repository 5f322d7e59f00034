"""A training under way: what the loop works on, and saving it."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from networks.training.data import BatchReader, TrainingData
from networks.training.distributed.gradients import SharedGradients
from networks.training.logging.logs import TrainingLogs
from networks.training.logging.update_size import ChangedWeights, log_size
from networks.training.loss.flow_matching import FlowMatching
from networks.training.optim.optimizers import describe_optimizer
from networks.training.pause import evaluation_weights
from networks.training.preflight import TrainingPlan
from networks.training.report.record import Status
from networks.training.report.writer import TrainingReport
from networks.training.samples.sampling import TrainingSamples
from networks.training.saving.files import remove_outdated, state_name, step_name, unused_step_name
from networks.training.saving.going_on import command_to_go_on, usable_state
from networks.training.saving.metadata import finished_metadata
from networks.training.saving.models import save_network
from networks.training.saving.state import DATA, Progress, Restorable, StateFile, random_state_of, read_state_file, save_state
from networks.training.settings import TrainingSettings
from utils.devices import free_memory
from utils.errors import UserError, first_line
from utils.hub import HubUploads
from utils.processes.launcher import words_before_script
from utils.processes.watchdog import Watchdog

logger = logging.getLogger(__name__)


class TrainingBroken(Exception):
    """Training cannot continue; the message gives the reason and what to do."""


@dataclass
class Training:
    """What the loop works on. ``settings``, ``plan`` and ``data`` stay as they are.

    Attributes:
        gradients: of all processes; None where there is only this one.
        changed: there on the main process, for networks whose updates can be measured.
        report: there on the main process.
        place: where the random generators stood when ``progress`` changed last.
        updating: whether the weights may be of a step that ``progress`` does not count yet.
        first_step: after which this run began.
        saved_models: by this run.
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
    gradients: SharedGradients | None = None
    changed: ChangedWeights | None = None
    uploads: HubUploads | None = None
    report: TrainingReport | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    watchdog: Watchdog = field(default_factory=Watchdog)
    place: dict[str, Any] = field(default_factory=dict)
    updating: bool = False
    first_step: int = 0
    saved_models: set[Path] = field(default_factory=set)

    @property
    def name(self) -> str:
        """--output_name."""
        return self.settings.saving.output_name

    @property
    def restorable(self) -> Restorable:
        """What a state holds of it."""
        loss = self.flow_matching
        return Restorable(self.network, self.optimizer, self.lr_scheduler, loss.noise, loss.timesteps, self.accelerator)

    def keep_place(self) -> None:
        """Note that ``progress`` and everything that is trained belong together now."""
        self.place, self.updating = random_state_of(self.restorable), False


def batch_order(settings: TrainingSettings, reader: BatchReader, accelerator: Accelerator) -> dict[str, object]:
    """What the place inside an epoch depends on, besides the seed, and how many batches a step has."""
    return {
        DATA: reader.fingerprint(),
        "--gradient_accumulation_steps": settings.loop.gradient_accumulation_steps,
        "processes": accelerator.num_processes,
    }


def save(training: Training, file_name: str, epoch: int, with_state: bool) -> None:
    """Save the model, and the state beside it; see ``require_finite_weights``."""
    require_finite_weights(training)
    save_model(training, file_name, epoch)
    write_report(training)
    if with_state:
        save_training_state(training, file_name)


def write_report(training: Training) -> None:
    """Bring the report up to date. Before a state is saved: whoever goes on from that finds its steps in the report."""
    if training.report is not None:
        with training.watchdog.during("saving", training.report.path.__str__):
            training.report.write()


def end_report(training: Training, status: Status, reason: str = "") -> None:
    """Write into the report how the training ended."""
    if training.report is not None:
        training.report.end(status, reason)


def save_model(training: Training, file_name: str, epoch: int, at_end: bool = False) -> None:
    """Save the network under the output folder, on the main process only, with copies in other layouts; log how large it is."""
    if not training.accelerator.is_main_process:
        return
    saving, step = training.settings.saving, training.progress.step
    metadata = finished_metadata(training.metadata, steps=step, epoch=epoch, now=time.time())
    with evaluation_weights(training.optimizer):
        precision = training.plan.model.precision.saved
        with training.watchdog.during("saving", (saving.folder / file_name).__str__):
            files = save_network(training.network, saving.folder / file_name, precision, metadata, saving, at_end)
        size = training.changed.share(training.network) if training.changed is not None else None
    training.saved_models.add(saving.folder / file_name)
    if size is not None:
        log_size(size, at_end)
        training.logs.values(step, {"update/relative_norm": size})
    if training.report is not None:
        training.report.wrote(files, training.settings)
    if training.uploads is not None:
        with training.watchdog.during("uploading", file_name.__str__):
            for path in files:
                training.uploads.upload(path)


def save_training_state(training: Training, model_name: str, rescued: bool = False) -> None:
    """Save the state that belongs to a model's name; all processes together, or the main one alone where it is ``rescued``."""
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
    write_report(training)
    with training.watchdog.during("saving", folder.__str__):
        save_state(folder, training.restorable, state, training.place if rescued else None, alone=rescued)
    if training.uploads is not None and training.uploads.settings.save_state_to_huggingface:
        training.uploads.upload(folder)


def save_for_signal(training: Training, file_name: str, epoch: int) -> None:
    """Save the state, then the model, of a training that was sent a signal; the model also where the state cannot be saved."""
    require_finite_weights(training)
    _save_state_or_model(training, file_name, epoch)


def _save_state_or_model(training: Training, file_name: str, epoch: int, rescued: bool = False) -> None:
    is_saved = rescued and training.settings.saving.folder / file_name in training.saved_models
    try:
        save_training_state(training, file_name, rescued)
    except UserError as error:
        if is_saved:
            raise
        save_model(training, file_name, epoch)
        raise UserError(f"{error} Without a state to resume from, the model {file_name} was saved.") from error
    if not is_saved:
        save_model(training, file_name, epoch)


def save_for_error(training: Training, error: Exception) -> None:
    """Save the state and the model of a training that fails, on the main process, if anything was trained since they were saved.

    Only weights that are finite are saved, and nothing that exists is replaced. What goes wrong here is a warning.
    """
    progress, saving = training.progress, training.settings.saving
    if not training.accelerator.is_main_process or progress.step - progress.skipped <= training.first_step:
        return
    cause: BaseException | None = error
    while cause is not None:  # the memory of the step that failed
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    free_memory(training.accelerator.device)
    try:
        require_finite_weights(training)
        if (path := _usable_state(training)) is not None:
            newest = read_state_file(path)
            if (newest.lineage, newest.progress.step) == (training.plan.beginning.lineage, progress.step):
                return
        if training.updating:
            logger.warning("the step after step %d may be half made in what is saved now", progress.step)
        ours = saving.folder / step_name(training.name, progress.step) in training.saved_models
        name = unused_step_name(saving.folder, training.name, progress.step, ours)
        _save_state_or_model(training, name, progress.epoch, rescued=True)
    except TrainingBroken:
        logger.warning("weights that are not finite are not saved")
    except Exception as failed:  # the device may be lost, the disk gone
        logger.warning("what was trained since the last save could not be saved whole: %s", first_line(failed))


def _usable_state(training: Training) -> Path | None:
    beginning = training.plan.beginning
    return usable_state(training.settings.saving.folder, training.name, beginning.lineage, beginning.resumed)


def say_how_to_go_on(training: Training) -> None:
    """Log the newest state that can be used, and the command that goes on from it; or that there is none."""
    if not training.accelerator.is_main_process:
        return
    folder = training.settings.saving.folder
    if (state := _usable_state(training)) is None:
        logger.info("there is no state of this training to go on from")
        return
    command = command_to_go_on(sys.argv, state, folder, words_before_script(training.accelerator.num_processes))
    more = ", and a higher --max_train_steps" if training.progress.step >= training.plan.steps else ""
    logger.info("the newest state is %s; go on with: %s%s", state, command, more)


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
