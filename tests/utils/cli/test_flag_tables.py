"""docs/flags.md is what the parsers give, and what the parsers say of their defaults is true."""

from __future__ import annotations

import argparse
import importlib
import os

import pytest
from documented_commands import SCRIPTS as DOCUMENTED_SCRIPTS

from utils.cli.flag_tables import COMMAND, DOCUMENT, SCRIPTS, flag_tables, flags_document, split_default

MACHINE_DEPENDENT = {"num_workers"}


def actions() -> list:
    parsers = ((script, importlib.import_module(script).build_parser()) for script in SCRIPTS)
    return [(script, action) for script, parser in parsers for action in parser._actions if action.dest != "help"]


def test_the_document_is_that_of_the_parsers():
    assert set(SCRIPTS) == set(DOCUMENTED_SCRIPTS)
    stored = DOCUMENT.read_text(encoding="utf-8")
    assert stored == flags_document(), f"docs/flags.md differs from the parsers; run: {COMMAND}"


@pytest.mark.parametrize("cores", [64, None])
def test_the_document_does_not_depend_on_the_machine(monkeypatch, cores):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setenv("COLUMNS", "40")
    assert flags_document() == DOCUMENT.read_text(encoding="utf-8")


def test_defaults_told_in_help_texts_are_the_defaults():
    checked = 0
    for script, action in actions():
        if action.default in (None, False, "", []) or action.dest in MACHINE_DEPENDENT:
            continue
        checked += 1
        _, told = split_default(action)
        if action.nargs == 0:
            assert told == ("on" if isinstance(action, argparse._StoreTrueAction) else "off"), f"{script} {action.option_strings}"
            continue
        default = action.default if isinstance(action.default, list) else [action.default]
        words = told.split()
        if isinstance(default[0], str):
            assert words[0] == default[0], f"{script} --{action.dest}: {told}"
        else:
            assert [float(word) for word in words] == [float(value) for value in default], f"{script} --{action.dest}: {told}"
    assert checked > 20


def test_a_row_for_each_kind_of_flag():
    parser = argparse.ArgumentParser()
    parser.add_argument("--plain", help="a | b")
    group = parser.add_argument_group("odd things (some)")
    group.add_argument("--switch", action="store_true", help="do it")
    group.add_argument("--pick", choices=("a", "b"), default="b", help="one of them (default: b)")
    group.add_argument("--size", nargs=2, metavar=("H", "W"), type=int, default=[1, 2], help="sides (default when wide: 1 2)")
    group.add_argument("--files", nargs="*", default=[], metavar="PATH", required=True, help="some (of many) files")
    assert flag_tables(parser) == (
        "| flag | values | default | meaning |\n|---|---|---|---|\n"
        "| `--plain` | `PLAIN` | none | a \\| b |\n"
        "\n### Odd things (some)\n\n"
        "| flag | values | default | meaning |\n|---|---|---|---|\n"
        "| `--switch` | switch | off | do it |\n"
        "| `--pick` | `a`, `b` | b | one of them |\n"
        "| `--size` | `H W` | 1 2 when wide | sides |\n"
        "| `--files` | `PATH ...` | required | some (of many) files |\n"
    )
