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
_FOREIGN_PARTS = ("lokr_", "hada_", "oft_", "dora_scale", "lora_mid")


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


@dataclass(frozen=True)
class LoraFile:
    """A LoRA read from disk: tensors in the ``default`` layout, metadata, and the layout the file had."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    layout: str


@dataclass(frozen=True)
class LoraHeader:
    """What the header of a LoRA file tells: its layout, and the ranks of its modules."""

    layout: str
    ranks: frozenset[int]


def group_keys(names: Collection[str], source: str) -> tuple[str, dict[str, dict[str, str]]]:
    """Tell the layout of LoRA keys and sort them by module; needs no tensors.

    Returns:
        The name of the layout, and for each module (as the layout writes it) its keys by part ("down", "up" and perhaps
        "alpha").

    Raises:
        UserError: not a LoRA, another kind of adapter, two layouts in one file, or a module without one factor.
    """
    foreign = [name for name in names if any(part in name for part in _FOREIGN_PARTS)]
    if foreign:
        raise UserError(
            f"{source} is not a plain LoRA: it holds keys such as {name_some(sorted(foreign), 1)}. "
            "Files made by LyCORIS need the network module that made them (for example lycoris.kohya)."
        )
    groups: dict[str, dict[str, dict[str, str]]] = {}
    unknown = []
    for name in names:
        found = next(((layout, *key) for layout, entry in LAYOUTS.items() if (key := entry.read_key(name))), None)
        if found is None:
            unknown.append(name)
            continue
        layout, module, part = found
        parts = groups.setdefault(layout, {}).setdefault(module, {})
        if part in parts:
            raise UserError(f"{source} holds {name} and {parts[part]}, which are the same module.")
        parts[part] = name
    examples = " or ".join(layout.example for layout in LAYOUTS.values())
    if unknown:
        raise UserError(
            f"{source} is not a LoRA that can be read here: {len(unknown)} of its {len(names)} keys are unknown "
            f"({name_some(sorted(unknown), 3)}). Keys like {examples} are expected."
        )
    if not names:
        raise UserError(f"{source} holds no tensors.")
    if len(groups) > 1:
        raise UserError(f"{source} mixes the layouts {' and '.join(groups)} ({examples}). Use a file with one of them.")
    layout = next(iter(groups))
    broken = [module for module, parts in groups[layout].items() if not {"down", "up"} <= parts.keys()]
    if broken:
        raise UserError(
            f"{source} is incomplete: a factor is missing for {name_some(sorted(broken), 3)}. Copy or make the file again."
        )
    return layout, groups[layout]


def lora_pairs(tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, LoraPair]:
    """The factors of each module, by flat name, from keys in any layout. Without an alpha the scale is 1.

    Raises:
        UserError: as in ``group_keys``; or factors that are no matrices of one rank.
    """
    _, groups = group_keys(tensors.keys(), source)
    pairs: dict[str, LoraPair] = {}
    for module, parts in groups.items():
        down, up = tensors[parts["down"]], tensors[parts["up"]]
        _check_factors(tuple(down.shape), tuple(up.shape), parts, source)
        alpha = _alpha_of(tensors[parts["alpha"]], module, source) if "alpha" in parts else float(down.shape[0])
        for part, factor in (("down", down), ("up", up)):
            if not factor.is_floating_point():
                raise UserError(
                    f"{source} stores {parts[part]} as {factor.dtype}, which cannot be read. Use a file in floating point."
                )
            if not torch.isfinite(factor.float()).all():
                raise UserError(f"{source} holds NaN or infinity in {parts[part]}: its training went wrong. Use an earlier save.")
        pairs[flat_name(module)] = LoraPair(down, up, alpha)
    return pairs


def _alpha_of(tensor: torch.Tensor, module: str, source: str) -> float:
    if tensor.numel() != 1 or not math.isfinite(alpha := float(tensor)):
        raise UserError(f"{source}: the alpha of {module} must be one finite number. Copy or make the file again.")
    return alpha


def to_layout(tensors: Mapping[str, torch.Tensor], layout: str, source: str) -> dict[str, torch.Tensor]:
    """Tensors of any layout in the one called ``layout``; factors keep their dtype, alpha is float32.

    Raises:
        UserError: as in ``lora_pairs``; or a module that the transformer does not have, where its path is needed.
    """
    target = LAYOUTS[layout]
    converted = {}
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
    """Read a LoRA file of any layout.

    Raises:
        UserError: missing, not a whole safetensors file, or not a LoRA (see ``group_keys``).
    """
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
    layout, groups = group_keys(shapes.keys(), str(path))
    sizes, ranks = {}, set()
    for module, parts in groups.items():
        down, up = shapes[parts["down"]], shapes[parts["up"]]
        _check_factors(down, up, parts, str(path))
        sizes[flat_name(module)] = (up[0], down[1])
        ranks.add(down[0])
    if weight_shapes is not None:
        match_weights(sizes, weight_shapes, str(path))
    return LoraHeader(layout, frozenset(ranks))


def match_weights(
    sizes: Mapping[str, tuple[int, int]], weight_shapes: Mapping[str, tuple[int, ...]], source: str
) -> dict[str, str]:
    """Find the weight that each LoRA module changes.

    Args:
        sizes: (out, in) of the update, by flat name.
        weight_shapes: shapes of the model's weights, by name.

    Returns:
        The name of the weight, by flat name.

    Raises:
        UserError: a module without a weight, or with one of another size.
    """
    matrices = {flat_name(name.removesuffix(".weight")): name for name in weight_shapes if name.endswith(".weight")}
    absent = [flat for flat in sizes if flat not in matrices]
    if absent:
        raise UserError(
            f"{source} holds a LoRA whose modules do not match the model: {len(absent)} of {len(sizes)} are not in it "
            f"({name_some(sorted(absent), 3)}). It was made for another model or by a tool with other names."
        )
    unlike = [flat for flat, size in sizes.items() if tuple(weight_shapes[matrices[flat]]) != tuple(size)]
    if unlike:
        first = sorted(unlike)[0]
        raise UserError(
            f"{source} holds a LoRA whose modules do not match the model: {len(unlike)} of {len(sizes)} have another size "
            f"({first} is {tuple(sizes[first])}, the model has {tuple(weight_shapes[matrices[first]])}). "
            "It was made for another size of the model."
        )
    return {flat: matrices[flat] for flat in sizes}


def _check_factors(down: tuple[int, ...], up: tuple[int, ...], parts: Mapping[str, str], source: str) -> None:
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or down[0] == 0:
        raise UserError(
            f"{source}: {parts['down']} {down} and {parts['up']} {up} are not the factors of one update; "
            "(rank, in) and (out, rank) are expected."
        )


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
