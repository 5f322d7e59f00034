"""What the parsers of all scripts say of flags that are wrong."""

from __future__ import annotations

import pytest

from utils.cli.arguments import StoreOnce, script_parser
from utils.cli.config_files import add_config_file_argument, parse_with_config

WRONG = [
    ("hv_train_network", ["--blocks_to_swap", "foo"], "argument --blocks_to_swap: 'foo' is not a whole number of at least 0"),
    ("hv_train_network", ["--bloks_to_swap", "3"], "unrecognized arguments: --bloks_to_swap 3 (Did you mean '--blocks_to_swap'?)"),
    ("cache_latents", ["--vae_tiling=1"], "argument --vae_tiling: ignored explicit argument '1'"),
    ("cache_text_encoder_outputs", ["--batch_size", "0"], "argument --batch_size: '0' is not a whole number of at least 1"),
    ("hv_generate_video", ["--qqqqq"], "unrecognized arguments: --qqqqq"),
    ("convert_lora", [], "the following arguments are required: --input, --output, --target"),
]


@pytest.mark.parametrize(("script", "words", "says"), WRONG, ids=[f"{script} {' '.join(words)}" for script, words, _ in WRONG])
def test_a_wrong_flag_is_one_sentence_and_status_2(call_script, script, words, says):
    ended = call_script(script, *words)
    assert ended.status == 2
    assert ended.stderr.splitlines() == [f"{script}.py: error: {says}; see --help"]


def test_a_flag_that_counts_once_may_stand_in_a_file_as_well(tmp_path, capsys):
    parser = script_parser("about")
    add_config_file_argument(parser)
    parser.add_argument("--text", action=StoreOnce, instead="--file")
    (tmp_path / "flags.toml").write_text('text = "of the file"\n', encoding="utf-8")
    config = ["--config_file", str(tmp_path / "flags.toml")]
    assert parse_with_config(parser, config).text == "of the file"
    for _ in range(2):  # a parser may parse again
        assert parse_with_config(parser, [*config, "--text", "mine"]).text == "mine"
    with pytest.raises(SystemExit):
        parser.parse_args(["--text", "a", "--text", "a"])
    assert "--text is given twice, and only one would count: keep one of them, or use --file" in capsys.readouterr().err
