"""LoRA by block: which words name which parameters, and that merged and injected LoRA follow them."""

from __future__ import annotations

import random

import pytest
import torch
from lora_samples import merged, sd_scripts_lora
from small_transformer import CONFIG, CPU, make_inputs, make_transformer

from networks.block_strengths import BlockStrengths
from networks.formats.reading import lora_of
from networks.injection import InjectedLoras
from networks.merging import LoraToMerge, MergePatch
from utils.errors import UserError

DOUBLE, SINGLE = "double_blocks.{}.img_attn_qkv.weight", "single_blocks.{}.linear1.weight"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", [1, 1, 1, 1]),
        ("double=0.5", [0.5, 0.5, 1, 1]),
        ("single=2 single.1=-1", [1, 1, 2, -1]),
        ("single.1=-1 single=2", [1, 1, 2, 2]),
        ("double.1-2,0=0 single.0,2-3=3", [0, 0, 3, 1]),
        ("other=0", [1, 1, 1, 1]),
    ],
)
def test_the_last_word_that_fits_counts(words, expected):
    strengths = BlockStrengths.parse(words.split(), CONFIG)
    assert [strengths.of(name) for name in (DOUBLE.format(0), DOUBLE.format(1), SINGLE.format(0), SINGLE.format(1))] == expected
    assert strengths.of("img_in.proj.weight") == (0 if words == "other=0" else 1)


def test_without_single_blocks_whatever_the_words_say():
    strengths = BlockStrengths.parse(["single=2"], CONFIG, exclude_single_blocks=True)
    assert [strengths.of(SINGLE.format(3)), strengths.of(DOUBLE.format(0))] == [0, 1]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("singel=1", "Did you mean 'single'?"),
        ("double", "double=0.5 or single.0-9,12=0"),
        ("double.0--1=1", "double blocks have 0 to 2"),
        ("double.2-3=1", "2-3 is no block of this model"),
        ("single.3-1=1", "3-1 is no block"),
        ("other.0=1", "other blocks have no numbers"),
        ("single.=1", "takes words such as"),
        ("double=x", "'x' is no finite number"),
        ("double=nan", "no finite number"),
    ],
)
def test_what_is_refused(word, says):
    with pytest.raises(UserError) as error:
        BlockStrengths.parse([word], CONFIG)
    assert says in str(error.value) and word in str(error.value)


def test_merged_and_injected_follow_the_blocks_through_any_changes():
    """Random multipliers of two LoRA, each with strengths of its own, against the weights that the formula gives."""
    model = make_transformer()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    files = [lora_of(sd_scripts_lora(model, seed=seed), {}, f"lora {seed}") for seed in (0, 1)]
    blocks = [BlockStrengths.parse(words.split(), CONFIG) for words in ("double=0.5 single.1-2=0", "single=2 double.0=-1 other=0")]
    loras = [LoraToMerge(file, 1.0, blocks=of_file) for file, of_file in zip(files, blocks)]
    with torch.no_grad():
        base = model(*make_inputs())
        injected, draw = InjectedLoras(model, loras, CPU), random.Random(0)
        alone = [merged(file, weights) for file in files]
        for multipliers in [[draw.choice((0.0, 0.3, -1.0, 1.5)) for _ in loras] for _ in range(6)] + [[0.0, 0.0], [1.0, 0.0]]:
            injected.set_multipliers(multipliers)
            expected = {
                name: weight
                + sum(m * of.of(name) * (whole[name] - weight) for m, of, whole in zip(multipliers, blocks, alone) if m != 0)
                for name, weight in weights.items()
            }
            other = make_transformer()
            other.load_state_dict(expected)
            found, wanted = model(*make_inputs()), other(*make_inputs())
            assert torch.equal(found, base) if not any(multipliers) else (found - wanted).norm() / wanted.norm() < 1e-5
            patch = MergePatch(
                [LoraToMerge(file, m, blocks=of) for file, m, of in zip(files, multipliers, blocks)],
                {name: tuple(weight.shape) for name, weight in weights.items()},
            )
            worst = max((patch(name, weight) - expected[name]).abs().max() for name, weight in weights.items())
            assert worst < 1e-5


def test_what_is_left_out_is_logged_and_all_of_it_is_refused(caplog):
    model = make_transformer()
    file = lora_of(sd_scripts_lora(model, lambda path: path.startswith("single_blocks.")), {}, "lora of single blocks")
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    with caplog.at_level("INFO"):
        MergePatch([LoraToMerge(file, 1.0, blocks=BlockStrengths.parse(["single.1=0"], CONFIG))], shapes)
    assert "lora of single blocks: 3 of 12 parameters are left out by block" in caplog.text
    with pytest.raises(UserError, match="nothing is left of lora of single blocks"):
        MergePatch([LoraToMerge(file, 1.0, blocks=BlockStrengths.parse([], CONFIG, exclude_single_blocks=True))], shapes)
