"""What an earlier run has left of a batch (--skip_existing): results, and latents that were not decoded."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
        seeds: requests as they were asked for, and with the random seed that their results were made with.
    """

    done: list[tuple[Request, str]] = field(default_factory=list)
    waiting: list[Sampled] = field(default_factory=list)
    wanted: list[Request] = field(default_factory=list)
    seeds: dict[Request, Request] = field(default_factory=dict)


@dataclass(frozen=True)
class _Left:
    """The files of one stem by their endings, and what each says of itself, where that is read."""

    files: Mapping[str, Path]
    metadata: Mapping[str, Mapping[str, str]]

    def identity(self, ending: str) -> str | None:
        return identity(self.metadata[ending]) if ending in self.metadata else None

    def seed(self, ending: str) -> int | None:
        settings = settings_of(self.metadata.get(ending, {}))
        seed = settings["flags"].get("seed") if settings else None
        return seed if isinstance(seed, int) else None


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

        def same(stem: str, ending: str, own: str | None = own) -> bool:
            if by_name or ending not in left[stem].files:
                return ending in left[stem].files
            return left[stem].identity(ending) == own is not None and shared in (None, left[stem].seed(ending))

        done = next((stem for stem in stems if all(same(stem, ending) for ending in wanted)), None)
        if done is not None:
            used.add(done)
            request = found.seeds[asked] = _with_seed(request, left[done].seed(wanted[0]))
            found.done.append((request, done))
            if LATENT_ENDING not in wanted and not by_name and same(done, LATENT_ENDING) and _disposable(left[done]):
                left[done].files[LATENT_ENDING].unlink()
            continue
        waiting = next((stem for stem in stems if same(stem, LATENT_ENDING) and _readable(left[stem])), None)
        if waiting is None:
            found.seeds[asked] = request
            found.wanted.append(request)
            continue
        used.add(waiting)
        request = found.seeds[asked] = _with_seed(request, left[waiting].seed(LATENT_ENDING))
        of_stem = left[waiting]
        disposable = not output.keeps_latents and not by_name and _disposable(of_stem)
        known = with_flags(of_stem.metadata.get(LATENT_ENDING, {}), {"output_type": output.output_type})
        found.waiting.append(Sampled(request, waiting, of_stem.files[LATENT_ENDING], disposable, known))
    counts = f"{len(found.done)} of {len(requests)} are there already"
    latents = f", {len(found.waiting)} are sampled and only decoded" if found.waiting else ""
    logger.info("%s%s: %s%s", FLAG, " by name, as there is no metadata" if by_name else "", counts, latents)
    return found


def _with_seed(request: Request, seed: int | None) -> Request:
    """With the random seed of its earlier result, if that is known."""
    return request if request.seed_given or seed is None else request.changed({"seed": seed, "seed_given": False})


def _shared_seed(
    requests: Sequence[Request], left: Mapping[str, _Left], metadata: Callable[[Request], Mapping[str, str]]
) -> int | None:
    """That of the first earlier result of requests that share a random seed."""
    if len(requests) < 2 or any(request.seed_given for request in requests) or len({r.sampling.seed for r in requests}) > 1:
        return None
    for request in requests:
        own = identity(metadata(request))
        for stem in _candidates(left, request, by_name=False):
            for ending in left[stem].metadata:
                if left[stem].identity(ending) == own is not None:
                    return left[stem].seed(ending)
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


def _files_left(output: OutputSettings, read: bool) -> dict[str, _Left]:
    """By stem, in the order of names."""
    files: dict[str, dict[str, Path]] = {}
    folder = Path(output.save_path)
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    for path in (folder / name for name in names):
        for ending in {*ENDINGS[output.output_type], LATENT_ENDING}:
            fits = path.name.endswith(ending) if ending else (path / PICTURE).is_file()
            if fits and not is_temporary(path):
                files.setdefault(path.name[: len(path.name) - len(ending)], {})[ending] = path
    return {stem: _Left(found, dict(_read(found)) if read else {}) for stem, found in files.items()}


def _read(files: Mapping[str, Path]) -> Iterator[tuple[str, Mapping[str, str]]]:
    for ending, path in files.items():
        with suppress(UserError):  # some other file, which is not in the way
            yield ending, read_media_metadata(path, FLAG)


def _candidates(left: Mapping[str, _Left], request: Request, by_name: bool) -> list[str]:
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


def _disposable(left: _Left) -> bool:
    """Whether its latents were made to be decoded, and not to be kept."""
    settings = settings_of(left.metadata.get(LATENT_ENDING, {}))
    kind = settings["flags"].get("output_type", OutputSettings.output_type) if settings else None
    return kind in ENDINGS and LATENT_ENDING not in ENDINGS[kind]


def _readable(left: _Left) -> bool:
    try:
        read_latents(left.files[LATENT_ENDING], FLAG)
    except UserError as error:
        logger.warning("%s Its video is sampled again.", error)
        return False
    return True
