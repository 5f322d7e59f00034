"""The forms in which the weights of the blocks' linear layers may be stored."""

from __future__ import annotations

from enum import Enum


class WeightFormat(str, Enum):
    """How the weights of the double and single stream blocks are stored; all other parameters stay in the compute dtype."""

    PLAIN = "plain"
    """The compute dtype."""

    FP8 = "fp8"
    """float8_e4m3fn, a plain cast."""

    FP8_SCALED = "fp8_scaled"
    """float8_e4m3fn codes with scales."""

    INT8 = "int8"
    """int8 codes with a bfloat16 scale for every 64 inputs of a row."""

    @property
    def is_fp8(self) -> bool:
        return self in (WeightFormat.FP8, WeightFormat.FP8_SCALED)
