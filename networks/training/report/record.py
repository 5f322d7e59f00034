"""What a report shows of a training. It stands as JSON in the page itself, so that a resumed training goes on with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """Where a training stood when its report was written."""

    RUNNING = "running"
    STOPPED = "stopped"
    FAILED = "failed"
    FINISHED = "finished"


@dataclass
class Curve:
    """Values over optimizer steps, of the same length, the steps rising."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass
class SampleRecord:
    """A sample, small.

    Attributes:
        step: optimizer steps done.
        index: of its prompt in the file of prompts.
        file: relative to the folder of the page, with forward slashes.
        uri: of a picture, or of the first frame of a clip, as data; empty where it was left out for want of room.
        clip: of a clip, as data; empty for pictures.
        settings: what else made it, in words by name.
    """

    step: int
    index: int
    prompt: str
    seed: int
    file: str
    uri: str
    clip: str = ""
    settings: dict[str, str] = field(default_factory=dict)


@dataclass
class WrittenFile:
    """A file that the training wrote: for whom, and how they use it.

    ``checked``: how much of it they load, such as "240 of 240 keys".
    """

    file: str
    readers: str
    usage: str
    checked: str = ""


@dataclass
class RunRecord:
    """One training.

    Attributes:
        session_id: of its first beginning.
        steps: done, of ``planned_steps``.
        started_at, written_at: seconds since 1970.
        curves: by name: loss/current, loss/average, loss/validation, lr/..., grad_norm, seconds_per_step, memory/peak_gib,
            update/relative_norm.
        data: of each dataset, what ``data_facts`` says.
        table: of the datasets, as text.
        flags: without secrets.
        command: to make it again.
        reason: why it ended, if it failed or was stopped.
    """

    name: str
    session_id: str
    status: Status
    steps: int
    planned_steps: int
    started_at: float
    written_at: float
    curves: dict[str, Curve] = field(default_factory=dict)
    samples: list[SampleRecord] = field(default_factory=list)
    written: list[WrittenFile] = field(default_factory=list)
    flags: Mapping[str, Any] = field(default_factory=dict)
    data: list[Mapping[str, Any]] = field(default_factory=list)
    table: str = ""
    hardware: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    reason: str = ""
