"""Streaming the tensors of a checkpoint into a module."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import nn

from hunyuan_model.checkpoints.mapped_files import read_ahead
from hunyuan_model.checkpoints.reading import Checkpoint
from hunyuan_model.quantization.formats import (
    FP8_DTYPE,
    FP8_DTYPES,
    SCALE_SUFFIX,
    Quantizer,
    cast,
    cast_to_float8,
    dequantize,
    dequantize_stored,
)
from utils.errors import UserError
from utils.progress import ProgressBar

PROGRESS_FROM_BYTES = 1 << 30  # a smaller checkpoint loads before a progress bar can be read


class Placement(Protocol):
    """Where weights go that do not stay whole on the device: to host memory, or a part of each to another process."""

    def loads(self, name: str) -> bool:
        """Whether the weight ``name`` is read here; else the module gets it from elsewhere, after ``load_weights``."""

    def wants(self, name: str) -> bool:
        """Whether the weight ``name`` is one of them."""

    def copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What the module gets in the place of ``tensor``, the weight ``name`` or its scale."""

    def loaded(self, name: str) -> None:
        """The module has the weight ``name``, wherever it is."""


def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    device: torch.device | str | Callable[[str], torch.device],
    dtype_of: Callable[[str], torch.dtype],
    quantize: Quantizer = cast_to_float8,
    patch: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    host: Placement | None = None,
    progress: str | None = None,
) -> None:
    """Stream the tensors of ``checkpoint`` to their final dtype and device and put it into ``module`` as a frozen parameter.

    At the peak the final weights and one tensor are in memory. The parameters never share memory with the mapped file.
    The scale of a quantized weight, if it has one, is put beside it under the weight's name and ``_scale``.

    Args:
        module: built on the meta device; every parameter and persistent buffer must be in the checkpoint, and nothing
            else may be. Buffers outside the state dict must hold real values and are moved to ``device``.
        device: of all tensors, or what gives that of each by its name.
        dtype_of: final dtype by tensor name; tensors of integers keep theirs.
        quantize: how weights are quantized whose final dtype is float8_e4m3fn. Those that are stored so, and are not
            changed on the way, keep their bytes and their scale.
        patch: ``patch(name, tensor) -> tensor`` changes a weight before the cast. It gets the tensor on ``device`` as
            stored, float8 ones as float32 with their scales multiplied in, and must return a new tensor instead of writing
            to it, or the same one where it changes nothing.
        host: which parameters do not stay on ``device``; it holds one of them at a time, and only those that are patched or cast,
            which gives the same bits wherever they end.
        progress: text of the progress bar, which only large checkpoints show.

    Raises:
        UserError: names or shapes differ between module and checkpoint; nothing has been read then.
    """
    device_of = device if callable(device) else lambda _: torch.device(device)
    require_same_tensors(module, checkpoint)
    scratch = _Scratch()
    sizes = {name: math.prod(shape) * checkpoint.dtypes[name].itemsize for name, shape in checkpoint.shapes.items()}
    names = [name for name in sizes if host is None or host.loads(name)]
    total = sum(sizes[name] for name in names)
    description = progress or f"loading {checkpoint.what}"
    units = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "disable": total < PROGRESS_FROM_BYTES}
    with ProgressBar(total=total, desc=description, **units) as bar, read_ahead(names, checkpoint.pieces) as coming:
        for name, pieces in coming:
            stored_dtype, scale = checkpoint.dtypes[name], checkpoint.scales.get(name)
            dtype = dtype_of(name) if stored_dtype.is_floating_point else stored_dtype
            on_host = host is not None and host.wants(name)
            place = torch.device("cpu") if on_host and patch is None and stored_dtype == dtype else device_of(name)
            as_it_ends = (
                place.type == "cpu" and patch is None and (dtype == stored_dtype or (scale is None and dtype not in FP8_DTYPES))
            )
            stored = checkpoint.assemble(name, pieces, partial(_empty_of, dtype) if as_it_ends else scratch.take)
            tensor, scale = _converted(name, stored, scale, place, dtype, quantize, patch)
            del stored
            if any(_share_memory(tensor, other) for other in (*pieces, scratch.memory)):
                tensor = tensor.clone(memory_format=torch.contiguous_format)
            parts = {name: tensor} if scale is None else {name: tensor, name + SCALE_SUFFIX: scale}
            for part, value in parts.items():
                _assign(module, part, host.copy(part, value) if on_host else value)
            if host is not None:
                host.loaded(name)
            bar.update(sizes[name])
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            raise RuntimeError(f"buffer {name} is neither in the checkpoint nor computed: build it outside the meta device")
        if buffer.device != device_of(name):
            _assign(module, name, buffer.to(device_of(name)))


class _Scratch:
    """Memory for one tensor at a time that is converted afterwards: new memory for each takes longer than the conversion."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        if len(self.memory) < size:
            self.memory = torch.empty(size, dtype=torch.uint8)
        return self.memory[:size].view(dtype).view(shape)


def _empty_of(final: torch.dtype, shape: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=final)


def _converted(
    name: str,
    stored: torch.Tensor,
    scale: torch.Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
    quantize: Quantizer,
    patch: Callable[[str, torch.Tensor], torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A tensor and its scale, if it has one, as the module is to hold them; the tensor may still be ``stored``."""
    tensor = stored.to(device)
    as_stored = dtype == FP8_DTYPE == tensor.dtype
    if patch is None and scale is not None and dtype not in FP8_DTYPES:
        return dequantize_stored(tensor, dtype, scale.to(device)), None
    if patch is not None or (scale is not None and not as_stored):
        value = true_value(tensor, scale)
        patched = value if patch is None else patch(name, value).to(device)
        if patched is not value or not as_stored:
            tensor, scale = patched, None
    if dtype == FP8_DTYPE and tensor.dtype != dtype:
        tensor, scale = quantize(tensor)
    else:
        tensor = cast(tensor, dtype)
    return tensor.contiguous(), None if scale is None else scale.to(device, copy=True)


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def true_value(stored: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """What a stored tensor stands for: float8 and scaled ones as new float32 tensors, others as they are."""
    if scale is not None:
        return dequantize(stored.float(), torch.float32, scale.to(stored.device))
    return stored.float() if stored.dtype in FP8_DTYPES else stored


def require_same_tensors(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose names and shapes are not exactly those of ``module``, or that holds integers for its weights.

    Reads no tensor.

    Raises:
        UserError: names a few that differ.
    """
    tensors = module.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    found = checkpoint.shapes
    faults = []
    if missing := [name for name in expected if name not in found]:
        faults.append(f"{len(missing)} tensors are missing, such as {', '.join(missing[:3])}")
    if unexpected := [name for name in found if name not in expected]:
        faults.append(f"{len(unexpected)} are unknown, such as {', '.join(unexpected[:3])}")
    if different := [name for name in expected if name in found and expected[name] != found[name]]:
        shapes = ", ".join(f"{name} {found[name]} instead of {expected[name]}" for name in different[:3])
        faults.append(f"{len(different)} have another shape, such as {shapes}")
    weights = (name for name, tensor in tensors.items() if tensor.is_floating_point() and name in found)
    if integers := [name for name in weights if not checkpoint.dtypes[name].is_floating_point]:
        kind = str(checkpoint.dtypes[integers[0]]).removeprefix("torch.")
        faults.append(f"{len(integers)} hold whole numbers, such as {integers[0]} ({kind})")
    if faults:
        raise UserError(
            f"{checkpoint.what} {checkpoint.path} does not fit the model: {'; '.join(faults)}. "
            "Check that it is the right file and complete."
        )


def _assign(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._buffers:
        setattr(owner, leaf, tensor)
    else:  # also scales, which the module has no place for yet
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
