"""Writing LoRA files in every layout that is a target: fused rows split or put together, alpha kept or multiplied in."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from safetensors.torch import save
from torch import Tensor

from networks.lora_files import PEFT_METADATA, LoraFile, PlacedUpdate
from networks.lora_layouts import LAYOUTS, LoraLayout, flat_name
from networks.lora_updates import CannotConvert, Difference, DoRA, LoHa, LoKr, LowRank, Replacement, Update
from utils.errors import UserError, name_some
from utils.safetensors_io import save_tensors

logger = logging.getLogger(__name__)

_OF_TENSORS = (PEFT_METADATA, "modelspec.hash_sha256")  # metadata that other names or factors make untrue
MLP_RATIO = 4  # width of the model's MLPs: the rows of a part that a file leaves out


def to_layout(lora: LoraFile, target: str) -> dict[str, Tensor]:
    """The tensors of ``lora`` in the layout ``target``; factors keep their dtype, alphas are float32.

    Where only names differ, bits do not change.

    Raises:
        UserError: the layout has no place for an update; names it and the reason.
    """
    layout = LAYOUTS[target]
    tensors: dict[str, Tensor] = {}
    modules: dict[str, list[PlacedUpdate]] = {}
    for placed in lora.updates:
        modules.setdefault(placed.parameter, []).append(placed)
    written: list[tuple[tuple[str, ...], str, Update]] = []
    for parameter, placed in modules.items():
        try:
            updates = _as_stored(placed, layout)
        except CannotConvert as reason:
            raise UserError(
                f"{lora.source} cannot be written in the layout {target}: of {parameter}, {reason}. Use the layout comfy."
            ) from reason
        written += [(index, parameter, update) for index, update in updates]
    rank = max((update.rank for *_, update in written if isinstance(update, LowRank)), default=0)
    for index, parameter, update in written:
        if layout.scale_in_factors and isinstance(update, LowRank):
            update = _padded(_scale_in_factors(update), rank)
        module, _, name = parameter.rpartition(".")
        for part, tensor in _parts(update, name).items():
            if not (part == "alpha" and layout.scale_in_factors):
                tensors[layout.keys(module, part)[index]] = tensor
    return tensors


def _as_stored(placed: Sequence[PlacedUpdate], layout: LoraLayout) -> list[tuple[int, Update]]:
    """The updates of a parameter for each module of the layout that holds some of its rows, with that module's index."""
    names = layout.names.modules(placed[0].module)
    if refused := sorted({update.update.kind for update in placed} - {LowRank.kind, *layout.kinds}):
        raise CannotConvert(f"{name_some(refused)} has no place there")
    if len(names) == 1:
        whole = placed[0].update if placed[0].parts == 1 else _fused(placed)
        return [(0, _ordered(whole, placed[0].module, layout))]
    if placed[0].parts == len(names):
        return [(each.part, each.update) for each in placed]
    whole = placed[0].update
    if isinstance(whole, LoKr):
        raise CannotConvert("the factors of LoKr have no rows that can be split")
    hidden = whole.shape[1] if len(whole.shape) > 1 else _inputs(whole.shape[0], len(names))
    sizes = [hidden] * (len(names) - 1)
    sizes.append(whole.shape[0] - sum(sizes))
    if sizes[-1] <= 0:
        raise CannotConvert(f"{whole.shape[0]} rows are too few for {len(names)} parts of {hidden}")
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        (index, whole.with_rows(lambda rows, start=start, size=size: rows[start : start + size].clone()))
        for index, (start, size) in enumerate(zip(starts, sizes))
    ]


def _inputs(rows: int, parts: int) -> int:
    """Inputs of the module whose bias has so many rows."""
    return rows // (parts if parts == 3 else parts - 1 + MLP_RATIO)


def _ordered(update: Update, module: str, layout: LoraLayout) -> Update:
    reorder = layout.names.reorder.get(module)  # its own inverse in the layouts that are written
    return update if reorder is None else update.with_rows(reorder)


def _fused(placed: Sequence[PlacedUpdate]) -> Update:
    """One update of all rows from those of parts of them; the rows of parts that are not there do not change."""
    updates = {each.part: each.update for each in placed}
    parts = placed[0].parts
    if any(isinstance(update, DoRA) for update in updates.values()) and len(updates) < parts:
        raise CannotConvert(f"DoRA of {len(updates)} of {parts} parts cannot be put together")
    if all(isinstance(update, Difference | Replacement) for update in updates.values()) and len(updates) == parts:
        kinds = {type(update) for update in updates.values()}
        if len(kinds) == 1:
            return kinds.pop()(torch.cat([updates[part].value for part in range(parts)]))
    if all(isinstance(update, DoRA) and update.per_output for update in updates.values()):
        direction = _fused([replace(each, update=each.update.direction) for each in placed])
        return DoRA(direction, torch.cat([updates[part].magnitude for part in range(parts)]))
    if not all(isinstance(update, LowRank) for update in updates.values()):
        raise CannotConvert(f"{name_some({update.kind for update in updates.values()})} of parts cannot be put together")
    loras = [updates[part] for part in sorted(updates)]
    inputs = loras[0].shape[1]
    rows = [
        updates[part].shape[0] if part in updates else inputs if parts == 3 or part < parts - 1 else MLP_RATIO * inputs
        for part in range(parts)
    ]
    first, same_scale = loras[0], len({lora.scale for lora in loras}) == 1
    if not same_scale:
        loras = [LowRank(lora.down, (lora.up.float() * lora.scale).to(lora.up.dtype), lora.rank) for lora in loras]
    shared = same_scale and all(_equal(lora.down, first.down) for lora in loras)
    down = first.down if shared else torch.cat([lora.down for lora in loras])
    up = first.up.new_zeros(sum(rows), down.shape[0])
    column = 0
    for part, lora in zip(sorted(updates), loras):
        start = sum(rows[:part])
        up[start : start + rows[part], column : column + lora.rank] = lora.up
        column += 0 if shared else lora.rank
    return LowRank(down, up, loras[0].scale * down.shape[0])


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """False where there are no values, of a file of which only the header was read."""
    return one.shape == other.shape and not one.is_meta and torch.equal(one, other)


def _scale_in_factors(lora: LowRank) -> LowRank:
    """The same update with the scale 1."""
    if lora.scale == 1 or lora.down.is_meta:
        return replace(lora, alpha=float(lora.rank))
    root = math.sqrt(abs(lora.scale))
    down = (lora.down.float() * root).to(lora.down.dtype)
    up = (lora.up.float() * math.copysign(root, lora.scale)).to(lora.up.dtype)
    return LowRank(down, up, float(lora.rank))


def _padded(lora: LowRank, rank: int) -> LowRank:
    """The same update with zeros up to ``rank``; the scale is 1."""
    missing = rank - lora.rank
    if not missing:
        return lora
    down = torch.cat([lora.down, lora.down.new_zeros(missing, *lora.down.shape[1:])])
    up = torch.cat([lora.up, lora.up.new_zeros(len(lora.up), missing, *lora.up.shape[2:])], dim=1)
    return LowRank(down, up, float(rank))


def _parts(update: Update, parameter: str) -> dict[str, Tensor]:
    """The tensors of an update, by the part that each is."""
    match update:
        case LowRank():
            return {"alpha": torch.tensor(update.alpha), "down": update.down, "up": update.up}
        case LoHa():
            factors = {f"hada_{name}": getattr(update, name) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
            return {"alpha": torch.tensor(update.alpha), **factors}
        case LoKr():
            factors = {}
            for name, tensors in (("lokr_w1", update.w1), ("lokr_w2", update.w2)):
                names = (name,) if len(tensors) == 1 else (f"{name}_a", f"{name}_b")
                factors |= dict(zip(names, tensors))
            return factors if update.alpha is None else {"alpha": torch.tensor(update.alpha), **factors}
        case DoRA():
            return {**_parts(update.direction, parameter), "magnitude": update.magnitude}
        case Difference():
            return {"diff_b" if parameter == "bias" else "diff": update.value}
        case Replacement():
            return {"set_weight": update.value}


def plain_network(lora: LoraFile) -> dict[str, LowRank]:
    """The LoRA of each whole module, by its flat name, as a network trains them.

    Raises:
        UserError: it holds other kinds of updates.
    """
    if not lora.is_plain:
        raise UserError(
            f"{lora.source} is not a plain LoRA: it holds {name_some(sorted(lora.kinds - {LowRank.kind}))}. It can be used in "
            "generation and as --base_weights; to train it further, use the module that made it (such as lycoris.kohya)."
        )
    modules: dict[str, list[PlacedUpdate]] = {}
    for placed in lora.updates:
        modules.setdefault(placed.module, []).append(placed)
    return {flat_name(path): placed[0].update if placed[0].parts == 1 else _fused(placed) for path, placed in modules.items()}


def tensor_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The two hashes by which sd-scripts and web UIs recognise a LoRA: of its tensors, whatever its metadata.

    ``sshs_model_hash`` is the SHA-256 of the file after its header, ``sshs_legacy_hash`` the first 8 digits of that of the
    64 KiB at 1 MiB (of nothing in a smaller file); both of the file that the tensors give with the ss_* metadata.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, training)
    header = 8 + int.from_bytes(content[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(content[header:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }


def save_lora(path: str | os.PathLike[str], lora: LoraFile, target: str) -> None:
    """Save ``lora`` in the layout ``target``, with its metadata. Errors as in ``to_layout``.

    Hashes are computed anew. What describes the tensors of the file that was read is left out, which is logged: diffusers
    would take its alphas from it. How the LoRA was trained (ss_*) stays.
    """
    tensors = to_layout(lora, target)
    metadata = lora.metadata | {key: value for key, value in tensor_hashes(tensors, lora.metadata).items() if key in lora.metadata}
    for key in set(_OF_TENSORS) & metadata.keys():
        del metadata[key]
        logger.info("%s: the metadata %s is left out, since it describes the tensors of %s", path, key, lora.source)
    save_tensors(path, tensors, metadata or None)
