"""What PEFT stores about an adapter beside its tensors: the ranks and alphas that the tensors do not tell."""

from __future__ import annotations

import functools
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from utils.errors import UserError, shown
from utils.files import read_text

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_METADATA = "lora_adapter_metadata"
LONGEST_MODULE, MATCHING_SECONDS = 200, 10.0  # longer names, and more time in all, only files have that are made to take for ever
_REPEAT = re.compile(r"[*+{]|(?<!\()\?")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_FLAGS = re.compile(r"\(\?[a-zA-Z-]*[aiLmsux]")  # with x, blanks may stand before a repeat


@dataclass(frozen=True)
class PeftConfig:
    """The part of a PEFT configuration that says how strong an adapter is.

    Attributes:
        source: the file, for messages.
        rank: of modules that no pattern matches.
        alpha: likewise; None where the configuration says nothing, and an update counts as it is.
        rank_patterns, alpha_patterns: regular expressions that end a module's path -> value; the first counts.
        rank_stabilised: alpha is divided by the root of the rank (rsLoRA, arXiv 2312.03732).
    """

    source: str = ""
    rank: int | None = None
    alpha: float | None = None
    rank_patterns: Mapping[str, int] = field(default_factory=dict)
    alpha_patterns: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    _spent: list[float] = field(default_factory=lambda: [0.0], repr=False, compare=False)  # seconds of matching

    def __post_init__(self) -> None:
        patterns = {**self.rank_patterns, **self.alpha_patterns}
        for pattern in patterns:
            try:
                _ending(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise self._unusable(f"{shown(pattern)} is no regular expression ({error})") from None
            if _FLAGS.search(pattern):
                raise self._unusable(f"the regular expression {shown(pattern)} has flags, which are not read here")
            if _REPEATED_GROUP.search(pattern) or len(_REPEAT.findall(pattern)) > 3:
                raise self._unusable(f"the regular expression {shown(pattern)} may take forever")
        for value in (self.rank, *self.rank_patterns.values()):
            if value is not None and (type(value) is not int or not 0 < value < 2**31):
                raise self._unusable(f"{shown(value)} is no rank")
        for value in (self.alpha, *self.alpha_patterns.values()):
            if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
                raise self._unusable(f"{shown(value)} is no alpha")

    def _unusable(self, what: str) -> UserError:
        return UserError(f"the PEFT configuration of {self.source} cannot be used: {what}. Copy it again.")

    def alpha_of(self, module: str, rank: int) -> float:
        """The alpha of a module with this path and rank, to be divided by the rank."""
        alpha = self._matching(self.alpha_patterns, module, self.alpha)
        return float(rank) if alpha is None else alpha * (math.sqrt(rank) if self.rank_stabilised else 1.0)

    def scale_without_rank(self, module: str) -> float:
        """What multiplies an update whose factors have no rank: here PEFT divides by the rank that was asked for."""
        rank = self._matching(self.rank_patterns, module, self.rank)
        return 1.0 if rank is None else self.alpha_of(module, rank) / rank

    def _matching(self, patterns: Mapping[str, float], module: str, otherwise: float | None) -> float | None:
        if patterns and len(module) > LONGEST_MODULE:
            raise self._unusable(f"it has patterns, and the name of the module {shown(module)} is too long for them")
        began = time.monotonic()
        for pattern, value in patterns.items():
            found = _ending(pattern).match(module)
            if self._spent[0] + time.monotonic() - began > MATCHING_SECONDS:
                raise self._unusable(f"its regular expressions take longer than {MATCHING_SECONDS:g} seconds")
            if found:
                otherwise = value
                break
        self._spent[0] += time.monotonic() - began
        return otherwise


@functools.cache  # that of ``re`` has room for 512, and there may be one for each layer
def _ending(pattern: str) -> re.Pattern[str]:
    """What matches a module whose path ends with what ``pattern`` matches, as PEFT looks it up."""
    return re.compile(rf"(.*\.)?({pattern})$")


def peft_config(path: Path, metadata: Mapping[str, str]) -> PeftConfig:
    """What is stored about the adapter in ``path``: in its header, as diffusers does, or in the file beside it.

    Raises:
        UserError: it cannot be read or used.
    """
    beside = path.with_name(PEFT_CONFIG)
    try:
        if PEFT_METADATA in metadata:
            stored = json.loads(metadata[PEFT_METADATA])
            stored = {key.removeprefix("transformer."): value for key, value in stored.items()}
        elif path.name == PEFT_FILE and beside.is_file():
            stored = json.loads(read_text(beside, "the PEFT configuration"))
        else:
            return PeftConfig(str(path))
        return PeftConfig(
            str(path),
            stored.get("r"),
            stored.get("lora_alpha", stored.get("alpha")),
            dict(stored.get("rank_pattern") or {}),
            dict(stored.get("alpha_pattern") or {}),
            bool(stored.get("use_rslora")),
        )
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"the PEFT configuration of {path} cannot be read ({error}). Copy it again.") from error
