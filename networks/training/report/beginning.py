"""The report of a training that begins or goes on: what its page knows from the start, and where the page lies."""

from __future__ import annotations

import sys

from accelerate import Accelerator

from networks.training.data import TrainingData
from networks.training.preflight import TrainingPlan
from networks.training.report.facts import hardware, versions, words_to_repeat
from networks.training.report.places import go_on, make_place
from networks.training.report.record import RunRecord, Status
from networks.training.report.writer import TrainingReport
from networks.training.saving.state import Progress
from networks.training.settings import TrainingSettings
from utils.processes.command_line import command_line
from utils.processes.launcher import words_before_script


def begin_report(
    settings: TrainingSettings, plan: TrainingPlan, data: TrainingData, progress: Progress, accelerator: Accelerator
) -> TrainingReport:
    """The report of a training after ``progress``, with what an earlier run of it left; not written yet."""
    saving, resumed = settings.saving, plan.beginning.resumed
    words = words_before_script(accelerator.num_processes) + words_to_repeat(sys.argv, plan.beginning.flags)
    record = RunRecord(
        name=saving.output_name,
        session_id=progress.session_id,
        status=Status.RUNNING,
        steps=progress.step,
        planned_steps=plan.steps,
        started_at=progress.started_at,
        written_at=0.0,
        flags=plan.beginning.given_flags,
        data=list(data.facts.datasets),
        table=data.table,
        hardware=hardware(accelerator.device, accelerator.num_processes),
        versions=versions(),
        command=command_line(words),
    )
    if resumed is not None:
        go_on(record, [saving.folder, resumed.folder.parent])
    return TrainingReport(record, make_place(saving.folder, record))
