"""Reading LoRA files of every layout, and comparing them with a model.

In memory an update belongs to a parameter of the transformer by its official name, or to a part of its rows.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_model.checkpoints.layouts import Place
from networks.lora_layouts import LAYOUTS, OTHER_MODELS, split_ending
from networks.lora_updates import Difference, DoRA, LoHa, LoKr, LowRank, Replacement, Update
from utils.errors import UserError, name_some
from utils.safetensors_io import read_tensors

logger = logging.getLogger(__name__)

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_METADATA = "lora_adapter_metadata"
_FACTORS = {
    LowRank: {"down", "up"},
    LoHa: {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    LoKr: {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"},
}
_VALUES = ("diff", "diff_b", "set_weight")


@dataclass(frozen=True)
class PlacedUpdate:
    """An update and the parameter that it changes, or the part of its rows.

    Attributes:
        parameter: official name, such as ``double_blocks.0.img_attn_qkv.weight``.
        part, parts: as in ``Place``.
    """

    parameter: str
    update: Update
    part: int = 0
    parts: int = 1

    @property
    def module(self) -> str:
        return self.parameter.rpartition(".")[0]

    def rows(self, total: int) -> slice:
        """Which of the ``total`` rows of the parameter it changes."""
        count = self.update.shape[0]
        start = total - count if self.part == self.parts - 1 else self.part * count
        return slice(start, start + count)

    def fits(self, shape: tuple[int, ...], inputs: int) -> bool:
        """Whether it is of the size of a parameter with this shape, in a module with so many inputs."""
        shape = shape if len(shape) < 2 else (shape[0], math.prod(shape[1:]))
        last = shape[0] - inputs * (self.parts - 1)
        rows = shape[0] if self.parts == 1 else last if self.part == self.parts - 1 else inputs
        return self.update.shape == (rows, *shape[1:])


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read from disk.

    Attributes:
        layout: its name in ``LAYOUTS``.
        left_out: keys that are not for the transformer (of text encoders, embeddings), or that were left out on demand.
    """

    source: str
    updates: tuple[PlacedUpdate, ...]
    metadata: dict[str, str]
    layout: str
    left_out: tuple[str, ...] = ()

    @property
    def kinds(self) -> set[str]:
        """Of its updates: "LoRA", "LoHa", ..."""
        return {placed.update.kind for placed in self.updates}

    @property
    def ranks(self) -> set[int]:
        return {placed.update.rank for placed in self.updates if placed.update.rank is not None}

    @property
    def is_plain(self) -> bool:
        """Whether it holds nothing but LoRA."""
        return self.kinds == {LowRank.kind}


def read_lora(path: str | os.PathLike[str], *, partial: bool = False, values: bool = True) -> LoraFile:
    """Read a LoRA file of any layout, or a folder that PEFT saved.

    Args:
        partial: leave out keys that cannot be read, which is logged, instead of refusing the file.
        values: else only the header and the alphas are read; the other tensors are on the meta device.

    Raises:
        UserError: no whole safetensors file; not a LoRA for this model, or only in part; factors that do not belong together.
    """
    path = lora_path(path)
    file = read_tensors(path, "LoRA file", (lambda name: True) if values else (lambda name: name.endswith(".alpha")))
    return lora_of(file.tensors, file.metadata, str(path), partial=partial, peft=_peft_config(path, file.metadata))


def lora_path(path: str | os.PathLike[str]) -> Path:
    """The file itself: that inside ``path`` if it is a folder that PEFT saved."""
    inside = Path(path) / PEFT_FILE
    return inside if inside.is_file() else Path(path)


def lora_of(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    source: str,
    *,
    partial: bool = False,
    peft: Mapping[str, object] | None = None,
) -> LoraFile:
    """The LoRA that tensors of any layout are; errors as in ``read_lora``, with ``source`` named.

    Args:
        peft: the configuration of PEFT, which has the alphas that the tensors of its files lack.
    """
    layout, found, unread = _read_keys(tensors.keys(), source)
    groups: dict[Place, dict[str, str]] = {}
    for key, (place, part) in found.items():
        if (other := groups.setdefault(place, {}).setdefault(part, key)) != key:
            raise UserError(f"{source} holds {key} and {other}, which are the same module.")
    updates = [placed for place, keys in groups.items() for placed in _Module(place, keys, tensors, peft or {}, source).updates()]
    others = [key for key in unread if key.startswith(OTHER_MODELS)]
    if others:
        logger.warning("%s: %d keys of text encoders or embeddings are left out, such as %s", source, len(others), others[0])
    if unknown := sorted(set(unread) - set(others)):
        message = f"{len(unknown)} of its {len(tensors)} keys match nothing in the transformer ({name_some(unknown, 3)})"
        if not partial:
            raise UserError(f"{source} would be applied only in part: {message}. Give --lora_partial to use the rest of it.")
        logger.warning("%s is used in part: %s", source, message)
    return LoraFile(source, tuple(updates), dict(metadata), layout, tuple(unread))


def _read_keys(names: Collection[str], source: str) -> tuple[str, dict[str, tuple[Place, str]], list[str]]:
    """The name of the layout that most keys have; what each key is, in that layout or another; and the keys that are of none."""
    if not names:
        raise UserError(f"{source} is not a LoRA that can be read here: it holds no tensors.")
    read = {name: {key: place for key in names if (place := layout.read_key(key))} for name, layout in LAYOUTS.items()}
    best = max(read, key=lambda name: len(read[name]))
    found = {key: place for places in (*read.values(), read[best]) for key, place in places.items()}
    if not found:
        examples = " or ".join(LAYOUTS[name].example for name in ("default", "other", "diffusers"))
        raise UserError(
            f"{source} is not a LoRA that can be read here: none of its {len(names)} keys match the transformer "
            f"({name_some(sorted(names), 3)}). Keys such as {examples} are expected."
        )
    return best, found, [key for key in names if key not in found]


@dataclass(frozen=True)
class _Module:
    """The keys of one module, by part, and the updates they are."""

    place: Place
    keys: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    peft: Mapping[str, object]
    source: str

    def updates(self) -> list[PlacedUpdate]:
        updates: list[tuple[str, Update]] = []
        if (weight := self._factored()) is not None:
            updates.append(("weight", weight))
        for part, kind in (("diff", Difference), ("set_weight", Replacement), ("diff_b", Difference)):
            if part in self.keys:
                updates.append(("bias" if part == "diff_b" else "weight", kind(self._value(part))))
        return [self._placed(parameter, update) for parameter, update in updates]

    def _placed(self, parameter: str, update: Update) -> PlacedUpdate:
        if self.place.reorder is not None:
            update = update.with_rows(self.place.reorder)
        return PlacedUpdate(f"{self.place.module}.{parameter}", update, self.place.part, self.place.parts)

    def _factored(self) -> LowRank | LoHa | LoKr | DoRA | None:
        parts = self.keys.keys() - set(_VALUES)
        kinds = [kind for kind, factors in _FACTORS.items() if factors & parts]
        if not kinds and not parts:
            return None
        if len(kinds) != 1 or (broken := self._missing(kinds[0], parts)):
            what = f"{broken} is missing" if len(kinds) == 1 else "factors of one kind are expected"
            some = name_some(sorted(self.keys.values()), 3)
            raise UserError(f"{self.source} is incomplete: of {some}, {what}. Copy or make the file again.")
        direction = {LowRank: self._low_rank, LoHa: self._loha, LoKr: self._lokr}[kinds[0]]()
        if "magnitude" not in parts:
            return direction
        magnitude = self._value("magnitude")
        magnitude = magnitude.reshape(-1, 1) if magnitude.dim() == 1 else magnitude.flatten(1)
        rows, columns = direction.shape
        if magnitude.shape not in ((rows, 1), (1, columns)):
            raise self._wrong_shape("magnitude", f"({rows}, 1) or (1, {columns})")
        return DoRA(direction, magnitude)

    @staticmethod
    def _missing(kind: type, parts: Collection[str]) -> str:
        if kind is not LoKr:
            return name_some(sorted(_FACTORS[kind] - set(parts)))
        whole = {f"lokr_w{number}" for number in (1, 2)}
        lacking = [name for name in sorted(whole) if name not in parts and not {f"{name}_a", f"{name}_b"} <= set(parts)]
        return name_some(lacking)

    def _low_rank(self) -> LowRank:
        down, up = self._value("down"), self._value("up")
        if down.dim() < 2 or up.dim() < 2 or down.shape[0] != up.shape[1] or not len(down) or math.prod(up.shape[2:]) != 1:
            raise UserError(
                f"{self.source}: {self.keys['down']} {tuple(down.shape)} and {self.keys['up']} {tuple(up.shape)} are not the "
                "factors of one update; (rank, in) and (out, rank) are expected."
            )
        return LowRank(down, up, self._alpha(len(down)))

    def _loha(self) -> LoHa:
        factors = [self._value(part) for part in sorted(_FACTORS[LoHa])]
        for part, factor in zip(sorted(_FACTORS[LoHa]), factors):
            if factor.dim() != 2 or 0 in factor.shape:
                raise self._wrong_shape(part, "two dimensions")
        w1_a, w1_b, w2_a, w2_b = factors
        if w1_a.shape[1] != len(w1_b) or w2_a.shape[1] != len(w2_b) or len(w1_a) != len(w2_a) or w1_b.shape[1] != w2_b.shape[1]:
            raise self._wrong_shape("hada_w1_a", "factors of one update")
        return LoHa(*factors, self._alpha(len(w1_b)))

    def _lokr(self) -> LoKr:
        factors = []
        for name in ("lokr_w1", "lokr_w2"):
            parts = (name,) if name in self.keys else (f"{name}_a", f"{name}_b")
            tensors = tuple(self._value(part).flatten(1) for part in parts)
            if any(not tensor.numel() for tensor in tensors) or (len(tensors) == 2 and tensors[0].shape[1] != len(tensors[1])):
                raise self._wrong_shape(parts[0], "factors of one update")
            factors.append(tensors)
        update = LoKr(*factors, None)
        if (rank := update.rank) is None and "r" in self.peft:  # PEFT scales by alpha / r also where no factor has a rank
            rank = int(self.peft["r"])
            return LoKr(tuple(tensor.float() * (self._alpha(rank) / rank) for tensor in update.w1), update.w2, None)
        return LoKr(*factors, self._alpha(rank or 1))

    def _alpha(self, rank: int) -> float:
        if "alpha" not in self.keys:
            module = split_ending(next(iter(self.keys.values())))[0]
            return _peft_alpha(self.peft, module, rank)
        stored = self.tensors[self.keys["alpha"]]
        if stored.numel() != 1 or not math.isfinite(alpha := float(stored)):
            raise UserError(f"{self.source}: {self.keys['alpha']} must be one finite number. Copy or make the file again.")
        return alpha

    def _value(self, part: str) -> Tensor:
        key, value = self.keys[part], self.tensors[self.keys[part]]
        if not value.is_floating_point():
            raise UserError(f"{self.source} stores {key} as {value.dtype}. Use a file in floating point.")
        if not value.dim():
            raise self._wrong_shape(part, "at least one dimension")
        if not value.is_meta and not torch.isfinite(value.float()).all():
            raise UserError(f"{self.source} holds NaN or infinity in {key}: its training went wrong. Use an earlier save.")
        return value

    def _wrong_shape(self, part: str, expected: str) -> UserError:
        key = self.keys[part]
        return UserError(
            f"{self.source}: {key} has the shape {tuple(self.tensors[key].shape)}, but {expected} are expected. Make it again."
        )


def _peft_config(path: Path, metadata: Mapping[str, str]) -> dict[str, object]:
    """What PEFT stored about an adapter: in the header, as diffusers does, or in the file beside it; empty if nothing."""
    beside = path.with_name(PEFT_CONFIG)
    try:
        if PEFT_METADATA in metadata:
            stored = json.loads(metadata[PEFT_METADATA])
            return {key.removeprefix("transformer."): value for key, value in stored.items()}
        if path.name == PEFT_FILE and beside.is_file():
            return dict(json.loads(beside.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"the PEFT configuration of {path} cannot be read ({error}). Copy it again.") from error
    return {}


def _peft_alpha(config: Mapping[str, object], module: str, rank: int) -> float:
    """The alpha by PEFT's rules: one for all, or of the first pattern that ends the module's path; else the rank."""
    try:
        patterns = (config.get("alpha_pattern") or {}).items()
        alpha = next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", module)), None)
        if alpha is None:
            alpha = config.get("lora_alpha", config.get("alpha", rank))
        return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1)
    except (re.error, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the PEFT configuration of the LoRA has no usable alpha for {module} ({error}). Copy it again.") from error


def fit_to_model(
    lora: LoraFile, weight_shapes: Mapping[str, tuple[int, ...]], *, partial: bool = False
) -> dict[str, list[PlacedUpdate]]:
    """The updates by the parameter that they change.

    Args:
        weight_shapes: official names and shapes of the model's parameters.
        partial: leave out what does not fit, which is logged.

    Raises:
        UserError: updates for what the model has not, or has in another size.
    """
    absent, unlike, fitting = [], [], {}
    for placed in lora.updates:
        if placed.parameter not in weight_shapes:
            absent.append(placed)
        elif not _fits(placed, weight_shapes):
            unlike.append(placed)
        else:
            fitting.setdefault(placed.parameter, []).append(placed)
    faults = []
    if absent:
        faults.append(f"{len(absent)} of {len(lora.updates)} are not in it ({_some(absent)})")
    if unlike:
        first = unlike[0]
        faults.append(
            f"{len(unlike)} of {len(lora.updates)} have another size ({first.parameter} is {first.update.shape}, "
            f"the model has {tuple(weight_shapes[first.parameter])})"
        )
    message = f"{lora.source} holds a LoRA whose modules do not match the model: {' and '.join(faults)}"
    if faults and (not partial or not fitting):
        advice = "" if not fitting else " Give --lora_partial to use the rest of it."
        raise UserError(f"{message}. It was made for another model, or another size of it.{advice}")
    if faults:
        logger.warning("%s. They are left out.", message)
    return fitting


def _fits(placed: PlacedUpdate, weight_shapes: Mapping[str, tuple[int, ...]]) -> bool:
    weight = weight_shapes.get(f"{placed.module}.weight", ())
    return placed.fits(tuple(weight_shapes[placed.parameter]), math.prod(weight[1:]))


def _some(placed: Iterable[PlacedUpdate]) -> str:
    return name_some(sorted({update.module for update in placed}), 3)


def check_lora_file(
    path: str | os.PathLike[str], weight_shapes: Mapping[str, tuple[int, ...]] | None = None, *, partial: bool = False
) -> LoraFile:
    """Check a LoRA file by its header alone, also against a model's weights if given. Errors as above."""
    lora = read_lora(path, partial=partial, values=False)
    if weight_shapes is not None:
        fit_to_model(lora, weight_shapes, partial=partial)
    return lora
