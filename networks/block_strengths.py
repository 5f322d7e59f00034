"""How strong LoRA are in each block of the transformer: ``double=1``, ``single=0.5``, ``double.0-4,7=0``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hunyuan_model.transformer.config import TransformerConfig
from utils.errors import UserError, shown
from utils.key_values import nearest_name

FLAG = "--lora_block_multiplier"
PREFIXES = {"double": "double_blocks.", "single": "single_blocks."}
OTHER = "other"  # everything outside of the blocks: embedders, the final layer
_PLACE = re.compile(r"(\w+)(?:\.([\d,-]+))?")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class BlockStrengths:
    """Factors of a LoRA's multiplier by place, from ``parse``. Without any, every place has 1.

    Attributes:
        factors: (double, single or other; numbers of blocks or None for all; factor); the last that fits a parameter counts.
    """

    factors: tuple[tuple[str, frozenset[int] | None, float], ...] = ()

    @classmethod
    def parse(cls, words: Sequence[str], config: TransformerConfig, exclude_single_blocks: bool = False) -> BlockStrengths:
        """Read ``PLACE=FACTOR`` words.

        Raises:
            UserError: a place that the model has not, or a factor that is no number; names the word.
        """
        counts = {"double": config.double_depth, "single": config.single_depth, OTHER: 0}
        factors = [_entry(word, counts) for word in words]
        if exclude_single_blocks:
            factors.append(("single", None, 0.0))
        return cls(tuple(factors))

    def of(self, parameter: str) -> float:
        """The factor for a parameter by its official name, such as ``double_blocks.0.img_attn_qkv.weight``."""
        place = next((name for name, prefix in PREFIXES.items() if parameter.startswith(prefix)), OTHER)
        number = int(parameter.split(".")[1]) if place in PREFIXES else None
        fitting = (factor for name, numbers, factor in self.factors if name == place and (numbers is None or number in numbers))
        return ([1.0, *fitting])[-1]


def _entry(word: str, counts: dict[str, int]) -> tuple[str, frozenset[int] | None, float]:
    place, equals, factor = word.partition("=")
    match = _PLACE.fullmatch(place)
    if not equals or match is None:
        raise UserError(f"{FLAG} takes words such as double=0.5 or single.0-9,12=0, but got {shown(word)}.")
    if match[1] not in counts:
        raise UserError(f"{FLAG} {word}: there are {', '.join(counts)}.{nearest_name(match[1], counts)}")
    try:
        value = float(factor)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise UserError(f"{FLAG} {word}: {shown(factor)} is no finite number.")
    return match[1], None if match[2] is None else _numbers(match[2], word, match[1], counts[match[1]]), value


def _numbers(text: str, word: str, place: str, count: int) -> frozenset[int]:
    numbers: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < count:
            has = f"0 to {count - 1}" if count else "no numbers"
            raise UserError(f"{FLAG} {word}: {part} is no block of this model, whose {place} blocks have {has}.")
        numbers.update(range(first, last + 1))
    return frozenset(numbers)


EVERYWHERE = BlockStrengths()
