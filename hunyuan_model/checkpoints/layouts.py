"""The names that other programs give to the tensors of HunyuanVideo's networks: one table for each layout.

A table maps each module of the official names to the module, or the modules, that hold its rows in the other layout. ``N`` stands
for the number of a block. Checkpoints and LoRA files are read, and LoRA files written, by these tables alone: a new layout is a
new table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

Found = TypeVar("Found")
_NUMBER = re.compile(r"(?<=[._])\d{1,3}(?=[._]|$)")


@dataclass(frozen=True)
class Place:
    """Where a module of some layout stands in the official one.

    Attributes:
        module: the official module.
        part, parts: which of the parts of its rows this is. Every part but the last has as many rows as the weight has inputs.
        reorder: gives rows of that layout in the official order, if they differ.
    """

    module: str
    part: int = 0
    parts: int = 1
    reorder: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class NameLayout:
    """The names of one layout.

    Attributes:
        title: what messages call it.
        table: official module -> its module here, or its parts in the order of the official rows.
        reorder: official module -> what brings its rows from this layout into the official order, where they differ.
        parameters: last parts of names that differ here -> the official ones.
    """

    title: str
    table: Mapping[str, str | tuple[str, ...]]
    reorder: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)

    def place(self, module: str) -> Place | None:
        """Where the module with this path here stands; None if the layout has no such module."""
        return self._numbered_place(module, self._places)

    def place_of_flat(self, flat: str) -> Place | None:
        """As ``place``, for a path in which underscores stand for the dots."""
        return self._numbered_place(flat, self._flat_places)

    def modules(self, official: str) -> tuple[str, ...]:
        """The modules here that hold the rows of an official one, in order; empty if this layout has none for it."""
        names, number = _look_up(official, self.table)
        return tuple(_with_number(name, number) for name in _parts(names or ()))

    @cached_property
    def _places(self) -> dict[str, Place]:
        return {
            name: Place(module, part, len(_parts(names)), self.reorder.get(module))
            for module, names in self.table.items()
            for part, name in enumerate(_parts(names))
        }

    @cached_property
    def _flat_places(self) -> dict[str, Place]:
        return {name.replace(".", "_"): place for name, place in self._places.items()}

    @staticmethod
    def _numbered_place(name: str, places: Mapping[str, Place]) -> Place | None:
        place, number = _look_up(name, places)
        return place and replace(place, module=_with_number(place.module, number))


def _parts(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _with_number(pattern: str, number: str | None) -> str:
    return pattern if number is None else re.sub(r"\bN\b", number, pattern)


def _look_up(name: str, table: Mapping[str, Found]) -> tuple[Found | None, str | None]:
    """The entry for ``name`` and the number that its N stands for; numbers may also belong to names."""
    if name in table:
        return table[name], None
    for match in _NUMBER.finditer(name):
        if found := table.get(f"{name[: match.start()]}N{name[match.end() :]}"):
            return found, match[0]
    return None, None


def swap_halves(rows: Tensor) -> Tensor:
    """The second half of the rows before the first: its own inverse."""
    return torch.cat(rows.chunk(2)[::-1])


def _below(prefix: str, their_prefix: str, table: Mapping[str, str | tuple[str, ...]]) -> dict[str, str | tuple[str, ...]]:
    """``table`` with a prefix before the names of both sides."""
    return {
        prefix + name: tuple(their_prefix + part for part in _parts(names)) if isinstance(names, tuple) else their_prefix + names
        for name, names in table.items()
    }


_REFINER_BLOCK = "txt_in.individual_token_refiner.blocks.N."

DIFFUSERS = NameLayout(
    "diffusers",
    {
        "img_in.proj": "x_embedder.proj",
        "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
        "txt_in.input_embedder": "context_embedder.proj_in",
        "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
        "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
        "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
        "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
        **_below(
            _REFINER_BLOCK,
            "context_embedder.token_refiner.refiner_blocks.N.",
            {
                "norm1": "norm1",
                "norm2": "norm2",
                "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "self_attn_proj": "attn.to_out.0",
                "mlp.fc1": "ff.net.0.proj",
                "mlp.fc2": "ff.net.2",
                "adaLN_modulation.1": "norm_out.linear",
            },
        ),
        **_below(
            "double_blocks.N.",
            "transformer_blocks.N.",
            {
                "img_mod.linear": "norm1.linear",
                "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "img_attn_q_norm": "attn.norm_q",
                "img_attn_k_norm": "attn.norm_k",
                "img_attn_proj": "attn.to_out.0",
                "img_mlp.fc1": "ff.net.0.proj",
                "img_mlp.fc2": "ff.net.2",
                "txt_mod.linear": "norm1_context.linear",
                "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "txt_attn_q_norm": "attn.norm_added_q",
                "txt_attn_k_norm": "attn.norm_added_k",
                "txt_attn_proj": "attn.to_add_out",
                "txt_mlp.fc1": "ff_context.net.0.proj",
                "txt_mlp.fc2": "ff_context.net.2",
            },
        ),
        **_below(
            "single_blocks.N.",
            "single_transformer_blocks.N.",
            {
                "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                "linear2": "proj_out",
                "q_norm": "attn.norm_q",
                "k_norm": "attn.norm_k",
                "modulation.linear": "norm.linear",
            },
        ),
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    # The last modulation gives (shift, scale) in the official order, (scale, shift) there.
    reorder={"final_layer.adaLN_modulation.1": swap_halves},
)

OFFICIAL = NameLayout("official", {module: module for module in DIFFUSERS.table})

COMFYUI = NameLayout(
    "ComfyUI",
    OFFICIAL.table
    | {
        "time_in.mlp.0": "time_in.in_layer",
        "time_in.mlp.2": "time_in.out_layer",
        "guidance_in.mlp.0": "guidance_in.in_layer",
        "guidance_in.mlp.2": "guidance_in.out_layer",
        "txt_in.t_embedder.mlp.0": "txt_in.t_embedder.in_layer",
        "txt_in.t_embedder.mlp.2": "txt_in.t_embedder.out_layer",
        "txt_in.c_embedder.linear_1": "txt_in.c_embedder.in_layer",
        "txt_in.c_embedder.linear_2": "txt_in.c_embedder.out_layer",
        **_below(
            _REFINER_BLOCK,
            _REFINER_BLOCK,
            {"self_attn_qkv": "self_attn.qkv", "self_attn_proj": "self_attn.proj", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"},
        ),
        **_below(
            "double_blocks.N.",
            "double_blocks.N.",
            {
                official.format(stream): theirs.format(stream)
                for stream in ("img", "txt")
                for official, theirs in {
                    "{}_mod.linear": "{}_mod.lin",
                    "{}_attn_qkv": "{}_attn.qkv",
                    "{}_attn_proj": "{}_attn.proj",
                    "{}_attn_q_norm": "{}_attn.norm.query_norm",
                    "{}_attn_k_norm": "{}_attn.norm.key_norm",
                    "{}_mlp.fc1": "{}_mlp.0",
                    "{}_mlp.fc2": "{}_mlp.2",
                }.items()
            },
        ),
        **_below(
            "single_blocks.N.",
            "single_blocks.N.",
            {"q_norm": "norm.query_norm", "k_norm": "norm.key_norm", "modulation.linear": "modulation.lin"},
        ),
    },
    parameters={"scale": "weight"},  # of norms, in older files
)

TRANSFORMER_LAYOUTS = (OFFICIAL, COMFYUI, DIFFUSERS)
