"""What a training tells TensorBoard and Weights & Biases: numbers of every step, samples, and its flags."""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from networks.training.logging.tensorboard import TensorBoardTracker, import_summary_writer
from networks.training.logging.tracker_config import TABLES, read_tracker_config
from networks.training.logging.trackers import RunStart, Tracker
from networks.training.logging.wandb import WandbTracker, import_wandb
from networks.training.pause import kept_random_state
from utils.cli.arguments import public_flags
from utils.errors import UserError, first_line
from utils.files import require_writable_folder

if TYPE_CHECKING:
    from networks.training.samples.sampling import DrawnSample
    from networks.training.saving.resume import Resumed

logger = logging.getLogger(__name__)

LOG_FLAGS = ("log_prefix", "log_tracker_name", "log_tracker_config", "wandb_run_name", "wandb_api_key", "log_config")


def chosen_trackers(args: argparse.Namespace) -> tuple[str, ...]:
    """What --log_with says, ``tensorboard`` where only --logging_dir is given; empty for no logs."""
    if args.log_with is None:
        return ("tensorboard",) if args.logging_dir is not None else ()
    return TABLES if args.log_with == "all" else (args.log_with,)


def check_logs(args: argparse.Namespace) -> None:
    """Refuse logs that cannot be written, before anything is loaded. A key given as a flag is taken out of ``sys.argv``.

    Raises:
        UserError: a package that is not installed, a folder or a configuration that cannot be used, or a flag that is missing.
    """
    trackers = chosen_trackers(args)
    for secret in (args.wandb_api_key, args.huggingface_token):
        hide_secret(sys.argv, secret)
    unused = [name for name in LOG_FLAGS if getattr(args, name)]
    if trackers and "wandb" not in trackers:
        unused = [name for name in unused if name.startswith("wandb")]
    if unused and "wandb" not in trackers:
        needs = "--log_with wandb" if trackers else "--log_with or --logging_dir"
        logger.warning("%s: no effect without %s.", ", ".join(f"--{name}" for name in unused), needs)
    if not trackers:
        return
    if "tensorboard" in trackers:
        if args.logging_dir is None:
            raise UserError(f"--log_with {args.log_with} needs --logging_dir, the folder for TensorBoard's files.")
        import_summary_writer()
    wandb_names: list[str] = []
    if "wandb" in trackers:
        if args.wandb_api_key is not None and not args.wandb_api_key.strip():
            raise UserError("--wandb_api_key is empty; give the key, or leave the flag out after `wandb login`.")
        parameters = inspect.signature(import_wandb().init).parameters.values()
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            wandb_names = [parameter.name for parameter in parameters]
    if args.logging_dir is not None:
        require_writable_folder(args.logging_dir, "--logging_dir")
    options = read_tracker_config(args.log_tracker_config, wandb_names)["tensorboard"]
    if "log_dir" in options:
        require_writable_folder(options["log_dir"], "--log_tracker_config: log_dir")
    if options.get("comment"):
        logger.warning("--log_tracker_config: comment has no effect; --log_prefix is what the name of the folder begins with.")


def open_logs(
    args: argparse.Namespace, device: torch.device, main_process: bool = True, resumed: Resumed | None = None
) -> TrainingLogs:
    """The logs that the flags ask for, begun now; none in processes other than the main one.

    Args:
        device: whose peak memory is logged, if it is a CUDA device.
        resumed: the state that training goes on from. Its runs are continued, except under another --output_name: several
            trainings may go on from one state, and each of them needs a run of its own.

    Raises:
        UserError: TensorBoard or W&B refuses to begin; the first line of its reason is told.
    """
    if not main_process:
        return TrainingLogs()
    config = read_tracker_config(args.log_tracker_config)
    flags = stored_flags(args) if args.log_config else {}
    logs, step = TrainingLogs([], device), 0
    if resumed is not None and resumed.state.flags.get("output_name") == args.output_name:
        logs.runs, step = dict(resumed.state.progress.log_runs), resumed.state.progress.step
    with kept_random_state(device):
        for name in chosen_trackers(args):
            opener = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}[name]
            try:
                logs.trackers.append(opener(RunStart(args, config[name], flags, logs.runs.get(name), step)))
                logs.runs[name] = logs.trackers[-1].run
            except UserError:
                logs.close()
                raise
            except Exception as error:  # a tracker may fail in ways of its own: no key, no network, no such project
                logs.close()
                raise UserError(f"--log_with {name} cannot begin: {_reason(error, args)}. Mend that, or leave it out.") from error
    return logs


def stored_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags for --log_config, by name, as values that JSON can hold; without keys and tokens."""
    return {
        name: value if isinstance(value, bool | int | float | str | list) else str(value)
        for name, value in sorted(public_flags(args).items())
    }


def hide_secret(words: list[str], secret: str | None) -> None:
    """Replace ``secret`` in the words of a command line by stars: W&B stores the command line of a run."""
    if secret:
        words[:] = ["***" if word == secret else word.replace(f"={secret}", "=***") for word in words]


class TrainingLogs:
    """What the loop tells of its steps. A tracker that fails is told in one warning and left out from then on.

    Args:
        trackers: from ``open_logs``; none logs nothing.
        device: whose peak memory is logged, if it is a CUDA device.

    Attributes:
        runs: what a state keeps of them, by tracker; also of those that are not used this time.
    """

    def __init__(self, trackers: Sequence[Tracker] = (), device: torch.device | None = None) -> None:
        self.trackers = list(trackers)
        self.device = device
        self.runs: dict[str, str] = {}

    def __enter__(self) -> TrainingLogs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
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
        """One optimiser step.

        Args:
            rates: what ``learning_rates`` said before the step; the schedule moves on within it.
            gradient_norm: before clipping; None where it was not computed.
            seconds: that the step took.
            validation_loss: None where it was not measured after this step.
        """
        values = {"loss/current": loss, "loss/average": average, "loss/validation": validation_loss}
        values |= {"grad_norm": gradient_norm, "seconds_per_step": seconds}
        values |= {f"lr/{name}": rate for name, rate in rates.items()}
        if self.trackers and self.device is not None and self.device.type == "cuda":
            values["memory/peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.numbers(values, step)

    def numbers(self, values: Mapping[str, float | None], step: int) -> None:
        """Any numbers by name, such as a validation loss; those that are None are left out."""
        known = {name: float(value) for name, value in values.items() if value is not None}
        for tracker in list(self.trackers):
            self._attempt(tracker, lambda tracker=tracker: tracker.numbers(known, step))

    def samples(self, samples: Sequence[DrawnSample], step: int) -> None:
        """Pictures and videos that were drawn after ``step``. One that fails is a warning and no more."""
        for tracker in self.trackers:
            for sample in samples:
                try:
                    tracker.sample(sample, step)
                except Exception as error:  # whatever a tracker does with a file
                    logger.warning("%s: %s does not take %s; training goes on.", tracker.name, first_line(error), sample.path)

    def close(self) -> None:
        """Write what is not written yet, and end the run."""
        for tracker in list(self.trackers):
            self._attempt(tracker, tracker.close)
        self.trackers.clear()

    def _attempt(self, tracker: Tracker, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # hours of training are worth more than their logs
            logger.warning("%s fails (%s); training goes on without it.", tracker.name, first_line(error))
            self.trackers.remove(tracker)


def _reason(error: BaseException, args: argparse.Namespace) -> str:
    reason = first_line(error).rstrip(".")
    return reason.replace(args.wandb_api_key, "***") if args.wandb_api_key else reason
