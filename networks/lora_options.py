"""The --network_args of networks.lora, read from text or from typed values."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping
from typing import Any

from utils.errors import UserError, first_line, shown
from utils.key_values import nearest_name

EXCLUDED_BY_DEFAULT = r".*(img_mod|txt_mod|modulation).*"


class NetworkOptions:
    """The arguments checked and typed: ``loraplus_lr_ratio``, the three dropouts, ``verbose``, and which layers are taken.

    Raises:
        UserError: an unknown or malformed argument.
    """

    NAMES = ("exclude_patterns", "include_patterns", "loraplus_lr_ratio", "rank_dropout", "module_dropout", "dropout", "verbose")

    def __init__(self, network_args: Mapping[str, Any], neuron_dropout: float | None):
        for name in network_args:
            if name not in self.NAMES:
                raise UserError(
                    f"networks.lora has no argument {name!r} (--network_args).{nearest_name(name, self.NAMES)} "
                    f"Known: {', '.join(self.NAMES)}."
                )
        values = {name: _literal(name, value) for name, value in network_args.items()}
        self.exclude = [re.compile(EXCLUDED_BY_DEFAULT), *_patterns("exclude_patterns", values)]
        self.include = _patterns("include_patterns", values)
        self.has_patterns = bool(values.get("exclude_patterns") or values.get("include_patterns"))
        self.loraplus_lr_ratio = _number("loraplus_lr_ratio", values.get("loraplus_lr_ratio"), high=float("inf"))
        self.rank_dropout = _number("rank_dropout", values.get("rank_dropout"))
        self.module_dropout = _number("module_dropout", values.get("module_dropout"))
        self.neuron_dropout = _number("network_dropout", values.get("dropout") if neuron_dropout is None else neuron_dropout)
        self.verbose = bool(values.get("verbose", False))

    def takes(self, path: str) -> bool:
        """Whether the linear layer at ``path`` gets a LoRA: include_patterns win over exclude_patterns."""
        excluded = any(pattern.fullmatch(path) for pattern in self.exclude)
        return not excluded or any(pattern.fullmatch(path) for pattern in self.include)


def _literal(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # patterns are full of \. and the like, which Python frowns upon
            return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        example = "['.*single_blocks.*']" if name.endswith("patterns") else "True" if name == "verbose" else "0.1"
        raise UserError(f"--network_args {name} must be a Python literal such as {example}, but it is {shown(value)}.") from None


def _patterns(name: str, values: Mapping[str, Any]) -> list[re.Pattern[str]]:
    texts = values.get(name) or []
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"--network_args {name} must be a list of regular expressions such as ['.*img_mlp.*'], but it is {shown(texts)}."
        )
    return [_pattern(name, text) for text in texts]


def _pattern(name: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:  # the last two for counts and depths beyond reason
        raise UserError(f"--network_args {name}: {shown(text)} is not a regular expression ({first_line(error)}).") from None


def _number(name: str, value: Any, high: float = 1.0) -> float | None:
    """A probability below 1, or with ``high`` infinite any positive number."""
    if value is None:
        return None
    positive = high == float("inf")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < high or (positive and value == 0):
        limit = "a positive number" if positive else "a number from 0 to below 1"
        raise UserError(f"{name} of the LoRA must be {limit}, but it is {shown(value)}.")
    return float(value)
