"""Prompts of the samples that training draws (--sample_prompts): a text file with a prompt a line, or TOML, or JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hunyuan_model.sampling.euler import PATCH_PIXELS, latent_size
from utils.cli.arguments import MAX_SEED
from utils.errors import UserError
from utils.files import require_file
from utils.key_values import nearest_name
from utils.toml_files import read_toml

FLAG = "--sample_prompts"
MAX_PROMPTS = 1000  # a file with more is not a list of prompts
SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class SamplePrompt:
    """What one sample shows, and how it is drawn.

    Attributes:
        prompt: the text; the empty text is allowed.
        where: file and line or entry, as messages name it.
        width, height: pixels, multiples of 16.
        frame_count: 4n + 1; 1 is a picture.
        seed: of the noise; None draws a new one for every sample.
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
    """A setting as a key of TOML and JSON and as an option of a line, and the values it may have."""

    key: str
    option: str
    kind: type
    low: float
    high: float


_SETTINGS = (
    _Setting("width", "w", int, PATCH_PIXELS, 8192),
    _Setting("height", "h", int, PATCH_PIXELS, 8192),
    _Setting("frame_count", "f", int, 1, 4097),
    _Setting("seed", "d", int, 0, MAX_SEED),
    _Setting("sample_steps", "s", int, 1, 1000),
    _Setting("guidance_scale", "g", float, 0, 1000),
    _Setting("discrete_flow_shift", "fs", float, 0.01, 1000),
)
PROMPT_OPTIONS = tuple(f"--{setting.option}" for setting in _SETTINGS)  # of a line
_BY_KEY = {setting.key: setting for setting in _SETTINGS}
_BY_OPTION = {setting.option: setting for setting in _SETTINGS}
_KEYS = tuple(field.name for field in fields(SamplePrompt) if field.name != "where")
_FORM = "Write a [[prompts]] table (in JSON, an object in a list) with the key prompt for each."
# What files written for other models hold.
_NO_NEGATIVE = "The model is distilled and takes no negative prompt; remove it."
_FOREIGN_OPTIONS = {"n": _NO_NEGATIVE, "l": "The guidance of this model is --g."}
_FOREIGN_KEYS = {"negative_prompt": _NO_NEGATIVE, "scale": "The guidance of this model is guidance_scale."}

_OPTION = re.compile(r"(?:^|\s)--(?=[^\W\d_])")  # a dash followed by a letter; " -- " and "--1" are text
_NAME_AND_VALUE = re.compile(r"(\w+)(?:\s*=\s*|\s+|$)(.*)", re.DOTALL)
_COMMENT = re.compile(r"(^|\s)#.*", re.DOTALL)
_NUMBERS = {int: re.compile(r"[+-]?[0-9]+"), float: re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")}


def read_sample_prompts(path: str | os.PathLike[str]) -> list[SamplePrompt]:
    """The prompts of a ``.txt``, ``.toml`` or ``.json`` file, in its order.

    A line of text is a prompt with options behind it: ``--w`` and ``--h`` (pixels), ``--f`` (frames), ``--d`` (seed), ``--s``
    (steps), ``--g`` (guidance), ``--fs`` (flow shift). Empty lines and lines that begin with ``#`` are passed over.

    TOML holds ``[[prompts]]`` tables, or defaults in ``[prompt]`` and a ``[[prompt.subset]]`` table for each prompt. JSON
    holds a list of objects or prompt lines, or what TOML holds. Their keys are the attributes of ``SamplePrompt``.

    Raises:
        UserError: names the file, the line or entry, and what to do.
    """
    found = require_file(path, f"{FLAG} file")
    suffix = found.suffix.lower()
    if suffix == ".txt":
        prompts = _prompts_of_text(found)
    elif suffix == ".toml":
        prompts = _prompts_of_tables(read_toml(found, f"{FLAG} file"), found)
    elif suffix == ".json":
        prompts = _prompts_of_tables(_read_json(found), found)
    else:
        raise UserError(f"{FLAG} {found} is neither .txt nor .toml nor .json; its ending says how it is read. Rename it.")
    if not prompts:
        raise UserError(f"{FLAG} {found} holds no prompt. Write one a line, or leave {FLAG} out.")
    if len(prompts) > MAX_PROMPTS:
        raise UserError(f"{FLAG} {found} holds {len(prompts)} prompts; at most {MAX_PROMPTS} can be drawn. Is it the right file?")
    return prompts


def shortened(text: str) -> str:
    """The beginning of a prompt in quotes, on one line, for messages."""
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "...")


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{FLAG} {path} is not UTF-8 text (byte {error.start}). Save it as UTF-8 in your editor.") from error
    except OSError as error:
        raise UserError(f"cannot read {FLAG} {path}: {error.strerror or error}.") from error


def _prompts_of_text(path: Path) -> list[SamplePrompt]:
    lines = re.split(r"\r\n|\r|\n", _read_text(path))  # not splitlines(), which breaks lines that editors do not
    numbered = ((number, line.strip()) for number, line in enumerate(lines, 1))
    return [parse_prompt_line(line, f"{path}, line {number}") for number, line in numbered if line and not line.startswith("#")]


def parse_prompt_line(line: str, where: str) -> SamplePrompt:
    """A prompt with its options: ``a red ball --w 512 --h 320 --f 25 --d 7``.

    Raises:
        UserError: an option that is unknown, given twice, or has no value that it can take; names ``where``.
    """
    return _prompt(_values_of_line(line, where), where)


def _values_of_line(line: str, where: str) -> dict[str, Any]:
    text, *options = _OPTION.split(line)
    values: dict[str, Any] = {"prompt": text.strip()}
    for written in options:
        match = _NAME_AND_VALUE.fullmatch(written)
        if match is None or match[1].lower() not in _BY_OPTION:
            raise UserError(f"{where}: {_unknown_option(written.split()[0])}")
        setting = _BY_OPTION[match[1].lower()]
        if setting.key in values:
            raise UserError(f"{where} has --{setting.option} twice; keep one of them.")
        values[setting.key] = _number_in_line(setting, _COMMENT.sub("", match[2]).strip(), where)
    return values


def _unknown_option(name: str) -> str:
    advice = _FOREIGN_OPTIONS.get(name.lower())
    if advice is None and name.lower() in _BY_KEY:
        advice = f"Write --{_BY_KEY[name.lower()].option}."
    if advice is None:
        advice = f"There are {' '.join(PROMPT_OPTIONS)}; a dash that is part of the text has a blank on both sides."
    return f"--{name} is no option of a prompt line. {advice}"


def _number_in_line(setting: _Setting, text: str, where: str) -> int | float:
    words = text.split()
    if not words:
        raise UserError(f"{where}: --{setting.option} has no value; write --{setting.option} {_default_of(setting)}, say.")
    if not _NUMBERS[setting.kind].fullmatch(words[0]):
        raise UserError(f"{where}: --{setting.option} takes {_kind_of(setting)}, but got {shortened(words[0])}.")
    if len(words) > 1:
        raise UserError(
            f"{where}: there is text behind --{setting.option} {shortened(words[0])} ({shortened(' '.join(words[1:]))}). "
            "Options stand at the end of the line, behind the prompt."
        )
    number = float(words[0])  # also of a number with more digits than int() accepts
    _check_range(setting, number, f"--{setting.option}", where)
    return setting.kind(words[0])


def _read_json(path: Path) -> Any:
    def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            double = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
            raise ValueError(f"the key {double!r} stands twice in one object")
        return entries

    try:
        return json.loads(_read_text(path), object_pairs_hook=without_doubles)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{FLAG} {path} is not valid JSON: {str(error).rstrip('.')}. Mend the file.") from error


def _prompts_of_tables(document: Any, path: Path) -> list[SamplePrompt]:
    entries, defaults = _entries(document, path)
    if not isinstance(entries, list) or not isinstance(defaults, Mapping):
        raise UserError(f"{FLAG} {path} holds no list of prompts. {_FORM}")
    prompts = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}, prompt {number}"
        if isinstance(entry, str):
            prompts.append(_prompt({**defaults, **_values_of_line(entry, where)}, where))
        elif isinstance(entry, Mapping):
            prompts.append(_prompt({**defaults, **entry}, where))
        else:
            raise UserError(f"{where} is {shortened(str(entry))}, not a table with the key prompt. {_FORM}")
    return prompts


def _entries(document: Any, path: Path) -> tuple[Any, Any]:
    """The list of prompts in a document, and what holds for all of them."""
    if isinstance(document, list) or not isinstance(document, Mapping):
        return document, {}
    if not document:
        return [], {}
    if isinstance(document.get("prompt"), str):  # the document is one prompt
        return [document], {}
    unknown = [key for key in document if key not in ("prompt", "prompts")]
    if unknown:
        raise UserError(f"{FLAG} {path}: {unknown[0]!r} does not belong to the top of the file. {_FORM}")
    if len(document) > 1:
        raise UserError(f"{FLAG} {path} has both [prompt] and [[prompts]]; keep one of them.")
    if "prompts" in document:
        return document["prompts"], {}
    table = document["prompt"]
    if not isinstance(table, Mapping):
        return table, {}
    if "subset" not in table:
        return [table], {}
    return table["subset"], {key: value for key, value in table.items() if key != "subset"}


def _prompt(values: Mapping[str, Any], where: str) -> SamplePrompt:
    for key in values:
        if key not in _KEYS:
            advice = _FOREIGN_KEYS.get(key) or f"Known are {', '.join(_KEYS)}.{nearest_name(key, _KEYS)}"
            raise UserError(f"{where}: {key!r} is no key of a prompt. {advice}")
    if "prompt" not in values:
        raise UserError(f"{where} lacks the key prompt; write the text to draw.")
    _check_text(values["prompt"], where)
    checked = {key: _checked_number(_BY_KEY[key], value, where) for key, value in values.items() if key in _BY_KEY}
    prompt = replace(SamplePrompt(values["prompt"].strip(), where), **checked)
    _check_size(prompt)
    return prompt


def _check_text(text: Any, where: str) -> None:
    if not isinstance(text, str):
        raise UserError(f"{where}: prompt must be a text in quotes.")
    odd = next((char for char in text if (ord(char) < 32 and char not in "\t\r\n") or 0xD800 <= ord(char) < 0xE000), None)
    if odd is not None:
        raise UserError(f"{where}: the prompt holds U+{ord(odd):04X}, which is no printable character; remove it.")


def _checked_number(setting: _Setting, value: Any, where: str) -> int | float:
    allowed = int if setting.kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise UserError(f"{where}: {setting.key} must be {_kind_of(setting)}, without quotes.")
    _check_range(setting, value, setting.key, where)
    return setting.kind(value)


def _check_range(setting: _Setting, number: float, name: str, where: str) -> None:
    if not setting.low <= number <= setting.high:  # NaN too
        advice = " Leave it out for a random one." if setting.key == "seed" else ""
        raise UserError(f"{where}: {name} must lie between {setting.low} and {setting.high}.{advice}")


def _check_size(prompt: SamplePrompt) -> None:
    try:
        latent_size(prompt.height, prompt.width, prompt.frame_count)
    except UserError as error:
        raise UserError(f"{prompt.where}: {error}") from error


def _kind_of(setting: _Setting) -> str:
    return "a whole number" if setting.kind is int else "a number"


def _default_of(setting: _Setting) -> int | float:
    default = getattr(SamplePrompt, setting.key)
    return 42 if default is None else default
