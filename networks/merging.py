"""Merging LoRA files into the transformer's weights: while a checkpoint loads, or from file to file."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hunyuan_model.checkpoints.loading import require_same_tensors, true_value
from hunyuan_model.quantization.formats import cast
from hunyuan_model.runtime.loading import open_transformer
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from networks.block_strengths import EVERYWHERE, BlockStrengths
from networks.formats.reading import LoraFile, PlacedUpdate, fit_to_model, read_lora
from networks.formats.updates import LowRank, strength
from utils.checksums import file_sha256
from utils.errors import UserError
from utils.files import require_possible_file, require_writable_folder
from utils.progress import ProgressBar
from utils.safetensors_io import save_tensor_stream

logger = logging.getLogger(__name__)

MERGED = "merged_lora"  # in the metadata of a merged model


@dataclass(frozen=True)
class LoraToMerge:
    """A LoRA, how strongly to add it, also by block, and whether what does not fit the model is left out instead of refused."""

    file: LoraFile
    multiplier: float
    partial: bool = False
    blocks: BlockStrengths = EVERYWHERE

    def placed(self, weight_shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, PlacedUpdate, float]]:
        """(parameter, update, factor of the multiplier) of everything that fits the model; what has the factor 0 is left out.

        Raises:
            UserError: as ``fit_to_model``; or nothing is left of the LoRA.
        """
        fitting = fit_to_model(self.file, weight_shapes, partial=self.partial)
        factors = {name: self.blocks.of(name) for name in fitting}
        left = {name for name, factor in factors.items() if factor}
        if len(left) < len(fitting):
            out = len(fitting) - len(left)
            logger.info("%s: %d of %d parameters are left out by block", self.file.source, out, len(fitting))
        if not left:
            raise UserError(
                f"nothing is left of {self.file.source}: every block that it changes is excluded, or has the multiplier 0."
            )
        for name in left:
            yield from ((name, update, factors[name]) for update in fitting[name])


class MergePatch:
    """Adds LoRA updates to weights by name, one weight at a time. A UserError says which LoRA does not match the model.

    Args:
        weight_shapes: names and shapes of the model's weights.

    Attributes:
        names: the parameters that are changed.
    """

    def __init__(self, loras: Sequence[LoraToMerge], weight_shapes: Mapping[str, tuple[int, ...]]):
        self._updates: dict[str, list[tuple[PlacedUpdate, float]]] = {}
        for lora in loras:
            for name, update, factor in lora.placed(weight_shapes):
                self._updates.setdefault(name, []).append((update, lora.multiplier * factor))
        self.names = tuple(self._updates)

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The merged weight, or ``weight`` itself where nothing is added; see ``merged_weight``."""
        return merged_weight(weight, self._updates.get(name, ()))


@torch.no_grad()
def merged_weight(weight: torch.Tensor, updates: Sequence[tuple[PlacedUpdate, float]]) -> torch.Tensor:
    """``weight`` with updates, each times its multiplier, as a new float32 tensor on its device; ``weight`` itself without any.

    float32 so that the only rounding is the cast to the final dtype. Each update is that of the weight without the others.
    """
    if not updates:
        return weight
    merged = weight.to(torch.float32, copy=True)
    rows_of = merged if merged.dim() < 2 else merged.flatten(1)
    base = None if all(isinstance(placed.update, LowRank) for placed, _ in updates) else rows_of.clone()
    for placed, multiplier in updates:
        update, rows = placed.update, placed.rows(len(rows_of))
        if isinstance(update, LowRank):
            down, up = (factor.to(weight.device, torch.float32).flatten(1) for factor in (update.down, update.up))
            rows_of[rows].addmm_(up, down * (multiplier * update.scale))
        elif multiplier:
            rows_of[rows].add_(update.delta(base[rows]), alpha=strength(update, multiplier))
    return merged


def complete_multipliers(
    paths: Sequence[str | os.PathLike[str]], multipliers: Sequence[float], flag: str, multiplier_flag: str
) -> tuple[float, ...]:
    """One multiplier for each file; those that are missing at the end are 1.0, which is logged if some were given.

    Raises:
        UserError: more multipliers than files; names both flags.
    """
    given, files = len(multipliers), len(paths)
    if given > files:
        raise UserError(f"{multiplier_flag} has more values ({given}) than {flag} has files ({files}).")
    if 0 < given < files:
        logger.info("%s has %d of %d values; the other files of %s count 1.0 each", multiplier_flag, given, files, flag)
    return (*multipliers, *[1.0] * (files - given))


def read_lora_files(
    paths: Sequence[str | os.PathLike[str]],
    multipliers: Sequence[float] = (),
    *,
    partial: bool = False,
    blocks: BlockStrengths = EVERYWHERE,
) -> list[LoraToMerge]:
    """Read LoRA files, with 1.0 for multipliers that are missing at the end; ``partial`` as in ``read_lora``."""
    pairs = itertools.zip_longest(paths, multipliers, fillvalue=1.0)
    return [LoraToMerge(read_lora(path, partial=partial), multiplier, partial, blocks) for path, multiplier in pairs]


def merge_patch(loras: Sequence[LoraToMerge], dit: str | os.PathLike[str]) -> MergePatch:
    """The ``patch`` with which ``hunyuan_model.load_transformer(dit, patch=...)`` merges ``loras``; reads only headers."""
    return MergePatch(loras, open_transformer(dit, "--dit")[0].shapes)


def merge_lora_into_file(dit: str | os.PathLike[str], loras: Sequence[LoraToMerge], output: str | os.PathLike[str]) -> None:
    """Write the transformer with ``loras`` merged as a safetensors file: official names, each weight in its stored dtype.

    Weights that are dequantized (with scales, or of a GGUF file), for which the file written has no place, become bfloat16.
    Weights are read, merged in float32 and written one by one. The file appears under ``output`` only when whole; its metadata
    name the LoRA, with those that were merged before.

    Raises:
        UserError: ``output`` is a file that is read, also one in the folder ``dit``, or cannot be written.
    """
    if Path(output).suffix != ".safetensors":
        raise UserError(f"a merged model is saved as a .safetensors file, but {output} was asked for.")
    stored = Path(dit).iterdir() if os.path.isdir(dit) else [dit]
    for source in (*stored, *(lora.file.source for lora in loras)):
        if os.path.realpath(output) == os.path.realpath(source):
            raise UserError(f"the merged model would overwrite {source}, which is being read; give it another name.")
    require_possible_file(output, "the merged model")
    require_writable_folder(Path(output).parent, "the folder of the merged model,")
    checkpoint, config = open_transformer(dit, "--dit")
    with torch.device("meta"):
        require_same_tensors(HYVideoDiffusionTransformer(config), checkpoint)
    patch = MergePatch(loras, checkpoint.shapes)
    dtypes = {name: torch.bfloat16 if checkpoint.is_quantized(name) else dtype for name, dtype in checkpoint.dtypes.items()}
    merged = (
        (name, cast(patch(name, true_value(checkpoint.get(name), checkpoint.scales.get(name))), dtypes[name]))
        for name in ProgressBar(checkpoint.shapes, desc="merging", unit="tensor")
    )
    layout = {name: (dtypes[name], shape) for name, shape in checkpoint.shapes.items()}
    save_tensor_stream(
        output, layout, merged, {**checkpoint.metadata, MERGED: _with_merged(checkpoint.metadata.get(MERGED), loras)}
    )


def _with_merged(before: str | None, loras: Sequence[LoraToMerge]) -> str:
    """JSON of the LoRA files that are in a merged model."""
    try:
        known = json.loads(before or "[]")
    except (ValueError, RecursionError):
        known = None
    own = [
        {
            "file": os.path.basename(lora.file.source),
            "sha256": file_sha256(lora.file.source),
            "multiplier": lora.multiplier,
            "blocks": [[place, numbers and sorted(numbers), factor] for place, numbers, factor in lora.blocks.factors],
        }
        for lora in loras
    ]
    return json.dumps([*(known if isinstance(known, list) else []), *own], ensure_ascii=False)
