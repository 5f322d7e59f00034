"""What requests start from: files found and checked before anything is loaded, and latents of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hunyuan_model.sampling.decoding import read_latents
from hunyuan_model.sampling.encoding import FrameEncoder
from hunyuan_model.sampling.preview import ColourMap, fit_colour_map
from hunyuan_model.vae.loading import load_vae
from hunyuan_model.vae.model import SPATIAL_COMPRESSION, TIME_COMPRESSION, AutoencoderKLCausal3D
from networks.generation.requests import START_FIELDS, Request
from networks.generation.settings import GenerationSettings
from utils.devices import free_memory
from utils.errors import UserError

FindStarts = Callable[[str, Path, tuple[int, int], int], list[Path]]
"""Kind (image or video), path, (height, width), frames -> the files that the path stands for, checked."""
ReadStart = Callable[[str, Path, tuple[int, int], int], np.ndarray]
"""The same of one of these files -> frames (T, H, W, 3) uint8 RGB."""


@dataclass(frozen=True)
class Start:
    """What a request starts from, as it is needed; ``kind`` is image, video or latent."""

    kind: str
    path: Path
    size: tuple[int, int]
    length: int

    @property
    def is_encoded(self) -> bool:
        """Whether the VAE has to encode it."""
        return self.kind != "latent"


@dataclass
class Prepared:
    """Latents (1, 16, F, H, W), float32, in the network's scale, of each start, or why there are none."""

    latents: dict[Start, Tensor] = field(default_factory=dict)
    errors: dict[Start, UserError] = field(default_factory=dict)

    def of(self, request: Request) -> Tensor | None:
        """Of its start; None where it starts from noise alone.

        Raises:
            UserError: a file that cannot be read any more, memory that does not suffice, or a VAE that gives NaN.
        """
        start = start_of(request)
        if start in self.errors:
            raise self.errors[start]
        return None if start is None else self.latents[start]


def start_of(request: Request) -> Start | None:
    """None where it starts from noise alone."""
    for name in START_FIELDS:
        if (path := getattr(request, name)) is not None:
            kind = name.removesuffix("_path")
            return Start(kind, Path(path), request.sampling.video_size, request.sampling.video_length)
    return None


def expand_starts(requests: Sequence[Request], find_starts: FindStarts) -> list[Request]:
    """The requests with their starts checked, and one for each file where a start is a folder of several.

    Raises:
        UserError: a start that cannot be read or does not fit the size and length; names the line of the request.
    """
    found: dict[Start, list[Path]] = {}
    expanded: list[Request] = []
    for request in requests:
        start = start_of(request)
        if start is None:
            expanded.append(request)
            continue
        with _located(request, start):
            if start not in found:
                found[start] = _find(start, find_starts)
        if found[start] == [start.path]:
            expanded.append(request)
        else:
            expanded += one_for_each(request, start.kind, found[start])
    return expanded


def one_for_each(request: Request, kind: str, paths: Sequence[Path]) -> Iterator[Request]:
    """A request for each start of this kind, named after it."""
    stems = [path.stem.removesuffix("_latent") for path in paths]
    for path, stem in zip(paths, stems):
        name = stem if stems.count(stem) == 1 else path.name
        name = f"{request.name}_{name}" if request.name else name
        where = f"{request.where}, {path.name}" if request.where else str(path)
        yield replace(request, **{f"{kind}_path": str(path)}, name=name, where=where)


def prepare_with_vae(
    settings: GenerationSettings,
    requests: Sequence[Request],
    read_start: ReadStart,
    device: torch.device,
    vae: AutoencoderKLCausal3D | None = None,
) -> tuple[Prepared, ColourMap | None]:
    """What each request starts from, and what previews need, if they are wanted.

    Without a ``vae`` that is loaded it is loaded where it is needed, and gone afterwards.

    Raises:
        UserError: memory that does not suffice for the VAE.
    """
    starts = dict.fromkeys(start for request in requests if (start := start_of(request)) is not None)
    previews = settings.output.preview_every is not None
    encoder = None
    if previews or any(start.is_encoded for start in starts):
        if vae is None:
            vae = load_vae(settings.vae.vae, device=device, dtype=settings.vae.vae_dtype)
        encoder = FrameEncoder(vae, settings.vae, device)
    prepared = Prepared()
    for start in starts:
        try:
            if start.is_encoded:
                prepared.latents[start] = encoder.encode(read_start(start.kind, start.path, start.size, start.length))
            else:
                prepared.latents[start] = read_latents(start.path, "--latent_path")[0]
        except UserError as error:
            prepared.errors[start] = error
    colours = fit_colour_map(encoder) if previews else None
    del encoder, vae
    free_memory(device)
    return prepared, colours


def _find(start: Start, find_starts: FindStarts) -> list[Path]:
    if start.is_encoded:
        return find_starts(start.kind, start.path, start.size, start.length)
    frames, height, width = read_latents(start.path, "--latent_path")[0].shape[2:]
    length, size = (frames - 1) * TIME_COMPRESSION + 1, (height * SPATIAL_COMPRESSION, width * SPATIAL_COMPRESSION)
    if (length, size) != (start.length, start.size):
        raise UserError(
            f"--latent_path {start.path} holds {length} frame(s) of {size[0]} x {size[1]} pixels (height x width), but "
            f"{start.length} of {start.size[0]} x {start.size[1]} are asked for. "
            f"Give --video_length {length} --video_size {size[0]} {size[1]}."
        )
    return [start.path]


@contextmanager
def _located(request: Request, start: Start) -> Iterator[None]:
    """Errors name the line of a prompt file, or the flag."""
    try:
        yield
    except UserError as error:
        flag = f"--{start.kind}_path"
        where = request.where or ("" if str(error).startswith(flag) else flag)
        raise UserError(f"{where}: {error}" if where else str(error)) from error
