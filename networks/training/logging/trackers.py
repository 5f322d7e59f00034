"""accelerate's trackers for TensorBoard and Weights & Biases, with what they lack: samples, a table of the flags, resumed runs.

Their packages are imported when they are used.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from accelerate.tracking import TensorBoardTracker, WandBTracker
from PIL import Image

from utils.errors import UserError, shown
from utils.files import require_writable_folder
from utils.key_values import nearest_name
from utils.toml_files import read_toml

if TYPE_CHECKING:
    from networks.training.samples.sampling import SavedSample

DEFAULT_NAME = "network_train"  # of --log_tracker_name
RUN_TIME, IS_RUN_TIME = "%Y%m%d%H%M%S", re.compile(r"[0-9]{14}")  # the id of a run in TensorBoard
GIF_SIDE = 320  # TensorBoard shows clips as animations, which are large: every second frame, at this size
GIF_MILLISECONDS = 80
# Options of SummaryWriter of which its thread, and not the call, would fail on other values: the training would wait for ever.
WRITER_NUMBERS, MAX_NUMBER = ("purge_step", "max_queue", "flush_secs"), 10**6


@dataclass(frozen=True)
class LogSettings:
    """The flags of the logs.

    Attributes:
        log_with: a name of ``TRACKERS``, or ``all``; None for TensorBoard where there is a ``logging_dir``, else no logs.
        loss_log: see ``networks.training.logging.loss_log``.
    """

    logging_dir: str | None = None
    log_with: str | None = None
    log_prefix: str | None = None
    log_tracker_name: str | None = None
    log_tracker_config: str | None = None
    log_config: bool = False
    wandb_run_name: str | None = None
    wandb_api_key: str | None = field(default=None, repr=False)
    loss_log: str | None = None

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names of the trackers in use."""
        if self.log_with is None:
            return ("tensorboard",) if self.logging_dir is not None else ()
        return tuple(TRACKERS) if self.log_with == "all" else (self.log_with,)

    def __post_init__(self) -> None:
        if "tensorboard" in self.trackers and self.logging_dir is None:
            raise UserError(f"--log_with {self.log_with} needs --logging_dir, the folder for TensorBoard's files.")
        if "wandb" in self.trackers and self.wandb_api_key is not None and not self.wandb_api_key.strip():
            raise UserError("--wandb_api_key is empty; give the key, or leave the flag out after `wandb login`.")

    def without_effect(self) -> list[str]:
        """A sentence on the flags that the chosen trackers do not use."""
        if "wandb" in self.trackers:
            return []
        unused = ["wandb_run_name", "wandb_api_key"]
        if not self.trackers:
            unused = ["log_prefix", "log_tracker_name", "log_tracker_config", *unused, "log_config"]
        given = [f"--{name}" for name in unused if getattr(self, name)]
        needs = "--log_with wandb" if self.trackers else "--log_with or --logging_dir"
        return [f"{', '.join(given)}: no effect without {needs}."] if given else []


class TensorBoard(TensorBoardTracker):
    """Event files in ``{logging_dir}/{log_prefix}{run_id}/{log_tracker_name}``. Clips are shown as animations.

    Attributes:
        run_id: the time of its beginning; a state keeps it.
    """

    module = "torch.utils.tensorboard"

    def __init__(self, settings: LogSettings, options: Mapping[str, Any], earlier: str | None, step: int) -> None:
        options = dict(options)
        if earlier is not None and IS_RUN_TIME.fullmatch(earlier):
            self.run_id = earlier
            options.setdefault("purge_step", step + 1)  # later steps are made again
        else:
            self.run_id = unused_run_id(settings)
        folder = Path(settings.logging_dir, f"{settings.log_prefix or ''}{self.run_id}", settings.log_tracker_name or DEFAULT_NAME)
        folder = require_writable_folder(options.pop("log_dir", folder), "--logging_dir with --log_prefix and --log_tracker_name,")
        super().__init__(folder.name, folder.parent, **options)
        if hasattr(self, "start"):  # older versions of accelerate have begun the run by now
            self.start()

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The flags as a Markdown table; accelerate would make a second run for them."""
        cells = ((name, " ".join(str(value).split()).replace("|", "\\|")) for name, value in values.items())
        self.log({"flags": "\n".join(["| flag | value |", "|---|---|", *(f"| {name} | {cell} |" for name, cell in cells)])}, step=0)

    def log_sample(self, sample: SavedSample, step: int) -> None:
        tag = f"sample/{sample.index:02d}"
        if sample.path.suffix == ".png":
            with Image.open(sample.path) as picture:
                self.writer.add_image(tag, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
            return
        from tensorboard.compat.proto.summary_pb2 import Summary  # SummaryWriter.add_video would need moviepy

        data, width, height = animation(sample.path)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def unused_run_id(settings: LogSettings) -> str:
    """The current time, or a second later where another run began in this one."""
    seconds = time.time()
    while Path(settings.logging_dir, f"{settings.log_prefix or ''}{time.strftime(RUN_TIME, time.localtime(seconds))}").exists():
        seconds += 1
    return time.strftime(RUN_TIME, time.localtime(seconds))


class WandB(WandBTracker):
    """A run in the project ``log_tracker_name``. The key goes through the environment, which W&B does not store.

    W&B itself leaves out steps that a resumed run has already.

    Attributes:
        run_id: of the run in W&B; a state keeps it.
    """

    module = "wandb"

    def __init__(self, settings: LogSettings, options: Mapping[str, Any], earlier: str | None, step: int) -> None:
        if settings.wandb_api_key is not None:
            os.environ["WANDB_API_KEY"] = settings.wandb_api_key
        options = {"project": settings.log_tracker_name or DEFAULT_NAME, **options}
        if settings.logging_dir is not None:
            options.setdefault("dir", settings.logging_dir)
        if settings.wandb_run_name is not None:
            options["name"] = settings.wandb_run_name
        if earlier is not None and not options.keys() & {"resume", "resume_from", "fork_from"}:
            options = {"id": earlier, **options, "resume": "allow"}
        super().__init__(options.pop("project"), **options)
        if hasattr(self, "start"):  # older versions of accelerate have begun the run by now
            self.start()
        self.run_id = str(self.run.id)

    def log_sample(self, sample: SavedSample, step: int) -> None:
        import wandb

        caption = f"{sample.prompt.prompt} (seed {sample.prompt.sampling.seed})"
        if sample.path.suffix == ".png":
            media = wandb.Image(str(sample.path), caption=caption)
        else:
            media = wandb.Video(str(sample.path), caption=caption, format="mp4")
        self.log({f"sample/{sample.index:02d}": media}, step=step)


TRACKERS: dict[str, type[TensorBoard | WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


def read_tracker_config(path: str | os.PathLike[str] | None) -> dict[str, dict[str, Any]]:
    """--log_tracker_config: the arguments of SummaryWriter in [tensorboard], those of ``wandb.init`` in [wandb]."""
    config = {} if path is None else read_toml(path, "--log_tracker_config")
    for name, table in config.items():
        if name not in TRACKERS or not isinstance(table, dict):
            raise UserError(
                f"--log_tracker_config {path}: {name!r} is no tracker's table.{nearest_name(name, TRACKERS)} "
                f"There are {' and '.join(f'[{known}]' for known in TRACKERS)}."
            )
    for name, value in config.get("tensorboard", {}).items():
        if name in WRITER_NUMBERS and not (isinstance(value, int | float) and 0 <= value <= MAX_NUMBER):
            raise UserError(
                f"--log_tracker_config {path}: {name} must be a number from 0 to {MAX_NUMBER}, but it is {shown(value)}."
            )
    return {name: config.get(name, {}) for name in TRACKERS}


def animation(path: Path) -> tuple[bytes, int, int]:
    """A video as an animated GIF, of every second frame and at most 320 pixels a side: (data, width, height)."""
    with av.open(str(path)) as container:
        frames = [frame.to_image() for index, frame in enumerate(container.decode(video=0)) if index % 2 == 0]
    for frame in frames:
        frame.thumbnail((GIF_SIDE, GIF_SIDE))
    buffer = io.BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:], duration=GIF_MILLISECONDS, loop=0)
    return buffer.getvalue(), *frames[0].size
