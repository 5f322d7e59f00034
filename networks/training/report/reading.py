"""Reports of trainings read back from their pages. Anybody may have written them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from networks.training.report.record import RunRecord, from_json
from utils.errors import UserError, first_line, shown
from utils.files import explain_failed_reading, require_file

REPORT_FILE = "report.html"
RUNS = "runs"  # the id of the data in a page
MOST_BYTES = 100 << 20
MOST_DEPTH = 30
LATEST = 1 << 34  # seconds since 1970: the year 2514; Windows knows no date after 3000
_BEGIN = f'<script type="application/json" id="{RUNS}">'.encode()  # texts in a page have no "<" that is not escaped
_END = b"</script>"


def read_report(path: Path) -> list[RunRecord]:
    """The trainings in a page, of which there is at least one.

    Raises:
        UserError: it cannot be read, or is no report; in one sentence.
    """
    found = require_file(path, "the report of a training")
    with explain_failed_reading(found, "the report"), open(found, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    try:
        if len(content) > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES >> 20} MB")
        begin = content.find(_BEGIN) + len(_BEGIN)
        end = content.find(_END, begin)
        if begin < len(_BEGIN) or end < 0:
            raise ValueError("it holds no data of trainings")
        runs = json.loads(content[begin:end].decode("utf-8", "replace"), parse_constant=_refuse)
        if not isinstance(runs, list) or not runs:
            raise ValueError("it holds no training")
        if _depth(runs) > MOST_DEPTH:
            raise ValueError("what it holds is nested too deeply")
        records = [from_json(run) for run in runs]
        for record in records:
            _check(record)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{found} is not a report that training wrote ({first_line(error).rstrip('.')}).") from error
    return records


def move_links(record: RunRecord, folder: Path, to: Path) -> None:
    """Let the names of files, which are relative to a page in ``folder``, be right in a page in the folder ``to``."""
    for entry in (*record.samples, *record.written):
        try:
            entry.file = os.path.relpath(folder / entry.file, to).replace(os.sep, "/")
        except ValueError:  # on another drive of Windows
            entry.file = entry.file.rpartition("/")[2]


def _refuse(name: str) -> None:
    raise ValueError(f"it holds {name}")


def _depth(value: object) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inside), default=0)


def _check(record: RunRecord) -> None:
    """Raise a ValueError for what has the right type and cannot be."""
    if not all(0 <= moment <= LATEST for moment in (record.started_at, record.written_at)):
        raise ValueError("a time in it cannot be")
    counts = [record.steps, record.planned_steps, *record.not_finite, *(sample.step for sample in record.samples)]
    counts += [step for curve in record.curves.values() for step in curve.steps[:1]]
    counts += [sample.index for sample in record.samples]
    if not all(0 <= count < 2**31 for count in counts):
        raise ValueError("a number in it is too small or too large")
    for file in (*record.samples, *record.written):
        if file.file.startswith("/") or "\\" in file.file:
            raise ValueError(f"{shown(file.file)} is no path from its folder")
