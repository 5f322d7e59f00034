"""Trainings that are compared: their records, read from the pages that they wrote."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from networks.training.report.reading import REPORT_FILE, move_links, read_report
from networks.training.report.record import RunRecord
from networks.training.report.samples import MOST_CHARACTERS, thin_out
from utils.errors import UserError


def compared_runs(paths: Sequence[Path], output: Path) -> list[RunRecord]:
    """The trainings of reports, or of the folders that hold them, for the page ``output``: their samples together fit into it.

    Raises:
        UserError: one that cannot be read, one that is given twice, or the page itself among them.
    """
    found: dict[str, list[RunRecord]] = {}
    for path in paths:
        file = path / REPORT_FILE if path.is_dir() else path
        place = os.path.realpath(file)
        if place in found:
            raise UserError(f"{path} is given twice; give each training once.")
        if place == os.path.realpath(output):
            raise UserError(f"--output {output} is one of the reports to compare; give the page another name.")
        found[place] = read_report(file)
        for run in found[place]:
            move_links(run, file.parent, output.parent)
    runs = [run for records in found.values() for run in records]
    for longer in ("{folder}/{name}", "{name} ({file})"):  # where names are the same, also those of trainings in one folder
        names = Counter(run.name for run in runs)
        for place, records in found.items():
            for run in records:
                if names[run.name] > 1:
                    run.name = longer.format(folder=Path(place).parent.name, name=run.name, file=Path(place).name)
    for run in runs:
        thin_out(run.samples, MOST_CHARACTERS // len(runs))
    return runs
