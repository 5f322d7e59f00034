"""Tables of every flag, written from the parsers: ``python -m utils.cli.flag_tables`` rewrites docs/flags.md.

The one module here that looks up to the scripts, and only when it is run: their parsers are what it describes.
"""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

from utils.cli.arguments import script_parser
from utils.errors import run_script
from utils.files import atomic_path

SCRIPTS = ("cache_latents", "cache_text_encoder_outputs", "hv_train_network", "hv_generate_video", "convert_lora")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "flags.md"
COMMAND = "python -m utils.cli.flag_tables"
INTRODUCTION = f"""\
# Every flag

Written from the scripts by `{COMMAND}`; do not edit. `--help` prints the same. A default of "off" or "none" means that nothing
happens without the flag. Every script but `convert_lora.py` also reads flags from a
[TOML file](training.md#flags-from-a-file).
"""

_DEFAULT = re.compile(r" *\(default(?P<when> [^:()]+)?: (?P<value>.+)\)$")
_TYPE = re.compile(r"argparse type: (.+?)\.(\s|$)", re.DOTALL)


def flags_document() -> str:
    """The whole of docs/flags.md. The same on every machine: the help texts describe defaults that depend on it."""
    parts = [INTRODUCTION]
    for script in SCRIPTS:
        parser = importlib.import_module(script).build_parser()
        parts.append(f"## {script}.py\n\n{parser.description}\n\n{flag_tables(parser)}")
    return "\n".join(parts)


def flag_tables(parser: argparse.ArgumentParser) -> str:
    """A Markdown table for each group of a parser's flags, under a heading where the parser names the group."""
    tables = []
    for group in parser._action_groups:
        rows = [_row(action) for action in group._group_actions if action.option_strings and action.dest != "help"]
        if not rows:
            continue
        heading = "" if group is parser._optionals else f"### {group.title[0].upper()}{group.title[1:]}\n\n"
        tables.append(f"{heading}| flag | values | default | meaning |\n|---|---|---|---|\n" + "".join(rows))
    return "\n".join(tables)


def _row(action: argparse.Action) -> str:
    meaning, default = split_default(action)
    cells = (f"`{action.option_strings[-1]}`", _values(action), default, meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def split_default(action: argparse.Action) -> tuple[str, str]:
    """The help text without the default at its end, and that default; the parser's where the text has none."""
    text = (action.help or "").strip()
    if found := _DEFAULT.search(text):
        return text[: found.start()], found["value"] + (found["when"] or "")
    if action.required:
        return text, "required"
    if action.nargs == 0:
        return text, "off"
    return text, "none" if action.default in (None, "", []) else str(action.default)


def _values(action: argparse.Action) -> str:
    """What may stand behind the flag."""
    if action.nargs == 0:
        return "switch"
    if action.choices is not None:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    name = action.metavar or action.dest.upper()
    words = " ".join(name) if isinstance(name, tuple) else f"{name} ..." if action.nargs in ("*", "+") else name
    kind = _TYPE.match(getattr(action.type, "__doc__", None) or "")
    return f"`{words}`: {kind[1]}" if kind else f"`{words}`"


def main() -> None:
    script_parser("Rewrite docs/flags.md, the tables of every flag, from the parsers.").parse_args()
    with atomic_path(DOCUMENT) as temporary:
        temporary.write_text(flags_document(), encoding="utf-8", newline="\n")
    print(DOCUMENT)


if __name__ == "__main__":
    run_script(main)
