"""Writing LoRA files in every layout that is a target: fused rows split or put together, alpha kept or multiplied in."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from networks.formats.layouts import LAYOUTS, OTHER, LoraLayout, flat_name
from networks.formats.peft_config import PEFT_METADATA
from networks.formats.reading import LoraFile, PlacedUpdate
from networks.formats.updates import (
    CannotConvert,
    Difference,
    DoRA,
    LoHa,
    LoKr,
    LowRank,
    Replacement,
    Update,
    all_finite,
    with_rows_permuted,
)
from utils.errors import UserError, name_some
from utils.safetensors_io import SAFETENSORS_DTYPES, save_tensors

logger = logging.getLogger(__name__)

_OF_TENSORS = (PEFT_METADATA, "modelspec.hash_sha256")  # metadata that other names or factors make untrue
_FILE_ORDER = (torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.int16)
_FILE_ORDER += (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool)
"""In which safetensors writes the tensors of each dtype; those of one dtype by name."""
_MIDDLE = range(0x100000, 0x110000)

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
            updates = [
                (index, _scale_in_factors(update) if layout.scale_in_factors else update)
                for index, update in _as_stored(placed, layout)
            ]
        except CannotConvert as reason:
            raise UserError(f"{lora.source} cannot be written in the layout {target}: of {parameter}, {reason}.") from reason
        written += [(index, parameter, update) for index, update in updates]
    rank = max((update.rank for *_, update in written if isinstance(update, LowRank)), default=0)
    for index, parameter, update in written:
        if layout.scale_in_factors:
            update = _padded(update, rank)
        module, _, name = parameter.rpartition(".")
        for part, tensor in _parts(update, name).items():
            if not (part == "alpha" and layout.scale_in_factors):
                tensors[layout.keys(module, part)[index]] = tensor
    return tensors


def _warn_of_diffusers(parameters: Iterable[str]) -> None:
    """Log what diffusers cannot read of the layout ``other``; ComfyUI reads all of it."""
    outside = sorted(name for name in parameters if not name.startswith(("double_blocks.", "single_blocks.")))
    if outside:
        logger.warning("diffusers reads %s wrongly in the layout other; use the layout diffusers there", name_some(outside, 3))
    elif not any("img_attn_qkv" in name for name in parameters):
        logger.warning("diffusers reads nothing of a LoRA without img_attn_qkv in the layout other; use the layout diffusers there")


def _as_stored(placed: Sequence[PlacedUpdate], layout: LoraLayout) -> list[tuple[int, Update]]:
    """The updates of a parameter for each module of the layout that holds some of its rows, with that module's index."""
    _check_single(placed)
    names = layout.names.modules(placed[0].module)
    if refused := sorted({update.update.kind for update in placed} - {LowRank.kind, *layout.kinds}):
        raise CannotConvert(f"{name_some(refused)} has no place there (the layout comfy has one)")
    if len(names) == 1:
        whole, permute = _whole(placed), layout.names.reorder.get(placed[0].module)  # its own inverse in these layouts
        return [(0, whole if permute is None else with_rows_permuted(whole, permute))]
    if placed[0].parts == len(names):
        return [(each.part, each.update) for each in placed]
    lora = placed[0].update
    if not isinstance(lora, LowRank):
        raise CannotConvert(f"the rows of {lora.kind} cannot be split")
    rows, inputs = lora.shape
    sizes = [inputs] * (len(names) - 1)
    sizes.append(rows - sum(sizes))
    if sizes[-1] <= 0:
        raise CannotConvert(f"{rows} rows are too few for {len(names)} parts of {inputs}")
    return [(index, LowRank(lora.down.clone(), up.clone(), lora.alpha)) for index, up in enumerate(lora.up.split(sizes))]


def _check_single(placed: Sequence[PlacedUpdate]) -> None:
    if len({each.parts for each in placed}) > 1 or len({each.part for each in placed}) < len(placed):
        raise CannotConvert("there is more than one update for the same rows")


def _whole(placed: Sequence[PlacedUpdate]) -> Update:
    """The one update of a parameter; of parts of its rows put together, where those of parts that are not there do not change."""
    if placed[0].parts == 1:
        return placed[0].update
    updates = {each.part: each.update for each in placed}
    parts = placed[0].parts
    if len({update.shape[1:] for update in updates.values()}) > 1:
        raise CannotConvert("its parts have different numbers of inputs")
    match next(iter(updates.values())):
        case LowRank() if all(isinstance(update, LowRank) for update in updates.values()):
            return _fused(updates, parts)
        case DoRA() if len(updates) == parts and all(isinstance(each, DoRA) and each.per_output for each in updates.values()):
            direction = _whole([replace(each, update=each.update.direction) for each in placed])
            return DoRA(direction, torch.cat([updates[part].magnitude for part in range(parts)]))
        case Difference() | Replacement() as first:
            if len(updates) == parts and all(type(update) is type(first) for update in updates.values()):
                return type(first)(torch.cat([updates[part].value for part in range(parts)]))
    kinds = name_some(sorted({update.kind for update in updates.values()}))
    raise CannotConvert(f"{kinds} of {len(updates)} of {parts} parts cannot be put together")


def _fused(updates: Mapping[int, LowRank], parts: int) -> LowRank:
    """One LoRA of all rows from those of parts of them. Parts with one down factor share it, so that no rank is added."""
    present = sorted(updates)
    loras = [_computable(updates[part]) for part in present]
    inputs = loras[0].shape[1]
    rows = [inputs] * (parts - 1) + [inputs if parts == 3 else MLP_RATIO * inputs]
    for part, lora in zip(present, loras):
        rows[part] = lora.shape[0]
    if len({lora.scale for lora in loras}) > 1:
        loras = [_scale_in_up(lora) for lora in loras]
    down = loras[0].down
    shared = not down.is_meta and all(lora.down.shape == down.shape and torch.equal(lora.down, down) for lora in loras)
    if not shared:
        down = torch.cat([lora.down.flatten(1) for lora in loras])
    dtype = reduce(torch.promote_types, (lora.up.dtype for lora in loras))
    up = loras[0].up.new_zeros(sum(rows), len(down), dtype=dtype)
    column = 0
    for part, lora in zip(present, loras):
        start = sum(rows[:part])
        up[start : start + rows[part], column : column + lora.rank] = lora.up.flatten(1)
        column += 0 if shared else lora.rank
    return LowRank(down, up, loras[0].scale * len(down))


def _computable(lora: LowRank) -> LowRank:
    """With factors of float8 in bfloat16, which holds the same numbers."""
    down, up = (factor.bfloat16() if factor.itemsize == 1 else factor for factor in (lora.down, lora.up))
    return LowRank(down, up, lora.alpha)


def _times(factor: Tensor, number: float) -> Tensor:
    """In the dtype of ``factor``, or float32 where it would be too large for that."""
    if factor.is_meta:  # of a file of which only the header was read
        return factor
    product = factor.float() * number
    rounded = product.to(factor.dtype)
    if all_finite(rounded):
        return rounded
    if not all_finite(product):
        raise CannotConvert(f"its alpha makes factors that are no numbers any more ({number:g} times)")
    return product


def _scale_in_up(lora: LowRank) -> LowRank:
    """The same update with the scale 1."""
    return LowRank(lora.down, _times(lora.up, lora.scale), float(lora.rank))


def _scale_in_factors(lora: LowRank) -> LowRank:
    """The same update with the scale 1; both factors change by the same number."""
    if lora.scale == 1:
        return lora
    lora = _computable(lora)
    root = math.sqrt(abs(lora.scale))
    return LowRank(_times(lora.down, root), _times(lora.up, math.copysign(root, lora.scale)), float(lora.rank))


def _padded(lora: LowRank, rank: int) -> LowRank:
    """The same update with zeros up to ``rank``; the scale is 1."""
    missing = rank - lora.rank
    if not missing:
        return lora
    lora = _computable(lora)
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
    network = {}
    for path, placed in modules.items():
        try:
            _check_single(placed)
            whole = _whole(placed)
        except CannotConvert as reason:
            raise UserError(f"{lora.source} cannot be trained further: of {path}, {reason}.") from None
        network[flat_name(path)] = LowRank(whole.down.flatten(1), whole.up.flatten(1), whole.alpha)
    return network


def tensor_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The two hashes by which sd-scripts and web UIs recognise a LoRA: of its tensors, whatever its metadata.

    ``sshs_model_hash`` is the SHA-256 of the file after its header, ``sshs_legacy_hash`` the first 8 digits of that of the
    64 KiB at 1 MiB (of nothing in a smaller file); both of the file that the tensors give with the ss_* metadata.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    header: dict[str, object] = {"__metadata__": training}
    end = 0
    for name in (order := sorted(tensors, key=lambda name: (_FILE_ORDER.index(tensors[name].dtype), name))):
        start, end = end, end + tensors[name].nbytes
        stored = next(stored for stored, dtype in SAFETENSORS_DTYPES.items() if dtype == tensors[name].dtype)
        header[name] = {"dtype": stored, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    position = 8 + len(encoded) + -len(encoded) % 8  # of the next tensor in the file
    whole, middle = hashlib.sha256(), hashlib.sha256()
    for name in order:
        content = tensors[name].reshape(-1).view(torch.uint8).numpy()
        whole.update(content)
        middle.update(content[max(0, _MIDDLE.start - position) : max(0, _MIDDLE.stop - position)])
        position += len(content)
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": middle.hexdigest()[:8]}


def save_lora(path: str | os.PathLike[str], lora: LoraFile, target: str) -> None:
    """Save ``lora`` in the layout ``target``, with its metadata. Errors as in ``to_layout``.

    Hashes are computed anew. What describes the tensors that were read is left out, which is logged: the alphas in the
    configuration of PEFT are in the tensors now, and would count twice. How the LoRA was trained (ss_*) stays.
    """
    tensors = to_layout(lora, target)
    hashes = tensor_hashes(tensors, lora.metadata)
    metadata = {key: hashes.get(key, value) for key, value in lora.metadata.items() if key not in _OF_TENSORS}
    if gone := sorted(lora.metadata.keys() - metadata.keys()):
        logger.info("%s: the metadata %s is left out, since it describes the tensors of %s", path, name_some(gone), lora.source)
    save_tensors(path, tensors, metadata or None)
    if target == OTHER:
        _warn_of_diffusers({placed.parameter for placed in lora.updates})
