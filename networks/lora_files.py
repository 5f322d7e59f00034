"""LoRA files: reading every layout, checking them by their header, and converting between layouts.

In memory everything has the layout ``default``; a module is known by its *flat name*, its path with dots as underscores.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import save

from networks.lora_layouts import DEFAULT, LAYOUTS, flat_name
from utils.errors import UserError, name_some
from utils.safetensors_io import read_header, read_tensors

# Parts of the keys of adapters that are more than a plain LoRA.
FOREIGN_PARTS = ("lokr_", "hada_", "oft_", "dora_scale", "lora_mid")


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one module's update, down (rank, in) and up (out, rank), and its alpha."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """Of the update: (out, in)."""
        return self.up.shape[0], self.down.shape[1]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA read from disk: tensors in the ``default`` layout, metadata, and the layout the file had."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    layout: str


@dataclass(frozen=True)
class LoraHeader:
    """What the header of a LoRA file says: its layout, and the ranks of its modules."""

    layout: str
    ranks: frozenset[int]


def group_keys(names: Collection[str], source: str) -> tuple[str, dict[str, dict[str, str]]]:
    """The name of the layout that LoRA keys have, and the keys of each module by part ("down", "up", perhaps "alpha").

    Raises:
        UserError: not a LoRA, another kind of adapter, two layouts in one file, or a module without one factor.
    """
    if foreign := sorted(name for name in names if any(part in name for part in FOREIGN_PARTS)):
        raise UserError(
            f"{source} is not a plain LoRA: it holds keys such as {foreign[0]}. "
            "Files made by LyCORIS need the network module that made them (for example lycoris.kohya)."
        )
    if not names:
        raise UserError(f"{source} is not a LoRA that can be read here: it holds no tensors.")
    layout_name = max(LAYOUTS, key=lambda name: sum(LAYOUTS[name].read_key(key) is not None for key in names))
    layout = LAYOUTS[layout_name]
    unknown = [name for name in names if layout.read_key(name) is None]
    if unknown:
        examples = " or ".join(layout.example for layout in LAYOUTS.values())
        raise UserError(
            f"{source} is not a LoRA that can be read here: {len(unknown)} of its {len(names)} keys are unknown "
            f"({name_some(sorted(unknown), 3)}). Keys like {examples} are expected, all of one layout."
        )
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        flat, part = layout.read_key(name)
        if (other := groups.setdefault(flat, {}).setdefault(part, name)) != name:
            raise UserError(f"{source} holds {name} and {other}, which are the same module.")
    if broken := sorted(flat for flat, parts in groups.items() if not {"down", "up"} <= parts.keys()):
        raise UserError(f"{source} is incomplete: a factor is missing for {name_some(broken, 3)}. Copy or make the file again.")
    return layout_name, groups


def lora_pairs(tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, LoraPair]:
    """The factors of each module, by flat name, from keys in any layout. Without an alpha the scale is 1.

    Tensors on the meta device are checked by their shapes alone.

    Raises:
        UserError: as in ``group_keys``; factors that are no matrices of one rank; values that are not finite.
    """
    pairs: dict[str, LoraPair] = {}
    for flat, parts in group_keys(tensors.keys(), source)[1].items():
        down, up = tensors[parts["down"]], tensors[parts["up"]]
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or not len(down):
            raise UserError(
                f"{source}: {parts['down']} {tuple(down.shape)} and {parts['up']} {tuple(up.shape)} are not the factors of one "
                "update; (rank, in) and (out, rank) are expected."
            )
        alpha = float(len(down))
        if not down.is_meta:
            for part, factor in (("down", down), ("up", up)):
                if not factor.is_floating_point():
                    raise UserError(f"{source} stores {parts[part]} as {factor.dtype}. Use a file in floating point.")
                if not torch.isfinite(factor.float()).all():
                    raise UserError(
                        f"{source} holds NaN or infinity in {parts[part]}: its training went wrong. Use an earlier save."
                    )
            if "alpha" in parts:
                stored = tensors[parts["alpha"]]
                if stored.numel() != 1 or not math.isfinite(alpha := float(stored)):
                    raise UserError(f"{source}: the alpha of {flat} must be one finite number. Copy or make the file again.")
        pairs[flat] = LoraPair(down, up, alpha)
    return pairs


def to_layout(tensors: Mapping[str, torch.Tensor], layout: str, source: str) -> dict[str, torch.Tensor]:
    """Tensors of any layout in the one called ``layout``; factors keep their dtype, alpha is float32.

    Raises:
        UserError: as in ``lora_pairs``; or a module that the transformer does not have, where its path is needed.
    """
    target, converted = LAYOUTS[layout], {}
    for flat, pair in lora_pairs(tensors, source).items():
        down, up = pair.down, pair.up
        if target.scale_in_factors:
            root = math.sqrt(abs(pair.scale))
            down = (down.float() * root).to(down.dtype)
            up = (up.float() * math.copysign(root, pair.scale)).to(up.dtype)
        else:
            converted[target.key(flat, "alpha")] = torch.tensor(pair.alpha)
        converted[target.key(flat, "down")] = down
        converted[target.key(flat, "up")] = up
    return converted


def read_lora(path: str | os.PathLike[str]) -> LoraFile:
    """Read a LoRA file of any layout. Errors as in ``lora_pairs``, or for what is no whole safetensors file."""
    header = read_header(path, "LoRA file")
    layout, _ = group_keys(header.shapes.keys(), str(path))
    return LoraFile(to_layout(read_tensors(path).tensors, DEFAULT, str(path)), header.metadata, layout)


def check_lora_file(path: str | os.PathLike[str], weight_shapes: Mapping[str, tuple[int, ...]] | None = None) -> LoraHeader:
    """Check a LoRA file by its header alone.

    Args:
        weight_shapes: names and shapes of the model's weights, if the LoRA is to be compared with them as well.

    Raises:
        UserError: not a LoRA, or one whose modules do not match the model.
    """
    shapes = read_header(path, "LoRA file").shapes
    # An empty tensor, which is no factor, may claim sizes beyond what torch takes.
    tensors = {name: torch.empty((0,) if 0 in shape else shape, device="meta") for name, shape in shapes.items()}
    pairs = lora_pairs(tensors, str(path))
    if weight_shapes is not None:
        match_weights(pairs, weight_shapes, str(path))
    return LoraHeader(group_keys(shapes.keys(), str(path))[0], frozenset(pair.rank for pair in pairs.values()))


def match_weights(pairs: Mapping[str, LoraPair], weight_shapes: Mapping[str, tuple[int, ...]], source: str) -> dict[str, str]:
    """The name of the weight that each LoRA module changes, by flat name.

    Raises:
        UserError: a module without a weight, or with one of another size.
    """
    weights = {flat_name(name.removesuffix(".weight")): name for name in weight_shapes if name.endswith(".weight")}
    if absent := sorted(pairs.keys() - weights.keys()):
        raise UserError(
            f"{source} holds a LoRA whose modules do not match the model: {len(absent)} of {len(pairs)} are not in it "
            f"({name_some(absent, 3)}). It was made for another model or by a tool with other names."
        )
    if unlike := sorted(flat for flat, pair in pairs.items() if pair.shape != tuple(weight_shapes[weights[flat]])):
        first = unlike[0]
        raise UserError(
            f"{source} holds a LoRA whose modules do not match the model: {len(unlike)} of {len(pairs)} have another size "
            f"({first} is {pairs[first].shape}, the model has {tuple(weight_shapes[weights[first]])}). "
            "It was made for another size of the model."
        )
    return {flat: weights[flat] for flat in pairs}


def tensor_hashes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
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
