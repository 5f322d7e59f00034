"""Where the report of a training lies, and what an earlier run of the same training left in it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from networks.training.report.reading import REPORT_FILE, move_links, read_report
from networks.training.report.record import Curve, RunRecord, Status
from networks.training.saving.files import lock_file
from utils.errors import UserError
from utils.files import MAX_NAME_BYTES, remove_leftovers_of
from utils.media.writing import unused_stem
from utils.processes.locks import is_held

logger = logging.getLogger(__name__)


def go_on(record: RunRecord, folders: Sequence[Path]) -> None:
    """Take over what an earlier run of the same training left in one of the folders, up to the step of the record."""
    for folder in folders:
        for path in _places(folder, record.name):
            earlier = _record_in(path)
            if earlier is None or earlier.session_id != record.session_id:
                continue
            for name, curve in earlier.curves.items():
                count = sum(step <= record.steps for step in curve.steps)
                record.curves[name] = Curve(curve.steps[:count], curve.values[:count])
            record.not_finite = [step for step in earlier.not_finite if step <= record.steps]
            record.written = earlier.written
            record.samples = [sample for sample in earlier.samples if sample.step <= record.steps]
            if folder != folders[0]:
                move_links(record, folder, folders[0])
            return
    logger.info("no report of the steps before is found: that of this training begins after step %d", record.steps)


def make_place(folder: Path, record: RunRecord) -> Path:
    """Where the page goes: a name in the folder that is free, or that an earlier run of the same training has.

    The report of another training that has ended is renamed, if it holds anything. Where that one is still under way, this one gets
    another name.
    """
    common, own = _places(folder, record.name)
    for path in (common, own):
        with suppress(OSError):
            remove_leftovers_of(path)
        earlier = _record_in(path)
        if earlier is not None and (earlier.session_id, earlier.name) == (record.session_id, record.name):
            return path
    other = _record_in(common)
    if other is not None and _is_under_way(folder, other, record.name):
        _give_way(own, record.name)
        logger.info("%s is of %s, which is being trained: the report of this training is %s", common, other.name, own)
        return own
    if other is None or other.steps or other.samples:
        _give_way(common, "earlier" if other is None else other.name)
    return common


def _places(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / REPORT_FILE, folder / f"{name}_{REPORT_FILE}"


def _record_in(path: Path) -> RunRecord | None:
    """The one training of a report; None for what is no such thing, or not there."""
    try:
        first, *others = read_report(path)
    except UserError:
        return None
    return None if others else first


def _is_under_way(folder: Path, other: RunRecord, name: str) -> bool:
    """Whether another training of the folder is; the lock of the name is held by this one itself."""
    may_be = other.status == Status.RUNNING and other.name != name and _is_file_name(other.name)
    return may_be and is_held(lock_file(folder, other.name))


def _is_file_name(name: str) -> bool:
    return name.isprintable() and Path(name).name == name and len(os.fsencode(name)) < MAX_NAME_BYTES - len(REPORT_FILE) - 10


def _give_way(path: Path, name: str) -> None:
    """Rename what lies under ``path``, if anything does."""
    if not os.path.lexists(path):
        return
    stem, ending = os.path.splitext(f"{name if _is_file_name(name) else 'earlier'}_{REPORT_FILE}")
    free = path.with_name(unused_stem(path.parent, stem, [ending]) + ending)
    try:
        os.rename(path, free)
        logger.info("%s, which is not of this training or damaged, is now %s", path, free)
    except OSError as error:
        logger.warning("%s is replaced, as it cannot be renamed (%s)", path, error.strerror or error)
