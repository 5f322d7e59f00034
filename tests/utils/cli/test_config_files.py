"""Flags from a TOML file: as on the command line, which wins; mistakes name the key, the line and the section."""

from __future__ import annotations

import importlib

import pytest

from networks.training.arguments import build_training_parser
from utils.cli.arguments import script_parser
from utils.cli.config_files import CONFIG_FLAG, add_config_file_argument, parse_with_config
from utils.errors import UserError

REQUIRED = 'dit = "d.safetensors"\ndataset_config = "t.toml"\noutput_dir = "out"\noutput_name = "x"\n'


@pytest.fixture
def write(tmp_path):
    """``write(text)`` -> the words of a command line that names a config file with this text."""

    def file(text: str) -> list[str]:
        path = tmp_path / "train.toml"
        path.write_text(text, encoding="utf-8")
        return [CONFIG_FLAG, str(path)]

    return file


def from_flags(*words: str) -> dict:
    return vars(build_training_parser().parse_args(words)) | {"config_file": None}


def from_file(words: list[str], *more: str) -> dict:
    return vars(parse_with_config(build_training_parser(), [*words, *more])) | {"config_file": None}


def test_a_file_gives_what_the_command_line_gives(write):
    words = write(
        REQUIRED
        + """
[attention]
sdpa = true
xformers = false
[optimizer]
optimizer_args = ["weight_decay=0.1", "betas=(0.9, 0.99)"]
learning_rate = 1e-4          # a number
lr_warmup_steps = 0.1         # a number for a flag that takes text
max_grad_norm = "0.5"         # text for a flag that takes a number
[network.extra]
network_dim = 8
base_weights = []
base_weights_multiplier = [1, 0.5]
mixed_precision = "bf16"
"""
    )
    flags = [
        *("--dit", "d.safetensors", "--dataset_config", "t.toml", "--output_dir", "out", "--output_name", "x", "--sdpa"),
        *("--optimizer_args", "weight_decay=0.1", "betas=(0.9, 0.99)", "--learning_rate", "1e-4", "--lr_warmup_steps", "0.1"),
        *("--max_grad_norm", "0.5", "--network_dim", "8", "--base_weights_multiplier", "1", "0.5", "--mixed_precision", "bf16"),
    ]
    found = from_file(words)
    assert found == from_flags(*flags)
    assert {name: type(value) for name, value in found.items()} == {name: type(v) for name, v in from_flags(*flags).items()}


def test_the_command_line_wins(write):
    words = write('learning_rate = 1e-4\nnetwork_args = ["a=1", "b=2"]\nlr_scheduler = "cosine"\n')
    found = from_file(words, "--learning_rate", "2e-6", "--network_args", "c=3")
    assert found["learning_rate"] == 2e-6  # also where it is given the default
    assert found["network_args"] == ["c=3"] and found["lr_scheduler"] == "cosine"


def test_without_a_file_nothing_changes():
    assert parse_with_config(build_training_parser(), ["--sdpa"]) == build_training_parser().parse_args(["--sdpa"])


def test_required_flags_may_stand_in_the_file_and_are_required_still(write, capsys):
    parser = importlib.import_module("cache_text_encoder_outputs").build_parser()
    words = write('dataset_config = "t.toml"\ntext_encoder1 = "a"\ntext_encoder2 = "b"\nskip_existing = true\n')
    args = parse_with_config(parser, words)
    assert (args.dataset_config, args.text_encoder1, args.skip_existing) == ("t.toml", "a", True)
    with pytest.raises(SystemExit) as ended:
        parse_with_config(parser, write('text_encoder1 = "a"\n'))
    assert ended.value.code == 2
    answer = capsys.readouterr().err.splitlines()[-1]
    assert "--dataset_config" in answer and "--text_encoder2" in answer and "--text_encoder1" not in answer


@pytest.mark.parametrize("script", ["cache_latents", "cache_text_encoder_outputs", "hv_train_network", "hv_generate_video"])
def test_scripts_read_their_flags_from_a_file(call_script, write, script):
    ended = call_script(script, *write('[data]\ndataset_config = "no such.toml"\nvae = "none"\nditt = 1\n'))
    assert ended.status == 2 and "[data]" in ended.stderr and f"{script}.py has no flag" in ended.stderr


def test_two_values_for_a_flag_of_two(write):
    parser = importlib.import_module("hv_generate_video").build_parser()
    assert parse_with_config(parser, write("video_size = [64, 96]\n")).video_size == [64, 96]
    with pytest.raises(UserError, match=r"video_size = \[64\] must be a list of 2 values, not of 1"):
        parse_with_config(parser, write("video_size = [64]\n"))


def test_values_that_look_like_flags_and_homes_are_taken_literally(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("USERPROFILE", "/home/somebody")
    found = from_file(write('training_comment = "--dit"\ndit = "~/models/dit.pt"\nmetadata_title = "~x"\n'))
    assert found["training_comment"] == "--dit" and found["metadata_title"] == "~x"
    assert found["dit"].replace("\\", "/") == "/home/somebody/models/dit.pt"


def test_help_is_help_whatever_the_file_says(write, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_with_config(build_training_parser(), [*write("nonsense = 1\n"), "--help"])
    assert ended.value.code == 0 and "--learning_rate" in capsys.readouterr().out


MISTAKES = {
    "unknown key": ("[optimizer]\nlerning_rate = 1\n", ["[optimizer]", "'lerning_rate'", "'learning_rate'?"]),
    "key with dashes": ("--network_dim = 4\n", ["'--network_dim'", "'network_dim'?"]),
    "unlike any flag": ("qqqq = 1\n", ["'qqqq'", "--help lists the flags"]),
    "the file in itself": (f'[a]\n{CONFIG_FLAG[2:]} = "other.toml"\n', ["[a]", "has no flag for the key 'config_file'"]),
    "two sections": ("[a]\nseed = 1\n[b]\nseed = 2\n", ["[b]", "seed is given twice"]),
    "sections in double brackets": ("[[datasets]]\nseed = 1\n", ["no flag", "'datasets'"]),
    "number for a switch": ("sdpa = 1\n", ["sdpa = 1", "true or false"]),
    "text for a switch": ('sdpa = "true"\n', ["sdpa = 'true'", "without quotes"]),
    "switch for a value": ("network_dim = true\n", ["network_dim = true", "text in quotes or a number"]),
    "list for a value": ('dit = ["a"]\n', ["dit = ['a']", "one value, without brackets"]),
    "value for a list": ('network_args = "a=1"\n', ["network_args = 'a=1'", "network_args = [...]"]),
    "list in a list": ('network_args = [["a=1"]]\n', ["network_args", "text in quotes or a number"]),
    "not a number": ('learning_rate = "fast"\n', ["learning_rate = 'fast'", "is not a finite number"]),
    "out of range": ("[x]\nlearning_rate = -1.0\n", ["[x]", "learning_rate = -1.0", "not a finite number above 0"]),
    "fraction": ("max_train_steps = 1600.0\n", ["max_train_steps = 1600.0", "not a whole number"]),
    "not a choice": ('mixed_precision = "fp8"\n', ["mixed_precision = 'fp8'", "invalid choice", "bf16"]),
    "one of a list": ('base_weights_multiplier = [1.0, "x"]\n', ["base_weights_multiplier", "'x' is not a number"]),
    "Windows path": ('dit = "C:\\train\\new.pt"\n', ["dit = ", "control characters", "C:/folder"]),
    "not TOML": ("seed = \n", ["not valid TOML", "line 1"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_the_file_the_key_and_the_remedy(write, name):
    text, parts = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        parse_with_config(build_training_parser(), write(text))
    message = str(caught.value)
    assert "train.toml" in message and "\n" not in message and len(message) < 500
    assert all(part in message for part in parts), message


def test_a_file_that_is_missing_or_named_without_a_name(tmp_path, capsys):
    with pytest.raises(UserError, match=r"--config_file not found: .*none\.toml"):
        parse_with_config(build_training_parser(), [CONFIG_FLAG, str(tmp_path / "none.toml")])
    with pytest.raises(SystemExit) as ended:
        parse_with_config(build_training_parser(), [CONFIG_FLAG])
    assert ended.value.code == 2 and "expected one argument" in capsys.readouterr().err


def test_switches_that_turn_off_and_lists_that_hold_something(write):
    parser = script_parser("x")
    add_config_file_argument(parser)
    parser.add_argument("--no_x", dest="x", action="store_false")
    parser.add_argument("--some", nargs="+")
    for text, x, some in (("no_x = true\n", False, None), ('no_x = false\nsome = ["a"]\n', True, ["a"])):
        args = parse_with_config(parser, write(text))
        assert (args.x, args.some) == (x, some)
    with pytest.raises(UserError, match="at least one value"):
        parse_with_config(parser, write("some = []\n"))
