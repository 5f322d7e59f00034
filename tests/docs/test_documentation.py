"""What the documentation tells users to type is accepted by the scripts, and the files it links to exist."""

from __future__ import annotations

import argparse
import importlib
import re

import pytest
from accelerate.commands.launch import launch_command_parser
from documented_commands import FLAG, ROOT, SCRIPTS, ScriptCommand, command_lines, documents, script_command, script_commands
from torch.distributed.run import get_args_parser

from hunyuan_model.sampling.prompts import PROMPT_OPTIONS

# The flags of programs that are not ours.
DOWNLOAD_FLAG = "--local-dir"
TENSORBOARD_FLAG = "--logdir"
SLURM_FLAGS = {"--nodes", "--ntasks-per-node", "--gres", "--cpus-per-task", "--time", "--signal"}
# Modules of the toy model that can be run.
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "examples" / "toy").rglob("*.py")
    if "def build_parser" in path.read_text("utf-8")
)
README, TRANSLATION = ROOT / "README.md", ROOT / "README.ja.md"
FENCED_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def parser_of(script: str) -> argparse.ArgumentParser:
    return importlib.import_module(script).build_parser()


def check_parses(command: ScriptCommand) -> None:
    try:
        parser_of(command.script).parse_args(command.arguments)
        if command.launcher is not None:
            launch_command_parser().parse_args([*command.launcher, f"{command.script}.py"])
    except SystemExit:
        pytest.fail(f"{command.where} shows a call of {command.script}.py that it refuses: {' '.join(command.arguments)}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_shown_in_the_readme_and_accepts_what_is_shown(script: str) -> None:
    commands = [command for command in script_commands() if command.script == script]
    assert any(command.where == "README.md" for command in commands)
    for command in commands:
        check_parses(command)


def test_calls_of_the_toy_models_modules_are_accepted() -> None:
    commands = [command for command in script_commands() if command.script in MODULES]
    assert {"examples.toy.evaluate", "examples.toy.recipe.pretrain"} <= {command.script for command in commands}
    for command in commands:
        check_parses(command)


def test_a_command_with_an_unknown_flag_would_be_noticed() -> None:
    (words,) = command_lines("```bash\npython convert_lora.py --input a --output b \\\n  --no_such_flag 1\n```\n")
    command = script_command(words, "here")
    assert command is not None and command.arguments[-2:] == ("--no_such_flag", "1")
    with pytest.raises(pytest.fail.Exception):
        check_parses(command)


def test_every_flag_that_is_mentioned_exists() -> None:
    known = {DOWNLOAD_FLAG, TENSORBOARD_FLAG, *SLURM_FLAGS, *PROMPT_OPTIONS, *get_args_parser()._option_string_actions}
    for benchmark in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--[a-z0-9_-]+)"', benchmark.read_text(encoding="utf-8")))
    for script in (*SCRIPTS, *MODULES):
        known |= set(parser_of(script)._option_string_actions)
    known |= set(launch_command_parser()._option_string_actions)
    for document in documents():
        mentioned = set(FLAG.findall(document.read_text(encoding="utf-8")))
        assert not mentioned - known, f"{document.name} mentions flags that do not exist: {sorted(mentioned - known)}"


def test_links_to_files_lead_somewhere() -> None:
    links = 0
    for document in documents():
        for target in re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                links += 1
                assert (document.parent / target).exists(), f"{document.relative_to(ROOT)} links to {target}, which does not exist"
    assert links > 3


def test_the_translated_readme_has_the_commands_flags_headings_and_tables_of_the_original() -> None:
    original, translated = (path.read_text(encoding="utf-8") for path in (README, TRANSLATION))
    assert f"]({TRANSLATION.name})" in original and f"]({README.name})" in translated
    assert FENCED_BLOCK.findall(translated) == FENCED_BLOCK.findall(original)
    assert FLAG.findall(translated) == FLAG.findall(original)
    prose, translated_prose = FENCED_BLOCK.sub("", original), FENCED_BLOCK.sub("", translated)
    for kind, pattern in (("headings", r"^#+(?= )"), ("table rows", r"^ *\|(?=.*\|$)")):
        found, expected = (re.findall(pattern, text, re.MULTILINE) for text in (translated_prose, prose))
        assert expected and found == expected, f"{TRANSLATION.name} has {len(found)} {kind}, {README.name} {len(expected)}"


def test_links_within_a_readme_lead_to_a_heading() -> None:
    for document in (README, TRANSLATION):
        text = FENCED_BLOCK.sub("", document.read_text(encoding="utf-8"))
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        targets = set(re.findall(r"\]\(#([^)]+)\)", text))
        assert targets and targets <= anchors, f"{document.name} links to headings that do not exist: {sorted(targets - anchors)}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_describes_every_flag(script: str) -> None:
    parser = parser_of(script)
    assert parser.description
    undescribed = [action.option_strings for action in parser._actions if action.option_strings and not action.help]
    assert not undescribed
    assert parser.format_help()
