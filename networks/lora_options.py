"""The arguments of our LoRA (--network_args), and which layers they choose."""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from utils.errors import UserError, first_line, name_some, shown
from utils.key_values import nearest_name
from utils.processes.children import call_in_child

EXCLUDED_BY_DEFAULT = r".*(img_mod|txt_mod|modulation).*"
MATCHING_SECONDS = 10.0


@dataclass(frozen=True)
class LoraOptions:
    """The arguments of the network, see ``LoRAModule`` for the dropouts.

    Attributes:
        exclude_patterns, include_patterns: regular expressions for whole paths of layers; the second win.
        loraplus_lr_ratio: 0 is without LoRA+.
        dropout: of neurons.
        verbose: log every layer.
    """

    exclude_patterns: Sequence[str] = ()
    include_patterns: Sequence[str] = ()
    loraplus_lr_ratio: float | None = None
    dropout: float | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None
    verbose: bool = False

    @classmethod
    def of(cls, network_args: Mapping[str, Any], neuron_dropout: float | None = None) -> LoraOptions:
        """From typed values or the text of --network_args; a UserError names what is unknown or malformed."""
        known = [field.name for field in fields(cls)]
        values = {}
        for name, value in network_args.items():
            if name not in known:
                raise UserError(
                    f"--network_args: networks.lora has no argument {name!r}.{nearest_name(name, known)} Known: {', '.join(known)}."
                )
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # patterns are full of \. and the like, which Python frowns upon
                    values[name] = ast.literal_eval(value) if isinstance(value, str) else value
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                raise UserError(
                    f"--network_args {name} must be a Python literal such as 0.1, True or ['.*single_blocks.*'], "
                    f"but it is {shown(value)}."
                ) from None
        if neuron_dropout is not None:
            values["dropout"] = neuron_dropout
        return cls(**values)

    def __post_init__(self) -> None:
        for name in ("exclude_patterns", "include_patterns"):
            patterns = getattr(self, name)
            try:
                if isinstance(patterns, str):
                    raise TypeError("it is a text")
                for pattern in patterns:
                    re.compile(pattern)
            except (
                TypeError,
                re.error,
                OverflowError,
                RecursionError,
            ) as error:  # the last two for counts and depths beyond reason
                raise UserError(
                    f"--network_args {name} must be a list of regular expressions such as ['.*img_mlp.*'], "
                    f"but it is {shown(patterns)} ({first_line(error)})."
                ) from None
        for name in ("loraplus_lr_ratio", "dropout", "rank_dropout", "module_dropout"):
            value, limit = getattr(self, name), math.inf if name == "loraplus_lr_ratio" else 1
            if value is not None and not (type(value) in (int, float) and 0 <= value < limit):
                raise UserError(f"--network_args {name} must be a number from 0 to below {limit}, but it is {shown(value)}.")

    def chosen(self, paths: Sequence[str]) -> set[str]:
        """Those of the linear layers at ``paths`` that get a LoRA.

        Raises:
            UserError: a pattern takes too long.
        """
        given = [*self.include_patterns, *self.exclude_patterns]
        matches = _matches(given, paths) if given else []
        included, excluded = (
            set().union(*part) for part in (matches[: len(self.include_patterns)], matches[len(self.include_patterns) :])
        )
        return {path for path in paths if path in included or not (path in excluded or re.fullmatch(EXCLUDED_BY_DEFAULT, path))}


def _matches(patterns: Sequence[str], paths: Sequence[str]) -> list[set[str]]:
    """The paths that each pattern matches as a whole. With some patterns ``re`` would not return, and nothing can interrupt it."""
    code = "import re\nresult = [[path for path in argument[1] if re.fullmatch(pattern, path)] for pattern in argument[0]]"
    try:
        return [set(matched) for matched in call_in_child(code, [patterns, paths], MATCHING_SECONDS)]
    except TimeoutError as error:
        raise UserError(
            f"--network_args exclude_patterns and include_patterns cannot be matched ({error}): {name_some(map(shown, patterns))}. "
            "A repeat inside a repeat, such as (a+)+, does that; simplify them."
        ) from None
