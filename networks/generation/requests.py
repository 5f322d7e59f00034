"""One result of a run of generation: what is asked for, from flags, a prompt file, a comparison or a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from hunyuan_model.sampling.generation import SamplingSettings
from utils.errors import UserError, name_some
from utils.processes.ranks import Ranks, split_by_cost

TIME = "%Y%m%d-%H%M%S"  # in names
START_FIELDS = ("image_path", "video_path", "latent_path")
SAMPLING_FIELDS = frozenset(field.name for field in fields(SamplingSettings))


@dataclass(frozen=True)
class Request:
    """One video or picture; the fields have the names of flags, or of those of ``sampling``.

    Attributes:
        negative_prompt: None stands for the empty text.
        lora_multiplier: one for each LoRA file of the run.
        image_path, video_path, latent_path: what to start from; at most one of them.
        name: the beginning of its files' names; None for the time.
        seed_given: whether somebody chose the seed.
        where: line of a file or cell of a comparison, as messages name it; empty for the command line.
    """

    prompt: str
    sampling: SamplingSettings
    negative_prompt: str | None = None
    lora_multiplier: tuple[float, ...] = ()
    image_path: str | None = None
    video_path: str | None = None
    latent_path: str | None = None
    name: str | None = None
    seed_given: bool = True
    where: str = ""

    def __post_init__(self) -> None:
        given = [f"--{name}" for name in START_FIELDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are both what to start from; give one of them.")

    @property
    def start(self) -> str | None:
        """The path of what to start from."""
        return self.image_path or self.video_path or self.latent_path

    @property
    def texts(self) -> tuple[str, ...]:
        """What has to be encoded: the prompt, and the negative one where it is used."""
        return (self.prompt, self.negative_prompt or "") if self.sampling.guided else (self.prompt,)

    @property
    def stem(self) -> str:
        """Of its files' names, where nothing has that name yet."""
        return f"{self.name or time.strftime(TIME)}_{self.sampling.seed}"

    @property
    def cost(self) -> int:
        """Latent pixels that the transformer computes, over all of its steps; guided ones count twice."""
        steps = self.sampling.steps_from(self.start)
        guided = len(set(steps).intersection(self.sampling.guided_steps))
        return math.prod(self.sampling.latent_size) * max(len(steps) + guided, 1)

    def metadata(self) -> dict[str, str]:
        """Texts and settings for the metadata of files."""
        negative = {"negative_prompt": self.negative_prompt or ""} if self.sampling.guided else {}
        return {"prompt": self.prompt, **negative, **self.sampling.metadata()}

    def __str__(self) -> str:
        return self.where or "the video"

    def changed(self, values: Mapping[str, Any], where: str = "") -> Request:
        """With other values, by the names of flags; ``height`` and ``width`` stand for the parts of ``video_size``.

        Raises:
            UserError: a video that cannot be sampled; names ``where``.
        """
        values, where = dict(values), where or self.where
        height, width = self.sampling.video_size
        if "height" in values or "width" in values:
            values["video_size"] = (values.pop("height", height), values.pop("width", width))
        if not values.keys().isdisjoint(START_FIELDS):
            values = {**dict.fromkeys(START_FIELDS), **values}
        values.setdefault("seed_given", self.seed_given or "seed" in values)
        sampling = {name: values.pop(name) for name in SAMPLING_FIELDS & values.keys()}
        try:
            return replace(self, sampling=replace(self.sampling, **sampling), where=where, **values)
        except UserError as error:
            raise UserError(f"{where}: {error}" if where else str(error)) from error


def share_of(requests: Sequence[Request], ranks: Ranks) -> list[Request]:
    """Those that this process samples. Whose files would have one name stay together: they are numbered in their order."""
    named: dict[str, list[int]] = {}
    for position, request in enumerate(requests):
        named.setdefault(request.stem, []).append(position)
    groups = list(named.values())
    costs = [sum(requests[position].cost for position in group) for group in groups]
    own = split_by_cost(costs, ranks.count)[ranks.index]
    return [requests[position] for position in sorted(position for group in own for position in groups[group])]


def without_effect(requests: Sequence[Request]) -> list[str]:
    """A sentence on each setting of guidance, and on strengths, that some of the requests have and do not use."""
    default, found = SamplingSettings(seed=0), []
    given = {
        "--negative_prompt": lambda request: request.negative_prompt is not None,
        "--guidance_range": lambda request: request.sampling.guidance_range != default.guidance_range,
        "--split_uncond": lambda request: request.sampling.split_uncond,
    }
    for flag, is_given in given.items():
        if unused := [request.where for request in requests if is_given(request) and not request.sampling.guided]:
            where, how = (f"{name_some(unused)}: ", "--l") if all(unused) else ("", "--guidance_scale")
            found.append(f"{where}{flag} has no effect without classifier-free guidance; give {how} 4, for example.")
    unused = [request.where for request in requests if request.sampling.strength != default.strength and not request.start]
    if unused:
        where = f"{name_some(unused)}: " if all(unused) else ""
        found.append(f"{where}--strength has no effect without --image_path, --video_path or --latent_path.")
    return found
