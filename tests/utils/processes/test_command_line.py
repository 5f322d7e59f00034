"""Keys on a command line: what other people of the machine, and the script's own messages, show of them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from utils.cli.arguments import script_parser
from utils.cli.config_files import add_config_file_argument, parse_with_config
from utils.processes.command_line import command_line

KEY = "0123-not-a-real-key-4567"
SHOWS = """
import sys
from pathlib import Path
from utils.cli.arguments import script_parser
from utils.cli.config_files import add_config_file_argument, parse_with_config
parser = script_parser("about")
add_config_file_argument(parser)
parser.add_argument("--wandb_api_key")
parser.add_argument("--huggingface_token")
args = parse_with_config(parser)
assert args.wandb_api_key == args.huggingface_token == sys.stdin.read()
print(sys.argv[1:], Path("/proc/self/cmdline").read_bytes() if sys.platform == "linux" else "")
"""


def test_keys_are_stars_in_lists_of_processes():
    words = ["--wandb_api_key", KEY, f"--huggingface_token={KEY}"]
    ended = subprocess.run([sys.executable, "-c", SHOWS, *words], input=KEY, capture_output=True, text=True, timeout=60, check=True)
    assert KEY not in ended.stdout and "'***', '--huggingface_token=***'" in ended.stdout
    if sys.platform == "linux":
        assert rf"--wandb_api_key\x00{'*' * len(KEY)}\x00--huggingface_token={'*' * len(KEY)}\x00" in ended.stdout
    assert KEY not in ended.stderr
    assert (
        "--wandb_api_key: the history of the shell" in ended.stderr
        and "better set WANDB_API_KEY, or run `wandb login`" in ended.stderr
    )
    assert "--huggingface_token: " in ended.stderr and "better set HF_TOKEN" in ended.stderr


def run(words: list[str]) -> None:
    from utils.errors import run_script

    parser = script_parser("about")
    add_config_file_argument(parser)
    parser.add_argument("--wandb_api_key", type=int)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: parse_with_config(parser, words))
    assert ended.value.code == 2


@pytest.mark.parametrize("word", ["--wandb_api_key", "--wandb_apikey", "--wandb_api_kye"])
@pytest.mark.parametrize("joined", [False, True])
def test_an_error_of_the_command_line_does_not_hold_the_key(capsys, word, joined):
    run([f"{word}={KEY}"] if joined else [word, KEY])
    said = capsys.readouterr().err
    assert f"{word}" in said and KEY not in said


LINES = ["wandb_api_key = '{}'", "wandb_api_key = ['{}']", "wandb_api_key = key-{}", "[a]\n'wandb_api_key' = key-{}"]


@pytest.mark.parametrize("line", LINES)
def test_an_error_of_a_config_file_does_not_hold_the_key(tmp_path: Path, capsys, line):
    path = tmp_path / "flags.toml"
    path.write_text(line.format(KEY) + "\n", encoding="utf-8")
    run(["--config_file", str(path)])
    said = capsys.readouterr().err
    assert "wandb_api_key" in said and KEY not in said


def test_a_command_to_copy_is_in_the_words_of_the_systems_shell(monkeypatch):
    words = ["python", "a b.py", 'say "it\'s"', "--x=$HOME"]
    monkeypatch.setattr(sys, "platform", "linux")
    assert shlex.split(command_line(words)) == words
    monkeypatch.setattr(sys, "platform", "win32")
    assert command_line(words) == 'python "a b.py" "say \\"it\'s\\"" --x=$HOME'
