"""Checkpoint files as a lazy mapping from names to tensors.

Nothing is read until it is asked for: safetensors, GGUF and torch's zip files are memory-mapped, so opening a checkpoint of 25 GB
costs its header.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from hunyuan_model.checkpoints.gguf_files import MAGIC, gguf_entries
from hunyuan_model.checkpoints.mapped_files import MappedFile, torch_maps_read_only
from hunyuan_model.checkpoints.stored_tensor import Allocate, StoredTensor
from utils.errors import UserError, first_line, name_some
from utils.files import SIGNATURE_BYTES, foreign_content, is_torch_file, read_text, require_file, require_there
from utils.safetensors_io import SAFETENSORS_DTYPES, require_plausible_names, require_small_header

logger = logging.getLogger(__name__)

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
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".gguf")
SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}")

_MOST_PICKLE_BYTES = 8 << 20  # without the tensors, of which each takes about a hundred
_MOST_IN_A_TUPLE = 2000
_MOST_SHARED = 3  # times the size of the file is what its tensors may come to, of which some share their values
_PICKLES_OF_OLD_FILES = 5

# Training frameworks put the state dict one level down, under one of these.
WRAPPERS = ("module", "state_dict", "model_state_dict", "model", "ema")


def _safetensors_entries(path: Path, what: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file in file order, and its metadata."""
    require_small_header(path, what)
    try:
        with safe_open(str(path), framework="numpy"):  # looks whether all is well; for torch it would map to write
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{what} {path} is cut short or damaged ({error}). Copy or download it again.") from error
    try:
        mapped = MappedFile(path)
    except OSError as error:
        raise UserError(
            f"{what} {path} cannot be mapped into memory ({error.strerror or error}). Copy it to a disk of this machine."
        ) from error
    metadata = header.pop("__metadata__", None) or {}  # safetensors takes null
    entries = {}
    for name, stored in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if stored["dtype"] not in SAFETENSORS_DTYPES:
            raise UserError(
                f"{what} {path} stores {name} as {stored['dtype']}, which is not supported. "
                "Use a file in bfloat16, float16, float32 or float8."
            )
        dtype, shape = SAFETENSORS_DTYPES[stored["dtype"]], tuple(stored["shape"])
        offset = 8 + length + stored["data_offsets"][0]
        entries[name] = StoredTensor(shape, dtype, partial(mapped.pieces, dtype, shape, offset))
    return entries, metadata


def require_plain_torch_file(path: str | os.PathLike[str], what: str) -> None:
    """Refuse a torch checkpoint that could take far more memory or time than its size lets expect; torch is to open others alone.

    Raises:
        UserError: compressed or overlapping entries, a pickle of great size or depth, or none.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                    raise UserError(f"{what} {path} is compressed, which torch's files are not. Save it again with torch.save.")
                if sum(entry.file_size for entry in entries) > os.path.getsize(path):
                    raise ValueError("its entries overlap")
                pickles = [
                    archive.read(entry) for entry in entries if entry.filename.endswith(".pkl") and _is_small(entry.file_size)
                ]
            for content in pickles:
                _require_shallow(io.BytesIO(content))
        else:
            with open(
                path, "rb"
            ) as file:  # before torch 1.6: pickles of what it is, then of the content and of its storages' names
                for _ in range(_PICKLES_OF_OLD_FILES):
                    if file.peek(1):
                        _require_shallow(file)
    except UserError:
        raise
    except Exception as error:  # what reads pickles and zip files raises nearly every type on damaged ones
        raise UserError(f"{what} {path} is cut short or damaged ({first_line(error)}). Copy or download it again.") from error


def _is_small(size: int) -> bool:
    if size > _MOST_PICKLE_BYTES:
        raise ValueError("it lists more than any model has")
    return True


def _require_shallow(file: BinaryIO) -> None:
    """Raise a ValueError for a pickle whose tuples hold each other over and over: to hash one takes for ever."""
    start = file.tell()
    stack: list[int | None] = []  # of each value how many values it holds; None is a mark
    memo: dict[int, int] = {}
    for operation, argument, position in pickletools.genops(file):
        _is_small((position or 0) - start)
        before = operation.stack_before
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1] or 0
            continue
        held = 0
        count = len(before)
        if pickletools.markobject in before:
            count = before.index(pickletools.markobject)
            while (size := stack.pop()) is not None:
                held += size
        for _ in range(count):
            held += stack.pop() or 0
        if operation.name in ("GET", "BINGET", "LONG_BINGET"):
            held = memo[argument]
        elif operation.name.startswith("TUPLE") and held > _MOST_IN_A_TUPLE:
            raise ValueError("its values hold each other")
        sizes = [None if kind is pickletools.markobject else held + 1 for kind in operation.stack_after]
        stack.extend(sizes)


def _torch_load(path: Path, what: str) -> object:
    """Unpickle with ``weights_only``, memory-mapped where the file allows."""
    require_plain_torch_file(path, what)
    try:
        try:
            with torch_maps_read_only():
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, SafetensorError):  # torch's format before 1.6, a suffix that misleads torch, or a damaged file
            with open(path, "rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
            logger.warning("%s cannot be memory-mapped: it is read whole into memory. Save it again to avoid that.", path)
            return content
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{what} {path} holds more than tensors, or is damaged; it is not opened, because unpickling objects runs code. "
            "Use a .safetensors file, or a .pt file that holds only a state dict."
        ) from error
    except Exception as error:  # unpickling what is damaged raises nearly every type
        raise UserError(f"{what} {path} is cut short or damaged ({first_line(error)}). Copy or download it again.") from error


def _in_memory(tensor: torch.Tensor) -> StoredTensor:
    return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda: (tensor,))


def _torch_entries(path: Path, what: str) -> dict[str, StoredTensor]:
    """The tensors of a torch checkpoint, taken out of the wrappers that training frameworks put around them."""
    content = _torch_load(path, what)
    seen: list[object] = []
    while isinstance(content, Mapping) and not any(content is one for one in seen):
        seen.append(content)
        inner = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
            if tensors:
                if hollow := [name for name, value in tensors.items() if not _is_plain(value, os.path.getsize(path))]:
                    raise UserError(f"{what} {path} holds no plain values for {name_some(hollow)}. Save it again as dense tensors.")
                if sum(value.nbytes for value in tensors.values()) > _MOST_SHARED * os.path.getsize(path):
                    raise UserError(f"{what} {path} holds the same values under many names. Save it again as tensors of their own.")
                return {name: _in_memory(value.detach()) for name, value in tensors.items()}
        content = inner
    raise UserError(f"{what} {path} holds no state dict (a mapping from names to tensors). Check that it is the right file.")


def _is_plain(tensor: torch.Tensor, file_size: int) -> bool:
    """Whether all values of a tensor are in the file."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes() <= file_size


def _open_file(path: Path, what: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Open one file by what it holds; suffixes are often wrong."""
    require_file(path, what)  # opening a pipe would wait for ever
    try:
        with open(path, "rb") as file:
            start = file.read(SIGNATURE_BYTES)
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror or error}.") from error
    if start.startswith(MAGIC):
        return gguf_entries(path, what)
    # A length in 8 bytes, which may begin as a pickle does, then the JSON header.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= os.path.getsize(path):
        return _safetensors_entries(path, what)
    if found := foreign_content(start):
        raise UserError(f"{what} {path} {found}")
    if is_torch_file(start):
        return _torch_entries(path, what), {}
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return _safetensors_entries(path, what)
    raise UserError(
        f"{what} {path} is neither a safetensors file, a torch checkpoint nor a GGUF file. Check that it is the right file."
    )


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
    if not found:
        raise UserError(f"{what} {folder} is a folder without weights ({', '.join(WEIGHT_SUFFIXES)}).")
    if len({SHARD_NUMBER.sub("", path.name) for path in found}) > 1:
        names = name_some(path.name for path in found)
        raise UserError(f"{what} {folder} is a folder with several weight files ({names}). Name the one to use.")
    return found


def _shards_of_index(index: Path, what: str) -> list[Path]:
    try:
        weight_map = json.loads(read_text(index, what))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{what} {index} is not a readable index of shards. Copy or download it again.") from error
    missing = [name for name in names if "\0" in name or not os.path.isfile(index.parent / name)]
    if missing or not names:
        raise UserError(f"{what} {index.parent} lacks {', '.join(missing[:4]) or 'shards'}, which {index.name} lists.")
    return [index.parent / name for name in names]


class Checkpoint:
    """A lazy view of the tensors in one file or in the shards of one folder.

    Attributes:
        path: what the user named.
        what: how messages call it, e.g. ``"transformer"``.
        shapes, dtypes: by tensor name, in file order.
        metadata: of safetensors and GGUF files, else empty.
        scales: by tensor name, float32 (rows or 1, groups of inputs); what the file stores means these times what is there.
        entries: by tensor name.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        entries: Mapping[str, StoredTensor],
        metadata: Mapping[str, str],
        scales: Mapping[str, torch.Tensor],
    ) -> None:
        self.path = path
        self.what = what
        self.metadata = metadata
        self.scales = scales
        self.entries = entries
        self.shapes = {name: entry.shape for name, entry in entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in entries.items()}

    def get(self, name: str) -> torch.Tensor:
        """The tensor ``name`` on the CPU as stored. It may lie in the mapped file: never write to it, clone it to keep it."""
        return self.assemble(name, self.pieces(name))

    def pieces(self, name: str) -> tuple[torch.Tensor, ...]:
        """What ``get`` reads of the file: cheap, nothing is read yet."""
        return self.entries[name].pieces()

    def assemble(self, name: str, pieces: Sequence[torch.Tensor], allocate: Allocate = torch.empty) -> torch.Tensor:
        """The tensor ``name``, as ``get`` gives it, from its pieces; what is made of several lies in memory from ``allocate``."""
        return self.entries[name].made_of(pieces, allocate)

    def is_quantized(self, name: str) -> bool:
        """Whether the file holds codes in place of the values: what is computed from them fits in no file of that dtype."""
        return name in self.scales or self.entries[name].quantized

    def with_scales(self, scales: Mapping[str, torch.Tensor]) -> Checkpoint:
        """A view in which these tensors are multiplied with scales, see ``scales``."""
        return self.view(self.entries, scales)

    def view(
        self, entries: Mapping[str, StoredTensor], scales: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
    ) -> Checkpoint:
        """Other tensors from the same file, with their scales."""
        return Checkpoint(self.path, self.what, entries, self.metadata if metadata is None else metadata, scales)

    def rename(self, new_name: Callable[[str], str | None]) -> Checkpoint:
        """A view under other names; a name for which ``new_name`` returns None is left out.

        Raises:
            UserError: two tensors would have one name.
        """
        names = {old: new for old in self.entries if (new := new_name(old)) is not None}
        entries: dict[str, StoredTensor] = {}
        for old, new in names.items():
            if new in entries:
                raise UserError(f"{self.what} {self.path} holds {new} twice (also as {old}). Use a file with one model in it.")
            entries[new] = self.entries[old]
        scales = {names[old]: scale for old, scale in self.scales.items() if old in names}
        return self.view(entries, scales)

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
    """Open weights without reading them: a safetensors, torch or GGUF file, or a folder with one or with shards.

    Torch checkpoints are unpickled with ``weights_only`` and may wrap the state dict in ``module`` or ``state_dict``. ``what`` is
    how messages call it, e.g. ``"transformer (--dit)"``.

    Raises:
        UserError: missing, unreadable, cut short, a pickle of more than tensors, a folder without (unambiguous) weights.
    """
    root = require_there(path, what)
    entries: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in _files_of_folder(root, what) if root.is_dir() else [root]:
        found, described = _open_file(file, what)
        require_plausible_names(found.keys(), file, what)
        if twice := name_some(entries.keys() & found.keys(), 1):
            raise UserError(f"{what} {root} holds {twice} in two of its files. Keep the shards of one model in it.")
        entries |= found
        metadata |= described
    return Checkpoint(root, what, entries, metadata, {})
