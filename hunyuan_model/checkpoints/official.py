"""The tensors of a checkpoint under their official names, whichever of the known layouts its file has.

Nothing is read: what the official layout keeps in one tensor and another one in several is put together when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hunyuan_model.checkpoints.layouts import NameLayout, Place
from hunyuan_model.checkpoints.reading import Checkpoint
from hunyuan_model.checkpoints.stored_tensor import StoredTensor
from utils.errors import UserError, name_some

_FUSED = ("weight", "bias")  # parameters that have a row for each output


def official_names(checkpoint: Checkpoint, layouts: Sequence[NameLayout], anchor: str) -> tuple[Checkpoint, NameLayout]:
    """A view of the tensors under their official names, and the layout of the file, which is the one that knows most of its names.

    Tensors that stand under another prefix than ``anchor`` are left out. Those that the layout does not know keep their names.

    Args:
        anchor: an official tensor that every such file holds, by which the prefix before its names is found.

    Raises:
        UserError: the anchor is missing in every layout; a tensor is there twice or lacks a part, or parts do not fit together.
    """
    prefixes = {layout.title: prefix for layout in layouts if (prefix := _prefix(checkpoint, layout, anchor)) is not None}
    candidates = [layout for layout in layouts if layout.title in prefixes]
    if not candidates:
        raise UserError(
            f"{checkpoint.what} {checkpoint.path} holds no tensor {anchor} in the layout of "
            f"{', '.join(layout.title for layout in layouts)}. Check that it is the right file."
        )
    known = {layout.title: _count_known(checkpoint, layout, prefixes[layout.title]) for layout in candidates}
    layout = max(candidates, key=lambda layout: known[layout.title])
    return _renamed(checkpoint.under_prefix(prefixes[layout.title]), layout), layout


def _prefix(checkpoint: Checkpoint, layout: NameLayout, anchor: str) -> str | None:
    module, _, parameter = anchor.rpartition(".")
    theirs = layout.modules(module)
    return checkpoint.prefix_of(f"{theirs[0]}.{parameter}") if theirs else None


def _count_known(checkpoint: Checkpoint, layout: NameLayout, prefix: str) -> int:
    below = (name[len(prefix) :] for name in checkpoint.shapes if name.startswith(prefix))
    return sum(layout.place(name.rpartition(".")[0]) is not None for name in below)


@dataclass(frozen=True)
class _Part:
    """A tensor of the file, and where it belongs."""

    name: str
    place: Place


def _renamed(checkpoint: Checkpoint, layout: NameLayout) -> Checkpoint:
    parts: dict[str, list[_Part]] = {}
    for name in checkpoint.shapes:
        module, _, parameter = name.rpartition(".")
        parameter = layout.parameters.get(parameter, parameter)
        place = layout.place(module)
        if place is None or (place.parts > 1 and parameter not in _FUSED):
            parts.setdefault(name, []).append(_Part(name, Place(name)))
        else:
            parts.setdefault(f"{place.module}.{parameter}", []).append(_Part(name, place))
    entries, scales = {}, {}
    for name, found in parts.items():
        _require_whole(checkpoint, layout, name, found)
        found.sort(key=lambda part: part.place.part)
        entries[name] = _fused(checkpoint, [part.name for part in found], found[0].place)
        if (scale := _fused_scale(checkpoint, [part.name for part in found], found[0].place)) is not None:
            scales[name] = scale
    return checkpoint.view(entries, scales)


def _require_whole(checkpoint: Checkpoint, layout: NameLayout, name: str, found: Sequence[_Part]) -> None:
    """Refuse parts that are missing, doubled, or that do not fit together."""
    file = f"{checkpoint.what} {checkpoint.path}"
    place = found[0].place
    by_part = {part.place.part: part.name for part in found}
    if len(by_part) < len(found):
        names = name_some(part.name for part in found)
        raise UserError(f"{file} holds {name} twice (as {names}). Use a file with one model in it.")
    if len(by_part) < place.parts:
        modules = layout.modules(place.module)
        missing = name_some(module for part, module in enumerate(modules) if part not in by_part)
        raise UserError(
            f"{file} holds {name_some(by_part.values())} without {missing}. It is incomplete: copy or download it again."
        )
    if place.parts > 1:
        kinds = {(checkpoint.dtypes[part.name], checkpoint.shapes[part.name][1:]) for part in found}
        if len(kinds) > 1 or not all(checkpoint.shapes[part.name] for part in found):
            stored = name_some(
                f"{part.name} {str(checkpoint.dtypes[part.name]).removeprefix('torch.')} {checkpoint.shapes[part.name]}"
                for part in found
            )
            raise UserError(f"{file} holds parts of {name} that do not fit together: {stored}. Check that it is the right file.")


def _fused(checkpoint: Checkpoint, names: Sequence[str], place: Place) -> StoredTensor:
    """The tensor of these parts, in the official order of rows."""
    parts = [checkpoint.entries[name] for name in names]
    entry = parts[0] if len(parts) == 1 else _rows_of(parts)
    if place.reorder is None:
        return entry
    reorder, before = place.reorder, entry
    try:  # not on the meta device, where the first torch.cat imports for a second
        shape = tuple(reorder(torch.zeros((), dtype=torch.uint8).expand(entry.shape)).shape)
    except (RuntimeError, IndexError) as error:
        raise UserError(
            f"{checkpoint.what} {checkpoint.path} holds {names[0]} with the shape {entry.shape}, which it cannot have. "
            "Check that it is the right file."
        ) from error
    return replace(entry, shape=shape, assemble=lambda pieces, out: out.copy_(reorder(before.made_of(pieces))))


def _rows_of(parts: Sequence[StoredTensor]) -> StoredTensor:
    """The rows of all parts, one part after the other, in one tensor."""
    first = parts[0]
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])

    def pieces() -> tuple[Tensor, ...]:
        return tuple(piece for part in parts for piece in part.pieces())

    def assemble(pieces: Sequence[Tensor], out: Tensor) -> None:
        row = start = 0
        for part in parts:
            part.write(pieces[start : start + part.count], out[row : row + part.shape[0]])
            row, start = row + part.shape[0], start + part.count

    return StoredTensor(shape, first.dtype, pieces, assemble, sum(part.count for part in parts), first.quantized)


def _fused_scale(checkpoint: Checkpoint, names: Sequence[str], place: Place) -> Tensor | None:
    """The scale (rows or 1, groups of inputs) of the tensor of these parts; None if none has one."""
    scales = [checkpoint.scales.get(name) for name in names]
    given = [scale for scale in scales if scale is not None]
    if not given:
        return None
    if len(scales) == 1 and len(given[0]) == 1:
        return given[0]
    groups = math.lcm(*(scale.shape[1] for scale in given))
    rows = []
    for name, scale in zip(names, scales):
        scale = torch.ones(1, 1) if scale is None else scale
        rows.append(scale.repeat_interleave(groups // scale.shape[1], 1).expand(checkpoint.shapes[name][0], -1))
    fused = torch.cat(rows)
    return fused if place.reorder is None else place.reorder(fused)
