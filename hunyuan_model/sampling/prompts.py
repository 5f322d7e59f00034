"""Prompts with their settings: a text file with a prompt a line, or TOML, or JSON; and single lines of a terminal.

The options of a line are those of sd-scripts (https://github.com/kohya-ss/sd-scripts).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hunyuan_model.sampling.flow import PATCH_PIXELS
from utils.cli.arguments import MAX_SEED
from utils.errors import UserError, shown
from utils.files import read_text
from utils.key_values import nearest_name
from utils.toml_files import read_toml

SHOWN_CHARACTERS = 40
PROMPT_FILE_ENDINGS = (".txt", ".toml", ".json")


@dataclass(frozen=True)
class PromptSetting:
    """What a prompt may say besides its text, and the values that this may have.

    Attributes:
        option: of a line.
        key: of TOML and JSON.
        flag: of generation, where ``height`` and ``width`` stand for the parts of --video_size.
        kind: int, float, str, or tuple for several floats.
    """

    option: str
    key: str
    flag: str
    kind: type
    low: float = -math.inf
    high: float = math.inf


PROMPT_SETTINGS = (
    PromptSetting("w", "width", "width", int, PATCH_PIXELS, 8192),
    PromptSetting("h", "height", "height", int, PATCH_PIXELS, 8192),
    PromptSetting("f", "frame_count", "video_length", int, 1, 4097),
    PromptSetting("d", "seed", "seed", int, 0, MAX_SEED),
    PromptSetting("s", "sample_steps", "infer_steps", int, 1, 1000),
    PromptSetting("g", "guidance_scale", "embedded_cfg_scale", float, 0, 1000),
    PromptSetting("fs", "discrete_flow_shift", "flow_shift", float, 0.01, 1000),
    PromptSetting("n", "negative_prompt", "negative_prompt", str),
    PromptSetting("l", "scale", "guidance_scale", float, 0, 1000),
    PromptSetting("am", "lora_multiplier", "lora_multiplier", tuple, -1000, 1000),
    PromptSetting("i", "image_path", "image_path", str),
    PromptSetting("v", "video_path", "video_path", str),
    PromptSetting("t", "strength", "strength", float, 0, 1),
    PromptSetting("step_cache", "step_cache", "step_cache", float, 0, 1000),
)
PROMPT_OPTIONS = tuple(f"--{setting.option}" for setting in PROMPT_SETTINGS)
_OF_OPTION = {setting.option: setting for setting in PROMPT_SETTINGS}
_OF_KEY = {setting.key: setting for setting in PROMPT_SETTINGS}
_STARTS = {"image_path", "video_path"}
_FORM = "Write a [[prompts]] table (in JSON, an object in a list) with the key prompt for each."

_OPTION = re.compile(r"(?:^|\s)--(?=[^\W\d_])")  # a dash followed by a letter; " -- " and "--1" are text
_NAME_AND_VALUE = re.compile(r"(\w+)(?:\s*=\s*|\s+|$)(.*)", re.DOTALL)
_COMMENT = re.compile(r"(^|\s)#.*", re.DOTALL)


@dataclass(frozen=True)
class PromptEntry:
    """A prompt of a file or a terminal.

    Attributes:
        prompt: the text; it may be empty.
        where: file and line or entry, as messages name it.
        values: what it says besides, by the names of flags as in ``PromptSetting``.
    """

    prompt: str
    where: str
    values: Mapping[str, Any]


def read_prompts(path: str | os.PathLike[str], flag: str) -> list[PromptEntry]:
    """The prompts of a ``.txt``, ``.toml`` or ``.json`` file, in its order.

    A line of text is a prompt with the options of ``PROMPT_SETTINGS`` behind it. Empty lines and lines that begin with ``#`` are
    passed over. TOML holds ``[[prompts]]`` tables, or defaults in ``[prompt]`` and a ``[[prompt.subset]]`` table for each prompt.
    JSON holds a list of objects or prompt lines, or what TOML holds. Their keys are those of ``PROMPT_SETTINGS``, and ``prompt``.

    Raises:
        UserError: names ``flag``, the file, the line or entry, and what to do.
    """
    path, what = Path(path), f"{flag} file"
    suffix = path.suffix.lower()
    if suffix == ".txt":
        lines = re.split(r"\r\n|\r|\n", read_text(path, what))  # not splitlines(), which breaks lines that editors do not
        numbered = [(f"{path}, line {number}", line.strip()) for number, line in enumerate(lines, 1)]
        prompts = [parse_prompt_line(line, where) for where, line in numbered if line and not line.startswith("#")]
    elif suffix == ".toml":
        prompts = _prompts_of_document(read_toml(path, what), path, flag)
    elif suffix == ".json":
        try:
            document = json.loads(read_text(path, what))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{flag} {path} is not valid JSON: {str(error).rstrip('.')}. Correct the file.") from error
        prompts = _prompts_of_document(document, path, flag)
    else:
        raise UserError(f"{flag} {path} is neither .txt nor .toml nor .json; its ending decides how it is read. Rename it.")
    if not prompts:
        raise UserError(f"{flag} {path} holds no prompt. Write one a line, or leave {flag} out.")
    return prompts


def shortened(text: str) -> str:
    """The beginning of a prompt in quotes, on one line, for messages."""
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "...")


def parse_prompt_line(line: str, where: str) -> PromptEntry:
    """A prompt with its options: ``a red ball --w 512 --h 320 --f 25 --d 7 --n blurred, dark --l 4 --am 0.5,1``.

    Raises:
        UserError: an option that is unknown, given twice, or has no value that it can take; names ``where``.
    """
    return _entry(_values_of_line(line, where), where)


def options_within(text: str) -> list[PromptSetting]:
    """The settings whose options stand in ``text``, as in a prompt line."""
    names = (_NAME_AND_VALUE.fullmatch(written) for written in _OPTION.split(text)[1:])
    return [_OF_OPTION[match[1].lower()] for match in names if match is not None and match[1].lower() in _OF_OPTION]


def _values_of_line(line: str, where: str) -> dict[str, Any]:
    """The text and the options of a line by key; numbers are numbers, all else stays text and is refused later."""
    text, *options = _OPTION.split(line)
    values: dict[str, Any] = {"prompt": text.strip()}
    for written in options:
        match = _NAME_AND_VALUE.fullmatch(written)
        setting = _OF_OPTION.get(match[1].lower()) if match is not None else None
        if setting is None:
            raise UserError(f"{where}: {_unknown_option(written.split()[0])}")
        if setting.key in values:
            raise UserError(f"{where} has --{setting.option} twice; keep one of them.")
        value = _COMMENT.sub("", match[2]).strip()
        if setting.kind is tuple:
            values[setting.key] = [_number(word) for word in value.replace(",", " ").split()]
        else:
            values[setting.key] = value if setting.kind is str else _single_number(setting, value, where)
    return values


def _unknown_option(name: str) -> str:
    names = {name: setting.option for setting in PROMPT_SETTINGS for name in (setting.flag, setting.key, setting.option)}
    found = re.search(r"'(.*)'", nearest_name(name.lower(), names))
    nearest = f" Did you mean --{names[found[1]]}?" if found else ""
    return (
        f"--{name} is no option of a prompt line.{nearest} There are {' '.join(PROMPT_OPTIONS)}; "
        "a dash that is part of the text has a blank on both sides."
    )


def _single_number(setting: PromptSetting, value: str, where: str) -> int | float | str:
    word, *rest = value.split() or [""]
    if rest:
        raise UserError(
            f"{where}: there is text behind --{setting.option} {shortened(word)} ({shortened(' '.join(rest))}). "
            "Options stand at the end of the line, behind the prompt."
        )
    return _number(word)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _prompts_of_document(document: Any, path: Path, flag: str) -> list[PromptEntry]:
    """The prompts of what TOML or JSON holds, in any of the forms of ``read_prompts``."""
    defaults: dict[str, Any] = {}
    if isinstance(document, Mapping) and document:
        if len(document) > 1 or not document.keys() <= {"prompt", "prompts"}:
            raise UserError(f"{flag} {path} holds {', '.join(map(str, document))} outside of its prompts. {_FORM}")
        (document,) = document.values()
        if isinstance(document, Mapping):
            defaults = {key: value for key, value in document.items() if key != "subset"}
            document = document.get("subset")
    if document and not isinstance(document, list):
        raise UserError(f"{flag} {path} holds no list of prompts. {_FORM}")
    prompts = []
    for number, entry in enumerate(document or [], 1):
        where = f"{path}, prompt {number}"
        values = _values_of_line(entry, where) if isinstance(entry, str) else entry
        if not isinstance(values, Mapping):
            raise UserError(f"{where} is {shortened(str(entry))}, not a table with the key prompt. {_FORM}")
        replaced = _STARTS if _STARTS & values.keys() else set()  # by a start of its own
        inherited = {key: value for key, value in defaults.items() if key not in replaced}
        prompts.append(_entry({**inherited, **values}, where))
    return prompts


def _entry(values: Mapping[str, Any], where: str) -> PromptEntry:
    """From what a line or table says, by key."""
    for key in values:
        if key not in _OF_KEY and key != "prompt":
            flags = {setting.flag: setting.key for setting in PROMPT_SETTINGS}
            hint = f" Did you mean {flags[key]!r}?" if key in flags else nearest_name(key, ("prompt", *_OF_KEY))
            raise UserError(f"{where}: {key!r} is no key of a prompt. Known are prompt, {', '.join(_OF_KEY)}.{hint}")
    if not isinstance(values.get("prompt"), str):
        raise UserError(f"{where} needs the key prompt, a text in quotes.")
    _check_text(values["prompt"], where)
    if options := options_within(values["prompt"]):
        keys = ", ".join(option.key for option in options)
        raise UserError(f"{where}: the prompt holds --{options[0].option}, which would be read as words; use the key(s) {keys}.")
    if len(_STARTS & values.keys()) > 1:
        raise UserError(f"{where} starts from a picture (--i) and from a video (--v); keep one of them.")
    settings = {_OF_KEY[key].flag: _checked(_OF_KEY[key], value, where) for key, value in values.items() if key != "prompt"}
    return PromptEntry(values["prompt"].strip(), where, settings)


def _checked(setting: PromptSetting, value: Any, where: str) -> Any:
    """The value in the setting's own type."""
    name = f"{setting.key} (--{setting.option})"
    if setting.kind is str:
        if not isinstance(value, str) or not (value.strip() or setting.flag == "negative_prompt"):
            raise UserError(f"{where}: {name} must be a text, but it is {shown(value)}.")
        _check_text(value, where)
        return value.strip()
    numbers = value if setting.kind is tuple and isinstance(value, list) else [value]
    allowed = int if setting.kind is int else (int, float)
    for number in numbers or [""]:
        if isinstance(number, bool) or not isinstance(number, allowed) or not setting.low <= number <= setting.high:  # NaN too
            kind = {int: "a whole number", float: "a number", tuple: "one or more numbers"}[setting.kind]
            raise UserError(f"{where}: {name} must be {kind} from {setting.low} to {setting.high}, but it is {shown(number)}.")
    return tuple(map(float, numbers)) if setting.kind is tuple else setting.kind(value)


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # "\ud800" is legal JSON, but no text
        raise UserError(f"{where} holds half of a surrogate pair; write the character itself, in UTF-8.") from None
