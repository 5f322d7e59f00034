"""What the parsers of all scripts say of flags that are wrong."""

from __future__ import annotations

import pytest

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
