"""Prompts of the samples while training (--sample_prompts): a text file with a prompt a line, or TOML, or JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hunyuan_model.sampling.flow import PATCH_PIXELS, latent_size
from utils.cli.arguments import MAX_SEED
from utils.errors import UserError, shown
from utils.files import read_text
from utils.key_values import nearest_name
from utils.toml_files import read_toml

FLAG = "--sample_prompts"
SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class SamplePrompt:
    """What one sample shows, and how it is made.

    Attributes:
        prompt: the text; the empty text is allowed.
        where: file and line or entry, as messages name it.
        width, height: pixels, multiples of 16.
        frame_count: 4n + 1; 1 is a picture.
        seed: of the noise; None for one that follows from --seed.
        sample_steps: steps of the sampler.
        guidance_scale: strength of the distilled guidance.
        discrete_flow_shift: shift of the schedule towards noise.
    """

    prompt: str
    where: str
    width: int = 256
    height: int = 256
    frame_count: int = 1
    seed: int | None = None
    sample_steps: int = 20
    guidance_scale: float = 6.0
    discrete_flow_shift: float = 14.5


@dataclass(frozen=True)
class _Setting:
    """A setting as an option of a line and as a key of TOML and JSON, and the values it may have."""

    option: str
    key: str
    kind: type
    low: float
    high: float


_SETTINGS = (
    _Setting("w", "width", int, PATCH_PIXELS, 8192),
    _Setting("h", "height", int, PATCH_PIXELS, 8192),
    _Setting("f", "frame_count", int, 1, 4097),
    _Setting("d", "seed", int, 0, MAX_SEED),
    _Setting("s", "sample_steps", int, 1, 1000),
    _Setting("g", "guidance_scale", float, 0, 1000),
    _Setting("fs", "discrete_flow_shift", float, 0.01, 1000),
)
PROMPT_OPTIONS = tuple(f"--{setting.option}" for setting in _SETTINGS)  # of a line
_KEYS = tuple(field.name for field in fields(SamplePrompt) if field.name != "where")
_KEY_OF_OPTION = {setting.option: setting.key for setting in _SETTINGS}
_FORM = "Write a [[prompts]] table (in JSON, an object in a list) with the key prompt for each."
_NO_NEGATIVE = "The model is distilled and takes no negative prompt; remove it."
_OF_OTHER_MODELS = {  # options and keys
    "n": _NO_NEGATIVE,
    "negative_prompt": _NO_NEGATIVE,
    "l": "The guidance of this model is --g.",
    "scale": "The guidance of this model is guidance_scale.",
}

_OPTION = re.compile(r"(?:^|\s)--(?=[^\W\d_])")  # a dash followed by a letter; " -- " and "--1" are text
_NAME_AND_VALUE = re.compile(r"(\w+)(?:\s*=\s*|\s+|$)(.*)", re.DOTALL)
_COMMENT = re.compile(r"(^|\s)#.*", re.DOTALL)


def read_sample_prompts(path: str | os.PathLike[str]) -> list[SamplePrompt]:
    """The prompts of a ``.txt``, ``.toml`` or ``.json`` file, in its order.

    A line of text is a prompt with options behind it: ``--w`` and ``--h`` (pixels), ``--f`` (frames), ``--d`` (seed), ``--s``
    (steps), ``--g`` (guidance), ``--fs`` (flow shift). Empty lines and lines that begin with ``#`` are passed over.

    TOML holds ``[[prompts]]`` tables, or defaults in ``[prompt]`` and a ``[[prompt.subset]]`` table for each prompt. JSON
    holds a list of objects or prompt lines, or what TOML holds. Their keys are the attributes of ``SamplePrompt``.

    Raises:
        UserError: names the file, the line or entry, and what to do.
    """
    path, what = Path(path), f"{FLAG} file"
    suffix = path.suffix.lower()
    if suffix == ".txt":
        lines = re.split(r"\r\n|\r|\n", read_text(path, what))  # not splitlines(), which breaks lines that editors do not
        numbered = [(f"{path}, line {number}", line.strip()) for number, line in enumerate(lines, 1)]
        prompts = [parse_prompt_line(line, where) for where, line in numbered if line and not line.startswith("#")]
    elif suffix == ".toml":
        prompts = _prompts_of_document(read_toml(path, what), path)
    elif suffix == ".json":
        try:
            document = json.loads(read_text(path, what))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{FLAG} {path} is not valid JSON: {str(error).rstrip('.')}. Correct the file.") from error
        prompts = _prompts_of_document(document, path)
    else:
        raise UserError(f"{FLAG} {path} is neither .txt nor .toml nor .json; its ending decides how it is read. Rename it.")
    if not prompts:
        raise UserError(f"{FLAG} {path} holds no prompt. Write one a line, or leave {FLAG} out.")
    return prompts


def shortened(text: str) -> str:
    """The beginning of a prompt in quotes, on one line, for messages."""
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "...")


def parse_prompt_line(line: str, where: str) -> SamplePrompt:
    """A prompt with its options: ``a red ball --w 512 --h 320 --f 25 --d 7``.

    Raises:
        UserError: an option that is unknown, given twice, or has no value that it can take; names ``where``.
    """
    return _prompt(_values_of_line(line, where), where)


def _values_of_line(line: str, where: str) -> dict[str, Any]:
    """The text and the options of a line by key; numbers are numbers, all else stays text and is refused later."""
    text, *options = _OPTION.split(line)
    values: dict[str, Any] = {"prompt": text.strip()}
    for written in options:
        match = _NAME_AND_VALUE.fullmatch(written)
        option = match[1].lower() if match is not None else ""
        key = _KEY_OF_OPTION.get(option)
        if key is None:
            advice = f"There are {' '.join(PROMPT_OPTIONS)}; a dash that is part of the text has a blank on both sides."
            raise UserError(
                f"{where}: --{written.split()[0]} is no option of a prompt line. {_OF_OTHER_MODELS.get(option, advice)}"
            )
        if key in values:
            raise UserError(f"{where} has --{option} twice; keep one of them.")
        value, *rest = _COMMENT.sub("", match[2]).split() or [""]
        if rest:
            raise UserError(
                f"{where}: there is text behind --{option} {shortened(value)} ({shortened(' '.join(rest))}). "
                "Options stand at the end of the line, behind the prompt."
            )
        values[key] = _number(value)
    return values


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _prompts_of_document(document: Any, path: Path) -> list[SamplePrompt]:
    """The prompts of what TOML or JSON holds, in any of the forms of ``read_sample_prompts``."""
    defaults: dict[str, Any] = {}
    if isinstance(document, Mapping) and document:
        if len(document) > 1 or not document.keys() <= {"prompt", "prompts"}:
            raise UserError(f"{FLAG} {path} holds {', '.join(map(str, document))} outside of its prompts. {_FORM}")
        (document,) = document.values()
        if isinstance(document, Mapping):
            defaults = {key: value for key, value in document.items() if key != "subset"}
            document = document.get("subset")
    if document and not isinstance(document, list):
        raise UserError(f"{FLAG} {path} holds no list of prompts. {_FORM}")
    prompts = []
    for number, entry in enumerate(document or [], 1):
        where = f"{path}, prompt {number}"
        values = _values_of_line(entry, where) if isinstance(entry, str) else entry
        if not isinstance(values, Mapping):
            raise UserError(f"{where} is {shortened(str(entry))}, not a table with the key prompt. {_FORM}")
        prompts.append(_prompt({**defaults, **values}, where))
    return prompts


def _prompt(values: Mapping[str, Any], where: str) -> SamplePrompt:
    for key in values:
        if key not in _KEYS:
            advice = _OF_OTHER_MODELS.get(key) or f"Known are {', '.join(_KEYS)}.{nearest_name(key, _KEYS)}"
            raise UserError(f"{where}: {key!r} is no key of a prompt. {advice}")
    text = values.get("prompt")
    if not isinstance(text, str):
        raise UserError(f"{where} needs the key prompt, a text in quotes.")
    try:
        text.encode()
    except UnicodeEncodeError:  # "\ud800" is legal JSON, but no text
        raise UserError(f"{where} holds half of a surrogate pair; write the character itself, in UTF-8.") from None
    numbers = {setting.key: _checked(setting, values[setting.key], where) for setting in _SETTINGS if setting.key in values}
    prompt = SamplePrompt(text.strip(), where, **numbers)
    try:
        latent_size(prompt.height, prompt.width, prompt.frame_count)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return prompt


def _checked(setting: _Setting, value: Any, where: str) -> int | float:
    allowed = int if setting.kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not setting.low <= value <= setting.high:  # NaN too
        kind = "a whole number" if setting.kind is int else "a number"
        raise UserError(
            f"{where}: {setting.key} (--{setting.option}) must be {kind} from {setting.low} to {setting.high}, "
            f"but it is {shown(value)}."
        )
    return setting.kind(value)
