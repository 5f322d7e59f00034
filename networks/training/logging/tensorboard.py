"""Logs in TensorBoard's event files."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from PIL import Image

from networks.training.logging.trackers import DEFAULT_NAME, RunStart
from utils.errors import UserError, first_line
from utils.files import require_writable_folder

if TYPE_CHECKING:
    from networks.training.samples.sampling import DrawnSample

FLUSH_SECONDS = 30  # what a killed training may lose of TensorBoard's file
RUN_TIME, IS_RUN_TIME = "%Y%m%d%H%M%S", re.compile(r"[0-9]{14}")  # what a run in TensorBoard is called by
GIF_SIDE = 320  # TensorBoard shows clips as animations, which are large: every second frame, at this size
GIF_MILLISECONDS = 80


class TensorBoardTracker:
    """Event files in ``{logging_dir}/{log_prefix}{time}/{log_tracker_name}``. Clips are shown as animations.

    The options are those of SummaryWriter, of which a ``log_dir`` is the folder. A run is known by the time of its beginning.
    """

    name = "tensorboard"

    def __init__(self, start: RunStart) -> None:
        args, earlier, step = start.args, start.earlier, start.step
        goes_on = earlier is not None and IS_RUN_TIME.fullmatch(earlier) is not None
        self.run = earlier if goes_on else time.strftime(RUN_TIME)
        folder = Path(args.logging_dir) / f"{args.log_prefix or ''}{self.run}" / (args.log_tracker_name or DEFAULT_NAME)
        require_writable_folder(folder, "--logging_dir with --log_prefix and --log_tracker_name,")
        settings = {"log_dir": str(folder), "flush_secs": FLUSH_SECONDS, **start.options}
        self.writer = import_summary_writer()(settings.pop("log_dir"), **settings)
        self._made_again_after = step if goes_on and "purge_step" not in start.options else None
        if start.flags:
            rows = [f"| {name} | {_cell(value)} |" for name, value in start.flags.items()]
            self.writer.add_text("flags", "\n".join(["| flag | value |", "|---|---|", *rows]), step)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        if self._made_again_after is not None:
            self._hide_after(self._made_again_after)
            self._made_again_after = None
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def _hide_after(self, step: int) -> None:
        """Hide what was logged of later steps, by a training that was killed, now that they are made again.

        SummaryWriter's purge_step would do it at once, also where this training then fails to begin.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self.writer.file_writer.add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

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


def animation(path: Path) -> tuple[bytes, int, int]:
    """A video as an animated GIF, of every second frame and at most 320 pixels a side: (data, width, height)."""
    with av.open(str(path)) as container:
        frames = [frame.to_image() for index, frame in enumerate(container.decode(video=0)) if index % 2 == 0]
    for frame in frames:
        frame.thumbnail((GIF_SIDE, GIF_SIDE))
    buffer = io.BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:], duration=GIF_MILLISECONDS, loop=0)
    return buffer.getvalue(), *frames[0].size


def import_summary_writer() -> type:
    """TensorBoard's writer. A UserError says what to install where it cannot be imported."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # an installation that does not fit raises many things besides ImportError
        raise UserError(
            f"TensorBoard's logs need tensorboard, which cannot be imported here ({first_line(error)}). "
            "Install it with: pip install tensorboard; or leave --logging_dir and --log_with out."
        ) from error
    return SummaryWriter


def _cell(value: Any) -> str:
    """A value in a row of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")
