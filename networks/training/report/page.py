"""The page of a training, or of several to compare: curves, samples, what was written, and with which settings."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import mean, median
from typing import Any
from urllib.parse import quote

from networks.training.report.record import RunRecord, Status, to_json
from utils.pages.page import render

TEMPLATE = Path(__file__).with_name("report.html.j2")
RECENT = 100  # steps, for what stands in the head


def report_page(runs: Sequence[RunRecord]) -> str:
    """A page of one training, or of several side by side. The records stand in it as a JSON list with the id "runs"."""
    heads = [_head(run) for run in runs]
    return render(
        TEMPLATE,
        runs=runs,
        heads=heads,
        facts=list(dict.fromkeys(name for head in heads for name in head["facts"])),
        settings=_table([run.flags for run in runs]),
        systems=_table([run.hardware | run.versions for run in runs]),
        datasets=[[{name: _text(value) for name, value in dataset.items()} for dataset in run.data] for run in runs],
        href=_href,
        records=[to_json(run) for run in runs],
    )


def _head(run: RunRecord) -> dict[str, Any]:
    """Where a training stands, in words."""
    seconds = _recent(run, "seconds_per_step", median)
    is_running = run.status == Status.RUNNING and seconds is not None
    memory = _recent(run, "memory/peak_gib", max) or _recent(run, "memory/resident_gib", max)
    facts = {
        "steps": f"{run.steps:,} of {run.planned_steps:,}",
        "seconds per step": f"{seconds:.3g}" if seconds is not None else None,
        "time since the start": _duration(run.written_at - run.started_at),
        "time left": _duration(seconds * max(0, run.planned_steps - run.steps)) if is_running else None,
        "loss": _number(_recent(run, "loss/current", mean)),
        "validation loss": _number(_recent(run, "loss/validation", mean, 1)),
        "memory": f"{memory:.1f} GiB" if memory is not None else None,
        "samples": f"{len(run.samples):,}" if run.samples else None,
    }
    return {
        "status": str(run.status),
        "started": _moment(run.started_at),
        "written": _moment(run.written_at),
        "facts": {name: value for name, value in facts.items() if value is not None},
    }


def _recent(run: RunRecord, name: str, summary: Callable[[list[float]], float], count: int = RECENT) -> float | None:
    """A summary of the last values of a curve, of those that are finite."""
    values = run.curves[name].values[-count:] if name in run.curves else []
    finite = [value for value in values if math.isfinite(value)]
    return summary(finite) if finite else None


def _table(columns: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], bool]]:
    """Rows of a name, its value in every run, and whether these differ; without what no run has."""
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [_text(column.get(name)) for column in columns]
        if any(values):
            rows.append((name, values, len(set(values)) > 1))
    return rows


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_text(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(_text(each) for each in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _moment(seconds: float) -> str:
    """In the time zone of this machine."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "minutes")


def _duration(seconds: float) -> str:
    minutes = max(0.0, seconds) / 60
    if minutes < 10:
        return f"{minutes * 60:.0f} s" if minutes < 2 else f"{minutes:.1f} min"
    hours, minutes = divmod(round(minutes), 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min"


def _href(file: str) -> str:
    """A link to a file, relative to the page, whatever its name holds."""
    try:
        return "./" + quote(os.fsencode(file))
    except UnicodeEncodeError:  # a name from another system
        return "./" + quote(file, errors="replace")
