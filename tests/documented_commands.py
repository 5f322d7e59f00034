"""The shell commands that documentation shows, taken apart so that they can be held against the scripts."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("cache_latents", "cache_text_encoder_outputs", "hv_train_network", "hv_generate_video", "convert_lora")
SHELL_BLOCK = re.compile(r"^```(?:bash|shell|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True)
class ScriptCommand:
    """A call of one of the scripts: where it is written, its flags, and those of ``accelerate launch`` before it."""

    where: str
    script: str
    arguments: tuple[str, ...]
    launcher: tuple[str, ...] | None


def documents() -> list[Path]:
    """Every Markdown file for users."""
    return [
        ROOT / "README.md",
        ROOT / "README.ja.md",
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "dataset" / "dataset_config.md",
        *sorted((ROOT / "examples").rglob("README.md")),
    ]


def command_lines(text: str) -> list[list[str]]:
    """Each command of the shell blocks in a Markdown text, split into words."""
    lines = "".join(SHELL_BLOCK.findall(text)).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def script_command(words: list[str], where: str) -> ScriptCommand | None:
    """The call of a script, or of a module of ``examples``, in a command; None for a command that calls something else."""
    if words[:2] == ["python", "-m"] and words[2].startswith("examples."):
        return ScriptCommand(where, words[2], tuple(words[3:]), None)
    for position, word in enumerate(words):
        name = Path(word).name
        if name.removesuffix(".py") in SCRIPTS and name.endswith(".py"):
            before = words[:position]
            launcher = tuple(before[before.index("launch") + 1 :]) if "launch" in before else None
            return ScriptCommand(where, name.removesuffix(".py"), tuple(words[position + 1 :]), launcher)
    return None


def script_commands() -> list[ScriptCommand]:
    """Every script call in the documentation."""
    found = []
    for document in documents():
        where = document.relative_to(ROOT).as_posix()
        commands = (script_command(words, where) for words in command_lines(document.read_text(encoding="utf-8")))
        found += [command for command in commands if command]
    return found
