"""What is printed and logged of names and texts that strangers chose: visible characters, on lines of their own."""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.errors import UserError, name_some, run_script
from utils.output import VisibleFormatter, show, visible, with_names_of_invisible

ROOT = Path(__file__).resolve().parents[2]
NASTY = "a\x1b[2J\u202eb\nINFO train: done\r\x9b\u2028c"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\u202adata/pics does not exist.", "<U+202A>data/pics does not exist. It has invisible characters: U+202A (left-to-right"),
        ("data/pics\u00a0 is no folder.", "data/pics<U+00A0> is no folder."),
        ("a\u200bb", "a<U+200B>b"),
        ("a\x1b[31mb", "a<U+001B>[31mb"),
    ],
)
def test_invisible_characters_are_shown(text, says):
    assert with_names_of_invisible(text).startswith(says)


def test_what_people_can_see_stays():
    text = "C:\\Bilder\\Zoë 猫.png does not exist. Give another."
    assert with_names_of_invisible(text) == visible(text) == text


def test_a_name_cannot_fake_lines_move_or_hide():
    assert not set(visible(NASTY)) & set("\x1b\u202e\n\r\x9b\u2028")
    assert visible("\ta\nb\r", lines=True) == "\ta\nb<U+000D>"
    assert visible("\ud83d half") == "\ud83d half"  # printed as an escape where the stream lacks it


def test_tables_lists_and_errors(capsys):
    show(f"one\n{NASTY}")
    assert capsys.readouterr().out == "one\na<U+001B>[2J<U+202E>b\nINFO train: done<U+000D><U+009B><U+2028>c\n"
    assert "\n" not in name_some([NASTY, "b"])

    def main() -> None:
        raise UserError(f"{NASTY} is no file.")

    with pytest.raises(SystemExit):
        run_script(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a<U+001B>[2J") and "U+202E (right-to-left override)" in line


def test_log_records():
    def line(message: object, *arguments: object) -> str:
        return VisibleFormatter("%(levelname)s %(message)s").format(
            logging.LogRecord("x", logging.INFO, "", 0, message, arguments, None)
        )

    assert line("saved %s", NASTY).count("\n") == 0 and line("%d of %.1f %s", 3, 0.5, None) == "INFO 3 of 0.5 None"
    assert line("a table:\n  row") == "INFO a table:\n  row"
    assert "\x1b" not in line(f"saved {NASTY}")


def test_everything_that_is_printed_goes_through_one_place():
    """But for pictures in a terminal, which are made of escapes, and generated documentation."""
    allowed = {"utils/output.py", "utils/startup.py", "utils/errors.py", "utils/cli/flag_tables.py", "dataset/cache/debug_view.py"}
    rooms = [ROOT / room for room in ("hunyuan_model", "dataset", "networks", "utils")]
    files = [*ROOT.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))]
    found = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if "print(" in path.read_text("utf-8")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert found - {"quickstart.py"} <= allowed


LONG_RUN = """
import logging, sys
from utils.errors import UserError, run_script
from utils.output import show
from utils.progress import ProgressBar

def main():
    for number in ProgressBar(range(500), mininterval=0):
        show(f"line {number} Zo\\u00eb" + "." * 500)
        logging.getLogger("run").warning("number %d", number)
    open(sys.argv[1], "w").write("done")
    raise UserError("the end.")

run_script(main)
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("outputs", ["reader ends", "closed", "full disk"])
def test_a_script_outlasts_the_readers_of_its_output(tmp_path, outputs: str, unbuffered: str) -> None:
    if outputs != "reader ends" and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    command = [sys.executable, "-c", LONG_RUN, str(tmp_path / "done")]
    ends = {"closed": ">&- 2>&-", "full disk": ">/dev/full 2>/dev/full"}
    if outputs in ends:
        command = ["sh", "-c", f'"$@" {ends[outputs]}', "sh", *command]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=60) == 2
    assert (tmp_path / "done").read_text("utf-8") == "done"
