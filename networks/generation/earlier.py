"""What an earlier run has left of a batch (--skip_existing): results, and latents that were not decoded."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from hunyuan_model.sampling.decoding import ENDINGS, LATENT_ENDING, PREVIEW_ENDING, OutputSettings, read_latents
from hunyuan_model.sampling.preview import Preview
from networks.generation.record import identity, settings_of, with_flags
from networks.generation.requests import Request
from utils.errors import UserError
from utils.files import is_temporary
from utils.media.metadata import PICTURE, read_media_metadata

logger = logging.getLogger(__name__)

FLAG = "--skip_existing"
_NUMBERS = re.compile(r"(_\d+)+$")


@dataclass(frozen=True)
class Sampled:
    """A result that waits for the VAE.

    Attributes:
        stored: its latents.
        disposable: whether their file goes when they are decoded.
        metadata: of its files.
        preview: to be removed when it is decoded.
    """

    request: Request
    stem: str
    stored: Path
    disposable: bool
    metadata: dict[str, str]
    preview: Preview | None = None


@dataclass
class Earlier:
    """What is there of a batch.

    Attributes:
        done: requests with the stems of their files.
        waiting: latents to decode.
        wanted: requests that are to be sampled.
        as_made: by request, the same with the random seed that its result was made with.
    """

    done: list[tuple[Request, str]] = field(default_factory=list)
    waiting: list[Sampled] = field(default_factory=list)
    wanted: list[Request] = field(default_factory=list)
    as_made: dict[Request, Request] = field(default_factory=dict)


@dataclass(frozen=True)
class _File:
    """A file that is there, and what it says of itself, where that is read."""

    path: Path
    metadata: Mapping[str, str]

    @cached_property
    def identity(self) -> str | None:
        return identity(self.metadata)

    @cached_property
    def seed(self) -> int | None:
        settings = settings_of(self.metadata)
        seed = settings["flags"].get("seed") if settings else None
        return seed if isinstance(seed, int) else None

    @property
    def is_disposable(self) -> bool:
        """Of latents: whether they say that they were made to be decoded, and not to be kept."""
        settings = settings_of(self.metadata)
        kind = settings["flags"].get("output_type", OutputSettings.output_type) if settings else None
        return kind in ENDINGS and LATENT_ENDING not in ENDINGS[kind]


_Left = Mapping[str, Mapping[str, _File]]
"""What a folder holds: by stem, the files by their endings."""


def find_earlier(requests: Sequence[Request], output: OutputSettings, metadata: Callable[[Request], Mapping[str, str]]) -> Earlier:
    """Sort ``requests`` by what the output folder holds of them already; each file counts for one request.

    A file is that of a request if its metadata say that it was made as the request would be, random seeds aside, and its name
    begins as that of the batch, in which numbers may have changed. Requests that share a random seed, as those of a comparison
    do, go on with the one that their first result has. Without metadata the name decides. Latents that nobody asked for and
    previews, left by a run that ended before it removed them, are removed.
    """
    _remove_previews(requests, output)
    by_name = output.no_metadata
    left, found, used = _files_left(output, read=not by_name), Earlier(), set()
    wanted, shared = ENDINGS[output.output_type], None if by_name else _shared_seed(requests, left, metadata)
    for asked in requests:
        request = asked if shared is None else _with_seed(asked, shared)
        own = None if by_name else identity(metadata(request))
        stems = [stem for stem in _candidates(left, request, by_name) if stem not in used]
        of_results = (stem for stem in stems if all(_is_of(left[stem], ending, own, shared) for ending in wanted))
        of_latents = (stem for stem in stems if _is_of(left[stem], LATENT_ENDING, own, shared))
        if (stem := next(of_results, None)) is not None:
            request = _with_seed(request, left[stem][wanted[0]].seed)
            found.done.append((request, stem))
            used.add(stem)
            if LATENT_ENDING not in wanted and _is_of(left[stem], LATENT_ENDING, own, shared):
                latents = left[stem][LATENT_ENDING]
                if latents.is_disposable:
                    latents.path.unlink()
        elif (stem := next((stem for stem in of_latents if _readable(left[stem][LATENT_ENDING].path)), None)) is not None:
            latents = left[stem][LATENT_ENDING]
            request = _with_seed(request, latents.seed)
            known = with_flags(latents.metadata, {"output_type": output.output_type})
            disposable = not output.keeps_latents and latents.is_disposable
            found.waiting.append(Sampled(request, stem, latents.path, disposable, known))
            used.add(stem)
        else:
            found.wanted.append(request)
        found.as_made[asked] = request
    counts = f"{len(found.done)} of {len(requests)} are there already"
    waiting = f", {len(found.waiting)} are sampled and only decoded" if found.waiting else ""
    logger.info("%s%s: %s%s", FLAG, " by name, as there is no metadata" if by_name else "", counts, waiting)
    return found


def _is_of(files: Mapping[str, _File], ending: str, own: str | None, seed: int | None) -> bool:
    """Whether there is such a file of the request with the identity ``own``, and made with ``seed`` if there is one; without an
    identity the name has decided."""
    file = files.get(ending)
    return file is not None and (own is None or (file.identity == own and seed in (None, file.seed)))


def _with_seed(request: Request, seed: int | None) -> Request:
    """With the random seed of its earlier result, if that is known."""
    return request if request.seed_given or seed is None else request.changed({"seed": seed, "seed_given": False})


def _shared_seed(requests: Sequence[Request], left: _Left, metadata: Callable[[Request], Mapping[str, str]]) -> int | None:
    """That of the first earlier result of requests that share a random seed."""
    if len(requests) < 2 or any(request.seed_given for request in requests) or len({r.sampling.seed for r in requests}) > 1:
        return None
    for request in requests:
        own = identity(metadata(request))
        for stem in _candidates(left, request, by_name=False):
            for file in left[stem].values():
                if file.identity == own is not None:
                    return file.seed
    return None


def _remove_previews(requests: Sequence[Request], output: OutputSettings) -> None:
    """Those of the batch, whatever its seeds were."""
    for batch in {_batch(request.name) for request in requests if request.name is not None}:
        own = re.compile(rf"{re.escape(batch)}(_\d+)+(-\d+)?{re.escape(PREVIEW_ENDING)}")
        for path in Path(output.save_path).glob(f"*{PREVIEW_ENDING}"):
            if own.fullmatch(path.name):
                path.unlink(missing_ok=True)


def _batch(name: str) -> str:
    """What the names of all its requests begin with."""
    return _NUMBERS.sub("", name)


def _files_left(output: OutputSettings, read: bool) -> _Left:
    """In the order of names."""
    left: dict[str, dict[str, _File]] = {}
    folder = Path(output.save_path)
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    for path in (folder / name for name in names):
        for ending in {*ENDINGS[output.output_type], LATENT_ENDING}:
            fits = path.name.endswith(ending) if ending else (path / PICTURE).is_file()
            if fits and not is_temporary(path):
                file = _File(path, _metadata_of(path) if read else {})
                left.setdefault(path.name[: len(path.name) - len(ending)], {})[ending] = file
    return left


def _metadata_of(path: Path) -> dict[str, str]:
    try:
        return read_media_metadata(path, FLAG)
    except UserError:  # some other file, which is not in the way
        return {}


def _candidates(left: _Left, request: Request, by_name: bool) -> list[str]:
    """Stems that may be the request's, the likeliest first."""
    if request.name is None:
        return [] if by_name else list(left)
    seed = str(request.sampling.seed) if request.seed_given else r"\d+"
    own = re.compile(rf"{re.escape(request.name)}_{seed}(-\d+)?")
    if by_name:
        return [stem for stem in left if own.fullmatch(stem)]
    return sorted(
        (stem for stem in left if stem.startswith(f"{_batch(request.name)}_")), key=lambda stem: own.fullmatch(stem) is None
    )


def _readable(path: Path) -> bool:
    try:
        read_latents(path, FLAG)
    except UserError as error:
        logger.warning("%s Its video is sampled again.", error)
        return False
    return True
