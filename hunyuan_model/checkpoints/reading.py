"""Checkpoint files as a lazy mapping from names to tensors, and streaming them into a module.

Nothing is read until it is asked for: safetensors and torch's zip files are memory-mapped, so opening a checkpoint of
25 GB costs its header, and loading one costs the final weights plus one tensor.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hunyuan_model.checkpoints.mapped_file import MappedFile, safetensors_offsets, torch_maps_read_only
from hunyuan_model.checkpoints.read_ahead import read_ahead
from hunyuan_model.quantization.formats import FP8_DTYPE, FP8_DTYPES, SCALE_SUFFIX, Quantizer, cast, cast_to_float8, dequantize
from utils.errors import UserError
from utils.files import require_file, require_there
from utils.foreign_files import SIGNATURE_BYTES, foreign_content, is_torch_file
from utils.progress import ProgressBar

logger = logging.getLogger(__name__)

PROGRESS_FROM_BYTES = 1 << 30  # a smaller checkpoint loads before a progress bar can be read

# Names under which published folders keep their weights, the preferred ones first.
FOLDER_INDEXES = (
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
FOLDER_FILES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "mp_rank_00_model_states.pt",
    "pytorch_model.pt",
    "pytorch_model.bin",
)
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
SHARD_NAME = re.compile(r"(.+)-\d{5}-of-(\d{5})\.(safetensors|bin|pt)")

# Training frameworks put the state dict one level down, under one of these.
WRAPPERS = ("module", "state_dict", "model_state_dict", "model")

SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class _File(Protocol):
    """One opened file: shapes and dtypes by name in file order, and its tensors on demand."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str]

    def get(self, name: str) -> torch.Tensor: ...


class _SafetensorsFile:
    def __init__(self, path: Path, what: str) -> None:
        try:
            file = safe_open(str(path), framework="numpy")  # looks whether all is well; for torch it would map to write
            self._offsets = safetensors_offsets(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{what} {path} is cut short or damaged ({error}). Copy or download it again.") from error
        try:
            self._mapped = MappedFile(path)
        except OSError as error:
            raise UserError(
                f"{what} {path} cannot be mapped into memory ({error.strerror or error}). Copy it to a disk of this machine."
            ) from error
        names = sorted(self._offsets, key=self._offsets.__getitem__)
        slices = {name: file.get_slice(name) for name in names}
        self.shapes = {name: tuple(entry.get_shape()) for name, entry in slices.items()}
        self.metadata = dict(file.metadata() or {})
        self.dtypes = {}
        for name, entry in slices.items():
            if entry.get_dtype() not in SAFETENSORS_DTYPES:
                raise UserError(
                    f"{what} {path} stores {name} as {entry.get_dtype()}, which is not supported. "
                    "Use a file in bfloat16, float16, float32 or float8."
                )
            self.dtypes[name] = SAFETENSORS_DTYPES[entry.get_dtype()]

    def get(self, name: str) -> torch.Tensor:
        return self._mapped.tensor(self.dtypes[name], self.shapes[name], self._offsets[name])


class _TorchFile:
    def __init__(self, path: Path, what: str) -> None:
        self._tensors = _state_dict_of(_torch_load(path, what), path, what)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}
        self.metadata = {}

    def get(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()


def _torch_load(path: Path, what: str) -> object:
    """Unpickle with ``weights_only``, memory-mapped where the file allows."""
    try:
        try:
            with torch_maps_read_only():
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, SafetensorError):  # torch's format before 1.6, a suffix that misleads torch, or a damaged file
            with open(path, "rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
            logger.warning("%s cannot be memory-mapped: it is read whole into memory. Save it anew to avoid that.", path)
            return content
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{what} {path} holds more than tensors, or is damaged; it is not opened, because unpickling objects runs code. "
            "Use a .safetensors file, or a .pt file that holds only a state dict."
        ) from error
    except Exception as error:  # unpickling what is damaged raises nearly every type
        # torch goes on with advice for programmers; a full stop within a word is that of a file name or a number
        reason = re.split(r"\.\s|\n", str(error).strip(), maxsplit=1)[0].rstrip(".") or type(error).__name__
        raise UserError(f"{what} {path} is cut short or damaged ({reason}). Copy or download it again.") from error


def _state_dict_of(content: object, path: Path, what: str) -> dict[str, torch.Tensor]:
    """The tensors of an unpickled checkpoint, taken out of the wrappers that training frameworks put around them."""
    while isinstance(content, Mapping):
        inner = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
            if tensors:
                return tensors
        content = inner
    raise UserError(f"{what} {path} holds no state dict (a mapping from names to tensors). Check that it is the right file.")


def _open_file(path: Path, what: str) -> _File:
    """Open one file by what it holds; suffixes are often wrong."""
    require_file(path, what)  # opening a pipe would wait for ever
    try:
        with open(path, "rb") as file:
            start = file.read(SIGNATURE_BYTES)
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror or error}.") from error
    if found := foreign_content(start):
        raise UserError(f"{what} {path} {found}")
    if is_torch_file(start):
        return _TorchFile(path, what)
    if start[8:9] == b"{" or path.suffix == ".safetensors":  # a length in 8 bytes, then the JSON header
        return _SafetensorsFile(path, what)
    raise UserError(f"{what} {path} is neither a safetensors file nor a torch checkpoint. Check that it is the right file.")


def _files_of_folder(folder: Path, what: str) -> list[Path]:
    """The weight file or shards of a model folder."""
    try:
        names = {path.name for path in folder.iterdir() if os.path.isfile(path)}
    except OSError as error:
        raise UserError(f"{what} {folder} is a folder that cannot be listed: {error.strerror or error}.") from error
    for name in FOLDER_INDEXES:
        if name in names:
            return _shards_of_index(folder / name, what)
    for name in FOLDER_FILES:
        if name in names:
            return [folder / name]
    found = sorted(folder / name for name in names if Path(name).suffix in WEIGHT_SUFFIXES)
    shards = [SHARD_NAME.fullmatch(path.name) for path in found]
    if found and all(shards) and len({shard.group(1, 2, 3) for shard in shards}) == 1:
        if len(found) != int(shards[0].group(2)):
            raise UserError(f"{what} {folder} holds {len(found)} of {int(shards[0].group(2))} shards. Fetch the others.")
        return found
    if len(found) == 1:
        return found
    if not found:
        raise UserError(f"{what} {folder} is a folder without weights ({', '.join(WEIGHT_SUFFIXES)}).")
    names = ", ".join(path.name for path in found[:4])
    raise UserError(f"{what} {folder} is a folder with several weight files ({names}). Name the one to use.")


def _shards_of_index(index: Path, what: str) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{what} {index} is not a readable index of shards. Copy or download it again.") from error
    missing = [name for name in names if "\0" in name or not os.path.isfile(index.parent / name)]
    if missing or not names:
        raise UserError(f"{what} {index.parent} lacks {', '.join(missing[:4]) or 'shards'}, which {index.name} lists.")
    return [index.parent / name for name in names]


@dataclass(frozen=True)
class _Entry:
    file: _File
    name: str  # as stored


class Checkpoint:
    """A lazy view of the tensors in one file or in the shards of one folder.

    Attributes:
        path: what the user named.
        what: how messages call it, e.g. ``"transformer"``.
        shapes, dtypes: by tensor name, in file order.
        metadata: of safetensors files, else empty.
        scales: by tensor name, float32 (rows or 1, 1); what the file stores means these times what is there.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        entries: dict[str, _Entry],
        metadata: dict[str, str],
        scales: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.path = path
        self.what = what
        self.metadata = metadata
        self.scales = dict(scales or {})
        self._entries = entries
        self.shapes = {name: entry.file.shapes[entry.name] for name, entry in entries.items()}
        self.dtypes = {name: entry.file.dtypes[entry.name] for name, entry in entries.items()}

    def get(self, name: str) -> torch.Tensor:
        """The tensor ``name`` on the CPU as stored. It may lie in the mapped file: never write to it, clone it to keep it."""
        entry = self._entries[name]
        return entry.file.get(entry.name)

    def with_scales(self, scales: Mapping[str, torch.Tensor]) -> Checkpoint:
        """A view in which these tensors are multiplied with scales, see ``scales``."""
        return Checkpoint(self.path, self.what, self._entries, self.metadata, scales)

    def rename(self, new_name: Callable[[str], str | None]) -> Checkpoint:
        """A view under other names; a name for which ``new_name`` returns None is left out.

        Raises:
            UserError: two tensors would have one name.
        """
        entries: dict[str, _Entry] = {}
        scales = {}
        for old, entry in self._entries.items():
            new = new_name(old)
            if new is None:
                continue
            if new in entries:
                raise UserError(f"{self.what} {self.path} holds {new} twice (also as {old}). Use a file with one model in it.")
            entries[new] = entry
            if old in self.scales:
                scales[new] = self.scales[old]
        return Checkpoint(self.path, self.what, entries, self.metadata, scales)

    def under_prefix(self, prefix: str) -> Checkpoint:
        """A view of the tensors whose names begin with ``prefix``, without it. The empty prefix returns the same view."""
        if not prefix:
            return self
        return self.rename(lambda name: name[len(prefix) :] if name.startswith(prefix) else None)

    def prefix_of(self, name: str) -> str | None:
        """What stands before ``name`` in this file: ``"model."`` if it holds ``model.{name}``; None if it is not there.

        Where a file holds several, the shortest prefix wins.
        """
        prefixes = [found[: -len(name)] for found in self.shapes if found == name or found.endswith(f".{name}")]
        return min(prefixes, key=len, default=None)


def open_checkpoint(path: str | os.PathLike[str], what: str) -> Checkpoint:
    """Open weights without reading them: a safetensors file, a torch checkpoint, or a folder with one or with shards.

    Torch checkpoints are unpickled with ``weights_only`` and may wrap the state dict in ``module`` or ``state_dict``.

    Args:
        what: how messages call it, e.g. ``"transformer (--dit)"``.

    Raises:
        UserError: missing, unreadable, cut short, a pickle of more than tensors, a folder without (unambiguous) weights.
    """
    root = require_there(path, what)
    files = [_open_file(file, what) for file in (_files_of_folder(root, what) if root.is_dir() else [root])]
    entries: dict[str, _Entry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        entries |= {name: _Entry(file, name) for name in file.shapes}
        metadata |= file.metadata
    return Checkpoint(root, what, entries, metadata)


class HostPlacement(Protocol):
    """Where weights go that are to end in host memory."""

    def wants(self, name: str) -> bool:
        """Whether the weight ``name`` is one of them."""

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` in host memory."""

    def loaded(self, name: str) -> None:
        """The module has the weight ``name``, wherever it is."""


def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype_of: Callable[[str], torch.dtype],
    quantize: Quantizer = cast_to_float8,
    patch: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    host: HostPlacement | None = None,
    progress: str | None = None,
) -> None:
    """Stream every tensor of ``checkpoint`` to its final dtype and device and put it into ``module`` as a frozen parameter.

    At the peak the final weights and one tensor are in memory. The parameters never share memory with the mapped file.
    The scale of a quantized weight, if it has one, is put beside it under the weight's name and ``_scale``.

    Args:
        module: built on the meta device; every parameter and persistent buffer must be in the checkpoint, and nothing
            else may be. Buffers outside the state dict must hold real values and are moved to ``device``.
        dtype_of: final dtype by tensor name; tensors of integers keep theirs.
        quantize: how weights are quantized whose final dtype is float8_e4m3fn. Those that are stored so, and are not
            changed on the way, keep their bytes and their scale.
        patch: ``patch(name, tensor) -> tensor`` changes a weight before the cast. It gets the tensor on ``device`` as
            stored, float8 ones as float32 with their scales multiplied in, and must return a new tensor instead of writing
            to it, or the same one where it changes nothing.
        host: which parameters end in host memory; ``device`` holds one of them at a time, and only those that are patched or
            cast, which gives the same bits wherever they end.
        progress: text of the progress bar, which only large checkpoints show.

    Raises:
        UserError: names or shapes differ between module and checkpoint; nothing has been read then.
    """
    device = torch.device(device)
    require_same_tensors(module, checkpoint)
    total = sum(_bytes(checkpoint, name) for name in checkpoint.shapes)
    description = progress or f"loading {checkpoint.what}"
    with (
        ProgressBar(
            total=total, desc=description, unit="B", unit_scale=True, unit_divisor=1024, disable=total < PROGRESS_FROM_BYTES
        ) as bar,
        read_ahead(checkpoint.shapes, checkpoint.get) as tensors,
    ):
        for name, stored in tensors:
            dtype = dtype_of(name) if checkpoint.dtypes[name].is_floating_point else checkpoint.dtypes[name]
            on_host = host is not None and host.wants(name)
            as_stored = patch is None and checkpoint.dtypes[name] == dtype
            place = torch.device("cpu") if on_host and as_stored else device
            for part, tensor in _final_tensors(name, stored, checkpoint.scales.get(name), place, dtype, quantize, patch):
                _assign(module, part, host.copy(tensor) if on_host else tensor)
            if host is not None:
                host.loaded(name)
            bar.update(_bytes(checkpoint, name))
    _move_other_buffers(module, device)


def _final_tensors(
    name: str,
    stored: torch.Tensor,
    scale: torch.Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
    quantize: Quantizer,
    patch: Callable[[str, torch.Tensor], torch.Tensor] | None,
) -> list[tuple[str, torch.Tensor]]:
    """A tensor as ``module`` is to hold it, and its scale if it has one."""
    tensor = stored.to(device)
    if patch is not None or (scale is not None and (dtype != FP8_DTYPE or tensor.dtype != dtype)):
        value = true_value(tensor, scale)
        patched = value if patch is None else patch(name, value).to(device)
        if patched is not value or dtype != FP8_DTYPE or tensor.dtype != dtype:
            tensor, scale = patched, None
    if dtype == FP8_DTYPE and tensor.dtype != dtype:
        tensor, scale = quantize(tensor)
    else:
        tensor = cast(tensor, dtype)
    if tensor.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    parts = [(name, tensor.contiguous())]
    if scale is not None:
        parts.append((name + SCALE_SUFFIX, scale.to(device, copy=True)))
    return parts


def true_value(stored: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """What a stored tensor stands for: float8 and scaled ones as new float32 tensors, others as they are."""
    if scale is not None:
        return dequantize(stored.float(), torch.float32, scale.to(stored.device))
    return stored.float() if stored.dtype in FP8_DTYPES else stored


def _bytes(checkpoint: Checkpoint, name: str) -> int:
    count = 1
    for side in checkpoint.shapes[name]:
        count *= side
    return count * checkpoint.dtypes[name].itemsize


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


def _move_other_buffers(module: nn.Module, device: torch.device) -> None:
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            raise RuntimeError(f"buffer {name} is neither in the checkpoint nor computed: build it outside the meta device")
        if buffer.device != device:
            _assign(module, name, buffer.to(device))
