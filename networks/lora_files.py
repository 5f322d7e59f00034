"""LoRA files: the two key layouts, reading either, and converting between them.

``default`` is the layout of sd-scripts: ``lora_unet_{module path with dots as underscores}`` with ``.lora_down.weight``
(rank, in), ``.lora_up.weight`` (out, rank) and ``.alpha``; the update of a weight is ``alpha / rank * up @ down``.

``other`` is the layout that ComfyUI and diffusers read: ``diffusion_model.{module path}`` (or ``transformer.``) with
``.lora_A.weight`` and ``.lora_B.weight``, the scale already multiplied into both factors, and no alpha.

In memory everything is ``default``; a module is known by its *flat name*, its path with dots as underscores.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import save

from utils.errors import UserError, name_some
from utils.safetensors_io import read_header, read_tensors

DEFAULT = "default"
OTHER = "other"
DEFAULT_PREFIX = "lora_unet_"
OTHER_PREFIX = "diffusion_model."

_DEFAULT_KEY = re.compile(r"lora_unet_(?P<module>[^.]+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha)")
_OTHER_KEY = re.compile(r"(?:diffusion_model|transformer)\.(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|alpha)")
_PARTS = {
    "lora_down.weight": "down",
    "lora_A.weight": "down",
    "lora_up.weight": "up",
    "lora_B.weight": "up",
    "alpha": "alpha",
}
_FOREIGN_PARTS = ("lokr_", "hada_", "oft_", "dora_scale", "lora_mid")

# Every linear layer of the transformer. Flat names are ambiguous without it: underscores also stand inside names.
_MODULE_PATHS = (
    "double_blocks.{n}.img_mod.linear",
    "double_blocks.{n}.img_attn_qkv",
    "double_blocks.{n}.img_attn_proj",
    "double_blocks.{n}.img_mlp.fc1",
    "double_blocks.{n}.img_mlp.fc2",
    "double_blocks.{n}.txt_mod.linear",
    "double_blocks.{n}.txt_attn_qkv",
    "double_blocks.{n}.txt_attn_proj",
    "double_blocks.{n}.txt_mlp.fc1",
    "double_blocks.{n}.txt_mlp.fc2",
    "single_blocks.{n}.linear1",
    "single_blocks.{n}.linear2",
    "single_blocks.{n}.modulation.linear",
    "txt_in.input_embedder",
    "txt_in.t_embedder.mlp.{n}",
    "txt_in.c_embedder.linear_{n}",
    "txt_in.individual_token_refiner.blocks.{n}.self_attn_qkv",
    "txt_in.individual_token_refiner.blocks.{n}.self_attn_proj",
    "txt_in.individual_token_refiner.blocks.{n}.mlp.fc1",
    "txt_in.individual_token_refiner.blocks.{n}.mlp.fc2",
    "txt_in.individual_token_refiner.blocks.{n}.adaLN_modulation.1",
    "time_in.mlp.{n}",
    "guidance_in.mlp.{n}",
    "vector_in.in_layer",
    "vector_in.out_layer",
    "final_layer.linear",
    "final_layer.adaLN_modulation.1",
)
_FLAT_TO_PATH = [(re.compile(path.replace(".", "_").replace("{n}", r"(\d+)")), path) for path in _MODULE_PATHS]


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


def flat_name(module_path: str) -> str:
    """``double_blocks.0.img_mlp.fc1`` -> ``double_blocks_0_img_mlp_fc1``."""
    return module_path.replace(".", "_")


def module_path(flat: str) -> str:
    """``double_blocks_0_img_mlp_fc1`` -> ``double_blocks.0.img_mlp.fc1``.

    Raises:
        UserError: no linear layer of a HunyuanVideo transformer has this name.
    """
    for pattern, path in _FLAT_TO_PATH:
        if found := pattern.fullmatch(flat):
            return path.format(n=found[1]) if found.groups() else path
    raise UserError(f"{DEFAULT_PREFIX}{flat} names no linear layer of a HunyuanVideo transformer, so its keys cannot be converted.")


def group_keys(names: Collection[str], source: str) -> tuple[str, dict[str, dict[str, str]]]:
    """Tell the layout of LoRA keys and sort them by module; needs no tensors.

    Returns:
        The layout, and for each module (flat name in ``default``, dotted path in ``other``) its keys by part
        ("down", "up" and perhaps "alpha").

    Raises:
        UserError: not a LoRA, another kind of adapter, both layouts in one file, or a module without one factor.
    """
    foreign = [name for name in names if any(part in name for part in _FOREIGN_PARTS)]
    if foreign:
        raise UserError(
            f"{source} is not a plain LoRA: it holds keys such as {name_some(sorted(foreign), 1)}. "
            "Files made by LyCORIS need the network module that made them (for example lycoris.kohya)."
        )
    groups: dict[str, dict[str, dict[str, str]]] = {DEFAULT: {}, OTHER: {}}
    unknown = []
    for name in names:
        for layout, pattern in ((DEFAULT, _DEFAULT_KEY), (OTHER, _OTHER_KEY)):
            if found := pattern.fullmatch(name):
                parts = groups[layout].setdefault(found["module"], {})
                part = _PARTS[found["part"]]
                if part in parts:
                    raise UserError(f"{source} holds {name} and {parts[part]}, which are the same module.")
                parts[part] = name
                break
        else:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{source} is not a LoRA that can be read here: {len(unknown)} of its {len(names)} keys are unknown "
            f"({name_some(sorted(unknown), 3)}). Keys like "
            "lora_unet_*.lora_down.weight or diffusion_model.*.lora_A.weight are expected."
        )
    if not names:
        raise UserError(f"{source} holds no tensors.")
    if groups[DEFAULT] and groups[OTHER]:
        raise UserError(f"{source} mixes the layouts lora_unet_* and lora_A/lora_B; it cannot be told which one is meant.")
    layout = DEFAULT if groups[DEFAULT] else OTHER
    broken = [module for module, parts in groups[layout].items() if not {"down", "up"} <= parts.keys()]
    if broken:
        raise UserError(
            f"{source} is incomplete: a factor is missing for {name_some(sorted(broken), 3)}. Copy or make the file again."
        )
    return layout, groups[layout]


def lora_pairs(tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, LoraPair]:
    """The factors of each module, by flat name, from keys in either layout. Without an alpha the scale is 1.

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


def to_default(tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Tensors of either layout in the ``default`` one; a missing alpha becomes the rank (scale 1), float32.

    Raises:
        UserError: as in ``lora_pairs``.
    """
    converted = {}
    for flat, pair in lora_pairs(tensors, source).items():
        converted[f"{DEFAULT_PREFIX}{flat}.lora_down.weight"] = pair.down
        converted[f"{DEFAULT_PREFIX}{flat}.lora_up.weight"] = pair.up
        converted[f"{DEFAULT_PREFIX}{flat}.alpha"] = torch.tensor(pair.alpha)
    return converted


def to_other(tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Tensors of either layout in the ``other`` one: both factors times sqrt(alpha / rank), dtype kept, no alpha.

    Raises:
        UserError: as in ``lora_pairs``; or a module that the transformer does not have.
    """
    converted = {}
    for flat, pair in lora_pairs(tensors, source).items():
        path = OTHER_PREFIX + module_path(flat)
        root = math.sqrt(abs(pair.scale))
        converted[f"{path}.lora_A.weight"] = (pair.down.float() * root).to(pair.down.dtype)
        converted[f"{path}.lora_B.weight"] = (pair.up.float() * math.copysign(root, pair.scale)).to(pair.up.dtype)
    return converted


def read_lora(path: str | os.PathLike[str]) -> LoraFile:
    """Read a LoRA file of either layout.

    Raises:
        UserError: missing, not a whole safetensors file, or not a LoRA (see ``group_keys``).
    """
    header = read_header(path, "LoRA file")
    layout, _ = group_keys(header.shapes.keys(), str(path))
    return LoraFile(to_default(read_tensors(path).tensors, str(path)), header.metadata, layout)


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
