"""The report of a training under way: it takes every number and sample as a tracker does, and keeps its page up to date."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from networks.training.report.page import report_page
from networks.training.report.record import Curve, RunRecord, SampleRecord, Status
from networks.training.report.samples import small_media, thin_out
from networks.training.report.written import written_files
from networks.training.settings import TrainingSettings
from utils.errors import UserError, first_line
from utils.output import visible
from utils.pages.page import write_page

if TYPE_CHECKING:
    from networks.training.samples.sampling import SavedSample

logger = logging.getLogger(__name__)

EVERY_SECONDS = 60.0  # also between saves
LEAST_WAIT = 200.0  # times the seconds that writing takes, between saves
LEFT_FREE = 256 << 20  # bytes of the disk, which models and states may need


class TrainingReport:
    """A tracker beside those of ``networks.training.logging.trackers``. It lives on the main process.

    Nothing that goes wrong with the page ends a training: that is one warning, and the next save tries again.

    Attributes:
        record: what the page shows.
        path: of the page.
    """

    name = "the report"

    def __init__(self, record: RunRecord, path: Path) -> None:
        self.record, self.path = record, path
        self._changed, self._failed = True, False
        self._written, self._took = time.monotonic(), 0.0
        self._process = psutil.Process()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step. One where they are not finite is noted."""
        record, self._changed = self.record, True
        record.steps = max(record.steps, step)
        if "loss/current" in values and "memory/peak_gib" not in values:
            values = {**values, "memory/resident_gib": self._process.memory_info().rss / 2**30}
        for name, value in values.items():
            put(record.curves.setdefault(name, Curve()), step, value)
        if not all(map(math.isfinite, values.values())) and record.not_finite[-1:] != [step]:
            record.not_finite.append(step)
        if time.monotonic() - self._written > max(EVERY_SECONDS, LEAST_WAIT * self._took):
            self.write()

    def log_sample(self, sample: SavedSample, step: int) -> None:
        """A sample, made small once. One that cannot be read stands there by its name."""
        file = os.path.relpath(sample.path, self.path.parent).replace(os.sep, "/")
        entry = SampleRecord(step, sample.index, sample.prompt.prompt, sample.prompt.sampling.seed, file, "")
        entry.settings = {name: text for name, text in sample.prompt.metadata().items() if name not in ("prompt", "seed")}
        self.record.samples.append(entry)
        self._changed = True
        entry.uri, entry.clip = small_media(sample.path)

    def wrote(self, models: Sequence[Path], settings: TrainingSettings) -> None:
        """The model that was saved last and its copies, in place of those before."""
        self._changed = True
        try:
            self.record.written = written_files(models, settings)
        except Exception as error:  # as when writing
            logger.warning("%s does not name what was saved (%s); training continues.", self.path, first_line(error).rstrip("."))

    def end(self, status: Status, reason: str = "") -> None:
        """Write it for the last time."""
        self.record.status, self.record.reason, self._changed = status, visible(reason), True
        self.write()

    def write(self) -> None:
        """Write the page, if anything is new."""
        if not self._changed:
            return
        began = time.monotonic()
        self.record.written_at = time.time()
        try:
            thin_out(self.record.samples)
            if (free := shutil.disk_usage(self.path.parent).free) < LEFT_FREE:
                raise UserError(f"{free >> 20} MB are free, and the report leaves {LEFT_FREE >> 20} MB to models and states")
            write_page(self.path, report_page([self.record]), flush=False)
            self._changed = self._failed = False
        except Exception as error:  # hours of training are worth more than their report
            if not self._failed:
                logger.warning("%s is not written (%s); training continues.", self.path, first_line(error).rstrip("."))
            self._failed = True
        self._written = time.monotonic()
        self._took = self._written - began

    def finish(self) -> None:
        """Nothing is left to do: the page is whole whenever it is there."""


def put(curve: Curve, step: int, value: float) -> None:
    """Add a value, or replace that of the same step."""
    if curve.steps and curve.steps[-1] == step:
        curve.values[-1] = value
    else:
        curve.steps.append(step)
        curve.values.append(value)
