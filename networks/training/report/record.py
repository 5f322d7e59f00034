"""What a report shows of a training. It stands as JSON in the page itself, so that a resumed training goes on with it."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from utils.key_values import TextEnum

MEDIA = re.compile(r"data:(image/(webp|png|jpeg)|video/mp4);base64,[A-Za-z0-9+/]*={0,2}")
PACKED = {"steps": "<i4", "values": "<f4"}


class Status(TextEnum):
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
        uri: of a picture, or of the first frame of a clip, as data; empty where it was left out for want of room, or unreadable.
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
    """A file that the training wrote, for one program. A file that several programs read stands there several times.

    Attributes:
        file: as in ``SampleRecord``.
        readers: the program.
        usage: what to do with it there, or how to convert it first: a sentence, or a command; empty where nothing helps.
        checked: how much of it is loaded, such as "240 of 240 keys", and why that is not all.
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
        curves: by name: loss/current, loss/average, loss/validation, lr/..., grad_norm, seconds_per_step, memory/peak_gib (of a
            GPU), memory/resident_gib (of the process, on the CPU), update/relative_norm (at saves).
        not_finite: steps whose loss or gradient was not finite; they changed no weights.
        data: of each dataset, what ``data_facts`` says.
        table: of the datasets, as text in columns.
        flags: without secrets.
        command: to make it again.
        reason: why it failed or was stopped, in a sentence.
    """

    name: str
    session_id: str
    status: Status
    steps: int
    planned_steps: int
    started_at: float
    written_at: float
    curves: dict[str, Curve] = field(default_factory=dict)
    not_finite: list[int] = field(default_factory=list)
    samples: list[SampleRecord] = field(default_factory=list)
    written: list[WrittenFile] = field(default_factory=list)
    flags: Mapping[str, Any] = field(default_factory=dict)
    data: list[Mapping[str, Any]] = field(default_factory=list)
    table: str = ""
    hardware: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    reason: str = ""


def to_json(run: RunRecord) -> dict[str, Any]:
    """A record as plain values for JSON. Curves are base64 of little-endian int32 and float32, which hold NaN too and are quick."""
    record = {each.name: getattr(run, each.name) for each in fields(run)}
    return record | {
        "status": str(run.status),
        "curves": {name: _packed(curve) for name, curve in run.curves.items()},
        "samples": [vars(sample) for sample in run.samples],
        "written": [vars(file) for file in run.written],
        "flags": _plain(run.flags),
        "data": _plain(run.data),
    }


def from_json(value: object) -> RunRecord:
    """The record of ``to_json``; whoever wrote the file may have written anything.

    Raises:
        ValueError: names the entry that is missing or not what it should be.
    """
    return _checked(RunRecord, value, "run")


def _packed(curve: Curve) -> dict[str, str]:
    with np.errstate(over="ignore"):  # more than float32 holds is infinity
        return {name: base64.b64encode(np.asarray(getattr(curve, name), dtype)).decode() for name, dtype in PACKED.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    is_plain = value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
    return value if is_plain else str(value)


def _checked(kind: Any, value: Any, where: str) -> Any:
    """``value`` as an object of the type ``kind``."""
    if kind is Any:
        return value
    if kind is Curve:
        return _curve(value, where)
    if kind is float and type(value) is int:
        value = float(value)
    base = get_origin(kind) or kind
    stored = {Mapping: dict, Status: str}.get(base, dict if is_dataclass(base) else base)
    if type(value) is not stored or (base is float and not math.isfinite(value)):
        raise ValueError(f"{where} is not what it should be")
    if is_dataclass(base):
        return _object(base, value, where)
    if base is list:
        return [_checked(*get_args(kind), each, where) for each in value]
    if stored is dict:
        return {key: _checked(get_args(kind)[1], each, f"{where}: {key}") for key, each in value.items()}
    return Status(value) if base is Status else value


def _object(kind: type, value: dict[str, Any], where: str) -> Any:
    kinds, known = get_type_hints(kind), {each.name: each for each in fields(kind)}
    if missing := [name for name, each in known.items() if name not in value and each.default is each.default_factory]:
        raise ValueError(f"{where} has no {missing[0]}")
    made = kind(**{name: _checked(kinds[name], value[name], f"{where}: {name}") for name in known if name in value})
    if kind is SampleRecord and not all(MEDIA.fullmatch(uri) for uri in (made.uri, made.clip) if uri):
        raise ValueError(f"{where} has other media than pictures and clips")
    return made


def _curve(value: Any, where: str) -> Curve:
    try:
        steps, values = (np.frombuffer(base64.b64decode(value[name], validate=True), dtype) for name, dtype in PACKED.items())
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{where} is no curve") from error
    if len(steps) != len(values) or (np.diff(steps) <= 0).any():
        raise ValueError(f"{where} is no curve")
    return Curve(steps.tolist(), values.tolist())
