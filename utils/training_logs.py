"""TensorBoard and Weights & Biases: numbers of every step, samples, and the flags of a training."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import av
import numpy as np
import torch
from PIL import Image

from utils.arguments import public_flags
from utils.errors import UserError, first_line
from utils.files import require_writable_folder
from utils.key_values import nearest_name
from utils.toml_files import read_toml
from utils.training_pause import kept_random_state

if TYPE_CHECKING:
    from utils.training_samples import DrawnSample

logger = logging.getLogger(__name__)

DEFAULT_NAME = "network_train"
TABLES = ("tensorboard", "wandb")
LOG_FLAGS = ("log_prefix", "log_tracker_name", "log_tracker_config", "wandb_run_name", "wandb_api_key", "log_config")
FLUSH_SECONDS = 30  # what a killed training may lose of TensorBoard's file
GIF_SIDE = 320  # TensorBoard shows clips as animations, which are large: every second frame, at this size
GIF_MILLISECONDS = 80


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
        _import_summary_writer()
    if "wandb" in trackers:
        if args.wandb_api_key is not None and not args.wandb_api_key.strip():
            raise UserError("--wandb_api_key is empty; give the key, or leave the flag out after `wandb login`.")
        _import_wandb()
    if args.logging_dir is not None:
        require_writable_folder(args.logging_dir, "--logging_dir")
    _tracker_config(args)


def open_logs(args: argparse.Namespace, device: torch.device, main_process: bool = True) -> TrainingLogs:
    """The logs that the flags ask for, begun now; none in processes other than the main one.

    Args:
        device: whose peak memory is logged, if it is a CUDA device.

    Raises:
        UserError: TensorBoard or W&B refuses to begin; the first line of its reason is told.
    """
    if not main_process:
        return TrainingLogs()
    config = _tracker_config(args)
    flags = stored_flags(args) if args.log_config else {}
    logs = TrainingLogs([], device)
    with kept_random_state(device):
        for name in chosen_trackers(args):
            opener = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}[name]
            try:
                logs.trackers.append(opener(args, config.get(name, {}), flags))
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


def learning_rates(optimizer: torch.optim.Optimizer, names: Sequence[str] = ()) -> dict[str, float]:
    """The learning rate of each parameter group that has one, by its name.

    For optimisers that scale the rate by an estimate of their own (Prodigy, D-Adaptation) ``d*lr NAME`` is what they use.

    Args:
        names: of the groups, as ``networks.network_module.parameter_groups`` returns them; missing and doubled ones get a number.
    """
    rates: dict[str, float] = {}
    for number, group in enumerate(optimizer.param_groups, 1):
        name = names[number - 1] if number <= len(names) else f"group {number}"
        name = name if name not in rates else f"{name} {number}"
        if group.get("lr") is not None:
            rates[name] = float(group["lr"])
            if group.get("d") is not None:
                rates[f"d*lr {name}"] = float(group["d"]) * rates[name]
    return rates


class Tracker(Protocol):
    """What a logging package has to do."""

    name: str

    def numbers(self, values: Mapping[str, float], step: int) -> None: ...

    def sample(self, sample: DrawnSample, step: int) -> None: ...

    def close(self) -> None: ...


class TrainingLogs:
    """What the loop tells of its steps. A tracker that fails is told in one warning and left out from then on.

    Args:
        trackers: from ``open_logs``; none logs nothing.
        device: whose peak memory is logged, if it is a CUDA device.
    """

    def __init__(self, trackers: Sequence[Tracker] = (), device: torch.device | None = None) -> None:
        self.trackers = list(trackers)
        self.device = device

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


class TensorBoardTracker:
    """Event files in ``{logging_dir}/{log_prefix}{time}/{log_tracker_name}``. Clips are shown as animations."""

    name = "tensorboard"

    def __init__(self, args: argparse.Namespace, options: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
        run = f"{args.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
        folder = Path(args.logging_dir) / run / (args.log_tracker_name or DEFAULT_NAME)
        require_writable_folder(folder, "--logging_dir with --log_prefix and --log_tracker_name,")
        self.writer = _import_summary_writer()(str(folder), **{"flush_secs": FLUSH_SECONDS, **options})
        if flags:
            rows = [f"| {name} | {_cell(value)} |" for name, value in flags.items()]
            self.writer.add_text("flags", "\n".join(["| flag | value |", "|---|---|", *rows]), 0)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def sample(self, sample: DrawnSample, step: int) -> None:
        tag = f"sample/{sample.index:02d}"
        if sample.path.suffix == ".png":
            with Image.open(sample.path) as picture:
                self.writer.add_image(tag, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        else:
            from tensorboard.compat.proto.summary_pb2 import Summary

            data, width, height = animation(sample.path)
            picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
            self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=picture)]), step)

    def close(self) -> None:
        self.writer.close()


class WandbTracker:
    """A run in the project ``log_tracker_name``. The key is handed over in the environment, which W&B does not store."""

    name = "wandb"

    def __init__(self, args: argparse.Namespace, options: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
        self.wandb = _import_wandb()
        if args.wandb_api_key is not None:
            os.environ["WANDB_API_KEY"] = args.wandb_api_key
        settings: dict[str, Any] = {"project": args.log_tracker_name or DEFAULT_NAME, **options}
        if args.logging_dir is not None:
            Path(args.logging_dir).mkdir(parents=True, exist_ok=True)
            settings.setdefault("dir", args.logging_dir)
        if args.wandb_run_name is not None:
            settings["name"] = args.wandb_run_name
        if flags:
            settings["config"] = {**settings.get("config", {}), **flags}
        self.run = self.wandb.init(**settings)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def sample(self, sample: DrawnSample, step: int) -> None:
        caption = f"{sample.prompt.prompt} (seed {sample.seed})"
        if sample.path.suffix == ".png":
            media = self.wandb.Image(str(sample.path), caption=caption)
        else:
            media = self.wandb.Video(str(sample.path), caption=caption, format="mp4")
        self.run.log({f"sample/{sample.index:02d}": media}, step=step)

    def close(self) -> None:
        self.run.finish()


def animation(path: Path) -> tuple[bytes, int, int]:
    """A video as an animated GIF, of every second frame and at most 320 pixels a side: (data, width, height)."""
    with av.open(str(path)) as container:
        frames = [frame.to_image() for index, frame in enumerate(container.decode(video=0)) if index % 2 == 0]
    for frame in frames:
        frame.thumbnail((GIF_SIDE, GIF_SIDE))
    buffer = io.BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:], duration=GIF_MILLISECONDS, loop=0)
    return buffer.getvalue(), *frames[0].size


def _cell(value: Any) -> str:
    """A value in a row of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _reason(error: BaseException, args: argparse.Namespace) -> str:
    reason = first_line(error).rstrip(".")
    return reason.replace(args.wandb_api_key, "***") if args.wandb_api_key else reason


def _tracker_config(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The tables of --log_tracker_config."""
    if args.log_tracker_config is None:
        return {}
    config = read_toml(args.log_tracker_config, "--log_tracker_config")
    for name, table in config.items():
        if name not in TABLES or not isinstance(table, dict):
            raise UserError(
                f"--log_tracker_config {args.log_tracker_config}: {name!r} is no tracker's table; there are "
                f"{' and '.join(f'[{table}]' for table in TABLES)}.{nearest_name(name, TABLES)}"
            )
    return config


def _import_summary_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # an installation that does not fit raises many things besides ImportError
        raise UserError(
            f"TensorBoard's logs need tensorboard, which cannot be imported here ({first_line(error)}). "
            "Install it with: pip install tensorboard; or leave --logging_dir and --log_with out."
        ) from error
    return SummaryWriter


def _import_wandb() -> Any:
    try:
        import wandb
    except Exception as error:
        raise UserError(
            f"--log_with wandb needs wandb, which cannot be imported here ({first_line(error)}). "
            "Install it with: pip install wandb; or leave it out."
        ) from error
    if not hasattr(wandb, "init"):  # a folder called wandb, which W&B itself makes, imports as an empty package
        raise UserError(
            "--log_with wandb finds a folder called wandb but not the package. Install it with: pip install wandb; or leave it out."
        )
    return wandb
