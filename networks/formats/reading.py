"""Reading LoRA files of every layout, and comparing them with a model.

In memory an update belongs to a parameter of the transformer by its official name, or to a part of its rows.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_model.checkpoints.layouts import Place
from networks.formats.layouts import DEFAULT, LAYOUTS, OTHER, OTHER_MODELS, UNSUPPORTED, split_ending
from networks.formats.other_models import BLOCKS, model_by_blocks, model_by_keys, model_by_metadata, model_itself
from networks.formats.peft_config import PEFT_FILE, PeftConfig, peft_config
from networks.formats.updates import Difference, DoRA, LoHa, LoKr, LowRank, Replacement, Update, all_finite, with_rows_permuted
from utils.errors import UserError, name_some
from utils.safetensors_io import SAFETENSORS_DTYPES, read_tensors

logger = logging.getLogger(__name__)

_FACTORS = {
    LowRank: {"down", "up"},
    LoHa: {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    LoKr: {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"},
}
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_NUMBERS = (".alpha", ".scalar")
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
    """Read a LoRA file of any layout, or a folder that PEFT or diffusers saved.

    Args:
        partial: leave out keys that cannot be read, which is logged, instead of refusing the file.
        values: else only the header and single numbers (alphas) are read; the other tensors are on the meta device.

    Raises:
        UserError: no whole safetensors file; not a LoRA for this model, or only in part; factors that do not belong together.
    """
    path = lora_path(path)
    file = read_tensors(path, "LoRA file", (lambda name: True) if values else (lambda name: name.endswith(_NUMBERS)))
    return lora_of(file.tensors, file.metadata, str(path), partial=partial, peft=peft_config(path, file.metadata))


def lora_path(path: str | os.PathLike[str]) -> Path:
    """The file itself: that inside ``path`` if it is a folder that PEFT or diffusers saved."""
    return next((file for name in (PEFT_FILE, DIFFUSERS_FILE) if (file := Path(path, name)).is_file()), Path(path))


def lora_of(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    source: str,
    *,
    partial: bool = False,
    peft: PeftConfig | None = None,
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
    _check_model([place.module for place in groups], metadata, source)
    if unsupported := [place for place, keys in groups.items() if UNSUPPORTED.keys() & keys.keys()]:
        left_out = [groups.pop(place) for place in unsupported]
        kinds = {UNSUPPORTED[part] for keys in left_out for part in keys if part in UNSUPPORTED}
        message = f"{len(left_out)} of its modules hold {name_some(sorted(kinds))} ({next(iter(left_out[0].values()))})"
        if not partial or not groups:
            raise UserError(f"{source} cannot be used: {message}, which is not supported. LoRA, DoRA, LoHa and LoKr are.")
        logger.warning("%s: %s, which is not supported. They are left out.", source, message)
        unread += [key for keys in left_out for key in keys.values()]
    updates = [
        placed for place, keys in groups.items() for placed in _Module(place, keys, tensors, peft or PeftConfig(), source).updates()
    ]
    others = [key for key in unread if key.startswith(OTHER_MODELS)]
    if others:
        logger.warning("%s: %d keys of text encoders or embeddings are left out, such as %s", source, len(others), others[0])
    if unknown := sorted(set(unread) - set(others) - found.keys()):
        message = f"{len(unknown)} of its {len(tensors)} keys match nothing in the transformer ({name_some(unknown, 3)})"
        if not partial:
            model = f" It looks like a LoRA for {model}." if (model := model_by_keys(unknown)) else ""
            raise UserError(f"{source} would be applied only in part: {message}.{model} Give --lora_partial to use the rest of it.")
        logger.warning("%s is used in part: %s", source, message)
    return LoraFile(source, tuple(updates), dict(metadata), layout, tuple(unread))


def _check_model(modules: Collection[str], metadata: Mapping[str, str], source: str) -> None:
    """Refuse what is for a model with the names and sizes of HunyuanVideo; warn of metadata that names another model."""
    said, ours = model_by_metadata(metadata)
    if not ours and (model := model_by_blocks(modules)):
        raise UserError(
            f"{source} is not a LoRA for HunyuanVideo: by the numbers of its blocks it is one for {model}. HunyuanVideo has "
            f"{BLOCKS[0]} double and {BLOCKS[1]} single blocks. Use a LoRA for HunyuanVideo."
        )
    if said and not ours:
        logger.warning("%s was made for another model, by its metadata (%s). Look whether its results are right.", source, said)


def _read_keys(names: Collection[str], source: str) -> tuple[str, dict[str, tuple[Place, str]], list[str]]:
    """The name of the layout that most keys have; what each key is, in that layout or another; and the keys that are of none."""
    if not names:
        raise UserError(f"{source} is not a LoRA that can be read here: it holds no tensors.")
    read = {name: {key: place for key in names if (place := layout.read_key(key))} for name, layout in LAYOUTS.items()}
    best = max(read, key=lambda name: len(read[name]))
    found = {key: place for places in (*read.values(), read[best]) for key, place in places.items()}
    if not found:
        raise UserError(
            f"{source} is not a LoRA that can be read here: none of its {len(names)} keys match the transformer "
            f"({name_some(sorted(names), 3)}). {_instead(names)}"
        )
    return best, found, [key for key in names if key not in found]


def _instead(names: Collection[str]) -> str:
    """What a file is none of whose keys match."""
    if all(name.startswith(OTHER_MODELS) for name in names):
        return "They are of text encoders or embeddings, which are not changed here."
    if kind := model_itself(dict.fromkeys(names, ())):
        return f"It looks like {kind.text}, not like a LoRA."
    if model := model_by_keys(names):
        return f"It looks like a LoRA for {model}."
    return f"Keys such as {' or '.join(LAYOUTS[name].example for name in (DEFAULT, OTHER, 'diffusers'))} are expected."


@dataclass(frozen=True)
class _Module:
    """The keys of one module, by part, and the updates they are."""

    place: Place
    keys: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    peft: PeftConfig
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
            update = with_rows_permuted(update, self.place.reorder)
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
        if down.dim() < 2 or up.dim() < 2 or down.shape[0] != up.shape[1] or math.prod(up.shape[2:]) != 1:
            raise UserError(
                f"{self.source}: {self.keys['down']} {tuple(down.shape)} and {self.keys['up']} {tuple(up.shape)} are not the "
                "factors of one update; (rank, in) and (out, rank) are expected."
            )
        return LowRank(down, up, self._alpha(len(down)))

    def _loha(self) -> LoHa:
        factors = [self._value(part) for part in sorted(_FACTORS[LoHa])]
        for part, factor in zip(sorted(_FACTORS[LoHa]), factors):
            if factor.dim() != 2:
                raise self._wrong_shape(part, "two dimensions")
        w1_a, w1_b, w2_a, w2_b = factors
        if w1_a.shape[1] != len(w1_b) or w2_a.shape[1] != len(w2_b) or len(w1_a) != len(w2_a) or w1_b.shape[1] != w2_b.shape[1]:
            raise self._wrong_shape("hada_w1_a", "factors of one update")
        return LoHa(*factors, self._alpha(len(w1_b)))

    def _lokr(self) -> LoKr:
        factors = []
        for name in ("lokr_w1", "lokr_w2"):
            parts = (name,) if name in self.keys else (f"{name}_a", f"{name}_b")
            tensors = tuple(self._value(part) for part in parts)
            if any(tensor.dim() < 2 for tensor in tensors):
                raise self._wrong_shape(parts[0], "two dimensions")
            tensors = tuple(tensor.flatten(1) for tensor in tensors)
            if len(tensors) == 2 and tensors[0].shape[1] != len(tensors[1]):
                raise self._wrong_shape(parts[0], "factors of one update")
            factors.append(tensors)
        update = LoKr(*factors, None)
        if update.rank is not None:
            return replace(update, alpha=self._alpha(update.rank))
        if (scale := self.peft.scale_without_rank(self._path) * self._scalar()) != 1:
            return replace(update, w1=tuple(tensor.float() * scale for tensor in update.w1))
        return replace(update, alpha=self._number("alpha") if "alpha" in self.keys else 1.0)

    @property
    def _path(self) -> str:
        """Of the module in the model that PEFT was used on."""
        module = split_ending(next(iter(self.keys.values())))[0]
        return module.removeprefix("base_model.model.").removeprefix("transformer.").removeprefix("diffusion_model.")

    def _alpha(self, rank: int) -> float:
        alpha = self._number("alpha") if "alpha" in self.keys else self.peft.alpha_of(self._path, rank)
        if math.isinf(torch.tensor(alpha * self._scalar(), dtype=torch.float32)):
            raise UserError(f"{self.source}: the alpha of {self._path} is beyond what float32 holds. Copy or make the file again.")
        return alpha * self._scalar()

    def _scalar(self) -> float:
        """What LyCORIS multiplies an update by, where its files still keep that apart."""
        return self._number("scalar") if "scalar" in self.keys else 1.0

    def _number(self, part: str) -> float:
        stored = self.tensors[self.keys[part]]
        if stored.numel() != 1 or not math.isfinite(number := float(stored.float())):
            raise UserError(f"{self.source}: {self.keys[part]} must be one finite number. Copy or make the file again.")
        return number

    def _value(self, part: str) -> Tensor:
        key, value = self.keys[part], self.tensors[self.keys[part]]
        if not value.is_floating_point() or value.dtype not in SAFETENSORS_DTYPES.values():
            raise UserError(f"{self.source} stores {key} as {value.dtype}. Use a file in floating point.")
        if not value.dim() or not value.numel():
            raise self._wrong_shape(part, "at least one dimension and one value")
        if not value.is_meta and not all_finite(value):
            raise UserError(f"{self.source} holds NaN or infinity in {key}: its training went wrong. Use an earlier save.")
        return value

    def _wrong_shape(self, part: str, expected: str) -> UserError:
        key = self.keys[part]
        return UserError(
            f"{self.source}: {key} has the shape {tuple(self.tensors[key].shape)}, but {expected} are expected. Make it again."
        )


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
        first, model = unlike[0], tuple(weight_shapes[unlike[0].parameter])
        faults.append(
            f"{len(unlike)} of {len(lora.updates)} have another size ({first.parameter} is {first.update.shape}, "
            f"the model has {model}){_channels(unlike, weight_shapes)}"
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


def _channels(unlike: Iterable[PlacedUpdate], weight_shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What it means if the first layer of the model is among those of another size."""
    for placed in unlike:
        if placed.parameter == "img_in.proj.weight" and len(placed.update.shape) == 2:
            channels, *patch = weight_shapes[placed.parameter][1:]
            theirs = placed.update.shape[1] / math.prod(patch)
            return f": it is for a model with {theirs:g} input channels, such as image to video, and this one has {channels}"
    return ""


def _some(placed: Iterable[PlacedUpdate]) -> str:
    return name_some(sorted({update.module for update in placed}), 3)


def check_lora_file(
    path: str | os.PathLike[str], weight_shapes: Mapping[str, tuple[int, ...]] | None = None, *, partial: bool = False
) -> LoraFile:
    """Check a LoRA file by its header alone, also against a model's weights if given. Errors as above; logs nothing."""
    logger.disabled = True  # what is left out is logged when the file is read for use
    try:
        lora = read_lora(path, partial=partial, values=False)
        if weight_shapes is not None:
            fit_to_model(lora, weight_shapes, partial=partial)
        return lora
    finally:
        logger.disabled = False
