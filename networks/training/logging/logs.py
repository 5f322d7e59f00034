"""What a training logs in TensorBoard and Weights & Biases: numbers of every step, samples, and its flags."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from networks.training.logging.loss_log import check_loss_log
from networks.training.logging.trackers import TRACKERS, LogSettings, TensorBoard, WandB, read_tracker_config
from networks.training.pause import kept_random_state
from utils.errors import UserError, first_line

if TYPE_CHECKING:
    from networks.training.report.writer import TrainingReport
    from networks.training.samples.sampling import SavedSample

logger = logging.getLogger(__name__)


def check_logs(settings: LogSettings) -> None:
    """Refuse logs that cannot begin, before anything is loaded: a package or folder that is missing, a wrong configuration."""
    if settings.loss_log is not None:
        check_loss_log(settings.loss_log)
    for name in settings.trackers:
        try:
            importlib.import_module(TRACKERS[name].module)
        except Exception as error:  # an installation that does not fit raises many things besides ImportError
            raise UserError(
                f"--log_with {name} needs a package which cannot be imported here ({first_line(error)}). "
                f"Install it with: pip install {name}; or leave --logging_dir and --log_with out."
            ) from error
    if settings.trackers:
        read_tracker_config(settings.log_tracker_config)


def open_logs(
    settings: LogSettings,
    device: torch.device,
    *,
    main_process: bool = True,
    flags: Mapping[str, Any] | None = None,
    runs: Mapping[str, str] | None = None,
    step: int = 0,
) -> TrainingLogs:
    """The logs that the flags ask for, begun now; none in processes other than the main one.

    Args:
        device: whose peak memory is logged, if it is a CUDA device.
        flags: for --log_config, without secrets.
        runs: ``TrainingLogs.runs`` of a training that is resumed, to continue the same runs.
        step: after which it is resumed.

    Raises:
        UserError: TensorBoard or W&B refuses to begin; with the first line of its reason.
    """
    if not main_process:
        return TrainingLogs()
    config = read_tracker_config(settings.log_tracker_config)
    logs = TrainingLogs(device, runs)
    plain = (bool, int, float, str, list)
    stored = {name: value if isinstance(value, plain) else str(value) for name, value in (flags or {}).items()}
    with kept_random_state(device):
        for name in settings.trackers:
            try:
                tracker = TRACKERS[name](settings, config[name], logs.runs.get(name), step)
                logs.trackers.append(tracker)
                logs.runs[name] = tracker.run_id
                if settings.log_config and stored:
                    tracker.store_init_configuration(stored)
            except Exception as error:  # a tracker may fail in ways of its own: no key, no network, no such project
                logs.close()
                if isinstance(error, UserError):
                    raise
                reason = first_line(error).rstrip(".")
                raise UserError(f"--log_with {name} cannot begin: {reason}. Solve that, or leave it out.") from error
    return logs


class TrainingLogs:
    """Logs the steps of a training. A tracker that fails is one warning, and left out from then on.

    Attributes:
        runs: what a state keeps of them, by tracker; also of those that are not used this time.
    """

    def __init__(self, device: torch.device | None = None, runs: Mapping[str, str] | None = None) -> None:
        self.trackers: list[TensorBoard | WandB | TrainingReport] = []
        self.device = device
        self.runs = dict(runs or {})

    def __enter__(self) -> TrainingLogs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(
        self,
        step: int,
        *,
        loss: float,
        average: float,
        rates: Mapping[str, float],
        gradient_norm: float | None = None,
        seconds: float | None = None,
        validation_loss: float | None = None,
    ) -> None:
        """One optimizer step: its learning rates, the norm before clipping, its duration. What is None is not logged."""
        values = {"loss/current": loss, "loss/average": average, "loss/validation": validation_loss}
        values |= {"grad_norm": gradient_norm, "seconds_per_step": seconds}
        values |= {f"lr/{name}": rate for name, rate in rates.items()}
        if self.trackers and self.device is not None and self.device.type == "cuda":
            values["memory/peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.values(step, {name: float(value) for name, value in values.items() if value is not None})

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of ``step`` by their names."""
        self._attempt(lambda tracker: tracker.log(dict(values), step=step))

    def samples(self, samples: Sequence[SavedSample], step: int) -> None:
        """Pictures and videos of ``step``. One that fails is a warning, and its tracker continues."""
        for tracker in self.trackers:
            for sample in samples:
                try:
                    tracker.log_sample(sample, step)
                except Exception as error:  # whatever a tracker does with a file
                    logger.warning("%s cannot log %s (%s); training continues.", tracker.name, sample.path, first_line(error))

    def close(self) -> None:
        """Write what is not written yet, and end the runs."""
        self._attempt(lambda tracker: tracker.finish())
        self.trackers.clear()

    def _attempt(self, call: Callable[[TensorBoard | WandB | TrainingReport], None]) -> None:
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as error:  # hours of training are worth more than their logs
                logger.warning("%s fails (%s); training continues without it.", tracker.name, first_line(error))
                self.trackers.remove(tracker)
