"""Comparisons (--xy): a result for every pair of values of two settings, in columns and rows."""

from __future__ import annotations

import csv
import glob
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hunyuan_model.sampling.arguments import MAX_STEPS
from hunyuan_model.sampling.prompts import options_within, read_prompts
from networks.formats.layouts import TARGETS
from networks.generation.requests import Request
from utils.cli.arguments import finite_float, int_up_to, non_negative_float, parsed, positive_float, seed
from utils.errors import UserError, name_some, shown
from utils.key_values import nearest_name

logger = logging.getLogger(__name__)

FLAG = "--xy"
NO_LORA = "none"
MAX_CELLS = 256
_COPY = re.compile(rf"_(?:{'|'.join((*TARGETS, 'comfyui'))})(?=\.safetensors$)")  # what training writes beside a LoRA
_NUMBER_OF_CHECKPOINT = re.compile(r"-(step)?(\d+)$")  # my_lora-000002 (epochs) and my_lora-step00000100


@dataclass(frozen=True)
class AxisValue:
    """One value of an axis: what the sheet calls it, and the value of the flag."""

    label: str
    value: Any


@dataclass(frozen=True)
class Axis:
    """The values of a setting; ``flag`` is the name of its flag without the dashes."""

    name: str
    flag: str
    values: tuple[AxisValue, ...]


Reader = Callable[[list[str], str], list[AxisValue]]
"""From the words between commas, and the beginning of messages about them."""


def numbers(name: str, parse: Callable[[str], float]) -> Reader:
    """Values that ``parse``, an argparse type, takes."""
    return lambda words, where: [AxisValue(f"{name} {word}", parsed(parse, word, where)) for word in words]


def prompts(words: list[str], where: str) -> list[AxisValue]:
    """Texts, and those of files that are named with an @ before them."""
    texts = []
    for word in words:
        entries = read_prompts(os.path.expanduser(word[1:]), f"{where}: the prompt") if word.startswith("@") else []
        for entry in entries:
            if entry.values:
                raise UserError(f"{entry.where} has options behind the prompt, and {FLAG} compares texts; take them out.")
        texts += [entry.prompt for entry in entries] or [word]
    for text in texts:
        if options_within(text):
            raise UserError(f"{where} {shown(text)} holds an option of a prompt line, which would be read as words. Take it out.")
    return [AxisValue(text, text) for text in texts]


def lora_files(words: list[str], where: str) -> list[AxisValue]:
    """Paths, patterns of them, and ``none``."""
    paths: list[str | None] = []
    for word in map(os.path.expanduser, words):  # which shells do at the beginning of words only
        if word == NO_LORA:
            paths.append(None)
        elif os.path.exists(word) or not glob.has_magic(word):
            paths.append(word)
        else:
            found = sorted(glob.glob(word, recursive=True), key=order_of_checkpoint)
            if not found:
                raise UserError(f"{where}: no file matches the pattern {word}. Patterns are looked up in {os.getcwd()}.")
            if copies := [path for path in found if _COPY.sub("", path) in found and _COPY.search(path)]:
                logger.info("%s: left out copies of others in another layout: %s", where, name_some(copies))
            paths += [path for path in found if path not in copies]
    stems = [Path(path or NO_LORA).stem for path in paths]
    return [AxisValue(stem if stems.count(stem) == 1 else path or NO_LORA, path) for path, stem in zip(paths, stems)]


def order_of_checkpoint(path: str) -> tuple[float | str, ...]:
    """The checkpoints of a training in the order of their epochs or steps; the final one has no number and is the last."""
    stem = Path(path).stem
    found = _NUMBER_OF_CHECKPOINT.search(stem)
    return (math.inf, "", stem) if found is None else (int(found[2]), found[1] or "", stem)


AXES: dict[str, tuple[str, Reader]] = {  # the flag that an axis sets, and how its values are read
    "lora": ("lora_weight", lora_files),
    "multiplier": ("lora_multiplier", numbers("multiplier", finite_float)),
    "prompt": ("prompt", prompts),
    "seed": ("seed", numbers("seed", seed)),
    "steps": ("infer_steps", numbers("steps", int_up_to(MAX_STEPS))),
    "guidance": ("embedded_cfg_scale", numbers("guidance", finite_float)),
    "cfg": ("guidance_scale", numbers("CFG", non_negative_float)),
    "flow_shift": ("flow_shift", numbers("shift", positive_float)),
    "strength": ("strength", numbers("strength", finite_float)),
}


def read_axis(text: str) -> Axis:
    """``seed=1,2``, ``lora=my_lora*.safetensors,none`` or ``prompt="a, b",c``: a name of ``AXES`` or of its flag, and values.

    Raises:
        UserError: an unknown name, no value, one twice, or one that the setting cannot have.
    """
    name, equals, written = text.partition("=")
    flags = {flag: axis for axis, (flag, _) in AXES.items()}
    name = flags.get(name.strip(), name.strip())
    if not equals or name not in AXES:
        problem = f"compares no {shown(name)}" if equals else f"wants name=value,value, but got {shown(text)}"
        raise UserError(f"{FLAG} {problem}.{nearest_name(name, (*AXES, *flags))} There are {', '.join(AXES)}.")
    flag, read = AXES[name]
    try:
        (words,) = list(csv.reader([written], skipinitialspace=True, strict=True)) or [[]]
    except (csv.Error, ValueError):
        raise UserError(
            f"{FLAG} {shown(text)} has quotes that do not belong together. A value with commas stands between two, "
            'as in prompt="a, b",c.'
        ) from None
    words = [word.strip() for word in words]
    if not all(words) or not words:
        raise UserError(f"{FLAG} {shown(text)} lacks a value; write {name}=value,value.")
    values = read(words, f"{FLAG} {name}")
    for number, value in enumerate(values):
        if value.value in [other.value for other in values[:number]]:
            raise UserError(f"{FLAG} {name} has {shown(value.label)} twice; keep one of them.")
    return Axis(name, flag, tuple(values))


@dataclass(frozen=True)
class Comparison:
    """What --xy asks for. Reading it looks up files and loads nothing."""

    columns: Axis
    rows: Axis

    @classmethod
    def read(cls, texts: Sequence[str]) -> Comparison:
        """From both values of the flag.

        Raises:
            UserError: as of ``read_axis``; the same setting twice; more than ``MAX_CELLS`` cells.
        """
        columns, rows = map(read_axis, texts)
        if columns.name == rows.name:
            raise UserError(f"{FLAG} has {columns.name} twice: two axes that set the same thing. Give another one.")
        if (cells := len(columns.values) * len(rows.values)) > MAX_CELLS:
            raise UserError(f"{FLAG} asks for {cells} results; {MAX_CELLS} are the most. Give fewer values.")
        return cls(columns, rows)

    @property
    def axes(self) -> tuple[Axis, Axis]:
        return self.columns, self.rows

    @property
    def lora_files(self) -> tuple[str, ...]:
        """Those of the axis of LoRA."""
        return tuple(value.value for axis in self.axes if axis.name == "lora" for value in axis.values if value.value is not None)

    def grid(self, base: Request) -> list[list[Request]]:
        """The requests by row and column; a cell that asks for the same as an earlier one is that request again.

        Args:
            base: what the axes leave as it is. It has a multiplier for each file of --lora_weight, and where there is an axis of
                LoRA one more, which is theirs.

        Raises:
            UserError: a result that cannot be sampled; names the cell. An axis of multipliers without any LoRA.
        """
        if "multiplier" in [axis.name for axis in self.axes] and not base.lora_multiplier:
            raise UserError(f"{FLAG} multiplier changes LoRA, and there is none: give --lora_weight, or compare lora.")
        made: dict[Request, Request] = {}
        places = [[(x, y) for x in range(len(self.columns.values))] for y in range(len(self.rows.values))]
        return [[self._request(base, place, made) for place in row] for row in places]

    def _request(self, base: Request, cell: tuple[int, int], made: dict[Request, Request]) -> Request:
        pairs = [(axis, axis.values[index]) for axis, index in zip(self.axes, cell)]
        flags = {axis.flag: value.value for axis, value in pairs}
        multipliers = base.lora_multiplier
        if "lora_weight" in flags:
            *fixed, own = multipliers
            own, chosen = flags.pop("lora_multiplier", own), flags.pop("lora_weight")
            multipliers = (*fixed, *(own if path == chosen else 0.0 for path in self.lora_files))
        elif "lora_multiplier" in flags:
            multipliers = (flags["lora_multiplier"],) * len(multipliers)
        column, row = (index + 1 for index in cell)
        where = f"{FLAG}, {', '.join(shown(value.label) for _, value in pairs)}"
        request = base.changed({**flags, "lora_multiplier": multipliers, "name": f"xy_{row}_{column}"}, where)
        first = made.setdefault(replace(request, name=None, where=""), request)
        if first is not request:
            logger.info("%s is the same as %s", request.name, first.name)
        return first
