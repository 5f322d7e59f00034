"""Every spelling and layout of one LoRA: what it does to the weights, and its bits, there and back."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from variations import slow_but

from benchmarks.diffusers_twins import to_diffusers
from networks.formats.layouts import TARGETS
from networks.formats.reading import LoraFile, lora_of, read_lora
from networks.formats.writing import plain_network, save_lora, to_layout
from networks.lora import create_network, create_network_from_weights
from tests.lora_samples import CONFIG, distance, merged, sd_scripts_lora, transformer
from utils.errors import UserError

HIDDEN = CONFIG.hidden_size


def read(tensors: dict[str, Tensor]) -> LoraFile:
    return lora_of(tensors, {}, "file.safetensors")


def weights() -> dict[str, Tensor]:
    return transformer().state_dict()


def deltas(lora: LoraFile) -> dict[str, Tensor]:
    zeros = {name: torch.zeros_like(weight) for name, weight in weights().items()}
    return merged(lora, zeros)


def spellings(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The LoRA ``tensors``, in the layout of sd-scripts, as each program of the wild would name it."""
    modules: dict[str, dict[str, Tensor]] = {}
    paths = {path.replace(".", "_"): path for path, _ in transformer().named_modules()}
    for key, tensor in tensors.items():
        flat, _, part = key.removeprefix("lora_unet_").partition(".")
        modules.setdefault(paths[flat], {})[part] = tensor

    def comfy(path: str) -> str:
        for old, new in (("_mod.linear", "_mod.lin"), ("modulation.linear", "modulation.lin"), ("_attn_qkv", "_attn.qkv")):
            path = path.replace(old, new)
        return path.replace("_attn_proj", "_attn.proj").replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2")

    def named(name, down: str, up: str) -> dict[str, Tensor]:
        return {
            name(path) + ending: parts[part]
            for path, parts in modules.items()
            for part, ending in (("lora_down.weight", down), ("lora_up.weight", up), ("alpha", ".alpha"))
        }

    kohya, peft = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
    return {
        "musubi-tuner, sd-scripts": tensors,
        "OneTrainer": named(lambda path: f"diffusion_model.{path}", *peft),
        "OneTrainer without a prefix": named(lambda path: path, *peft),
        "diffusion-pipe with alphas": named(lambda path: f"transformer.{path}", *peft),
        "ComfyUI": named(lambda path: f"diffusion_model.{comfy(path)}", *kohya),
        "ComfyUI, flat": named(lambda path: f"lora_unet_{comfy(path).replace('.', '_')}", *kohya),
        "LyCORIS": named(lambda path: f"lycoris_{path.replace('.', '_')}", *kohya),
        "Tencent": named(lambda path: f"Hunyuan_video_I2V_lora_{path.replace('.', '_')}", *kohya),
        "PEFT": named(lambda path: f"base_model.model.{path}", ".lora_A.default.weight", ".lora_B.default.weight"),
        "older diffusers": named(lambda path: f"transformer.{path}", ".lora.down.weight", ".lora.up.weight"),
    }


BLOCK_LORA = sd_scripts_lora(transformer(), lambda path: path.startswith(("double_blocks", "single_blocks")), ranks=(4, 2, 3))
FULL_LORA = sd_scripts_lora(transformer(), ranks=(4, 2, 3))


@pytest.mark.parametrize("program", spellings(BLOCK_LORA))
def test_every_spelling_of_one_lora_is_the_same_updates(program):
    expected = {placed.parameter: placed.update for placed in read(BLOCK_LORA).updates}
    lora = read(spellings(BLOCK_LORA)[program])
    assert len(lora.updates) == len(expected) == 26 and not lora.left_out
    for placed in lora.updates:
        same = expected[placed.parameter]
        assert placed.update.alpha == same.alpha and placed.parts == 1
        assert torch.equal(placed.update.down, same.down) and torch.equal(placed.update.up, same.up)


@pytest.mark.parametrize("prefix", ["transformer.", "lora_transformer_", "lora_unet_", "lycoris_", "", "base_model.model."])
def test_names_of_diffusers_change_the_rows_that_diffusers_has(prefix):
    """Updates of parts of fused layers, and the swapped halves of the last modulation, against the independent twin."""
    model = transformer()
    theirs = to_diffusers(model.state_dict(), HIDDEN)
    names = [name for name, weight in theirs.items() if name.endswith(".weight") and weight.dim() == 2]
    generator = torch.Generator().manual_seed(0)
    tensors, expected = {}, {name: weight.clone() for name, weight in theirs.items()}
    for number, name in enumerate(names):
        down, up = (torch.randn(size, generator=generator) for size in ((3, theirs[name].shape[1]), (len(theirs[name]), 3)))
        path = name.removesuffix(".weight")
        flat = path if prefix.endswith(".") or not prefix else path.replace(".", "_")
        tensors |= {f"{prefix}{flat}.lora_A.weight": down, f"{prefix}{flat}.lora_B.weight": up}
        tensors[f"{prefix}{flat}.alpha"] = torch.tensor(float(number))
        expected[name] += number / 3 * up @ down
    lora = read(tensors)
    assert len(lora.updates) == len(names)
    assert distance(to_diffusers(merged(lora, model.state_dict()), HIDDEN), expected) < 1e-6


@pytest.mark.parametrize("targets", slow_but(itertools.permutations(TARGETS, 2), *itertools.pairwise(TARGETS)))
def test_there_and_back_keeps_the_updates(tmp_path, targets):
    source, target = targets
    start = read(FULL_LORA)
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    save_lora(paths[0], start, source)
    save_lora(paths[1], read_lora(paths[0]), target)
    save_lora(paths[2], read_lora(paths[1]), source)
    expected = deltas(start)
    for path, layout in zip(paths, (source, target, source)):
        lora = read_lora(path)
        assert lora.layout == layout
        assert distance(deltas(lora), expected) < 1e-6
    if {source, target} in ({"default", "comfy"}, {"framepack"}):
        assert_same_bits(read_lora(paths[2]), read_lora(paths[0]))


def assert_same_bits(found: LoraFile, expected: LoraFile) -> None:
    one, other = ({(placed.parameter, placed.part): placed.update for placed in lora.updates} for lora in (found, expected))
    assert one.keys() == other.keys() and len(one) == len(found.updates) == len(expected.updates)
    for place, update in one.items():
        assert update.alpha == other[place].alpha
        for first, second in ((update.down, other[place].down), (update.up, other[place].up)):
            assert first.dtype == second.dtype and torch.equal(first.view(torch.uint8), second.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_where_only_names_differ_bits_do_not_change(tmp_path, dtype):
    """Of alphas kept (default, comfy), of alphas that are the ranks (all layouts of fused rows), and of parts of rows."""
    stored = {key: tensor if key.endswith("alpha") else tensor.to(dtype) for key, tensor in BLOCK_LORA.items()}
    unscaled = {
        key: torch.tensor(4.0) if key.endswith("alpha") else tensor for key, tensor in sd_scripts_lora(transformer()).items()
    }
    unscaled = {key: tensor if key.endswith("alpha") else tensor.to(dtype) for key, tensor in unscaled.items()}
    by_parts = to_layout(read(unscaled), "diffusers")
    for tensors, layouts in (
        (stored, ("default", "comfy", "default")),
        (unscaled, ("other", "comfy", "default", "other")),
        (by_parts, ("diffusers", "framepack", "diffusers")),
    ):
        lora, first = read(tensors), read(tensors)
        for number, layout in enumerate(layouts):
            save_lora(tmp_path / f"{number}.safetensors", lora, layout)
            lora = read_lora(tmp_path / f"{number}.safetensors")
            assert {placed.update.down.dtype for placed in lora.updates} == {dtype}
        assert_same_bits(lora, first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("target", TARGETS)
def test_low_precision_files_are_converted_within_their_precision(dtype, target):
    stored = {key: tensor if key.endswith("alpha") else tensor.to(dtype) for key, tensor in FULL_LORA.items()}
    lora = read(stored)
    assert distance(deltas(read(to_layout(lora, target))), deltas(lora)) < 0.01


@pytest.mark.parametrize("through", ["diffusers", "framepack"])
def test_a_fused_lora_that_was_split_has_its_rank_again(through):
    tensors = sd_scripts_lora(transformer(), lambda path: "blocks" in path, ranks=(4,))
    back = read(to_layout(read(to_layout(read(tensors), through)), "default"))
    assert back.ranks == {4}


def test_ranks_are_made_equal_where_a_layout_has_no_alpha():
    lora = read(FULL_LORA)
    for target in TARGETS:
        ranks = {len(tensor) for key, tensor in to_layout(lora, target).items() if "down" in key or "lora_A" in key}
        assert ranks == ({4} if target in ("other", "diffusers") else {2, 3, 4})


@pytest.mark.parametrize("parts", [("to_q", "to_v"), ("to_k",), ("to_q", "to_k", "to_v"), ("proj_mlp",), ("to_v", "proj_mlp")])
@pytest.mark.parametrize("shared", [True, False])
def test_rows_of_parts_that_are_missing_do_not_change(parts, shared):
    """Parts with factors, ranks and alphas of their own, or with one down factor for all."""
    generator = torch.Generator().manual_seed(0)
    tensors, down = {}, torch.randn(2, HIDDEN, generator=generator)
    for number, part in enumerate(parts):
        rank = 2 if shared else 2 + number
        rows = 4 * HIDDEN if part == "proj_mlp" else HIDDEN
        key = f"transformer.single_transformer_blocks.1.{part if part == 'proj_mlp' else f'attn.{part}'}"
        tensors[f"{key}.lora_A.weight"] = down.clone() if shared else torch.randn(rank, HIDDEN, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
        tensors[f"{key}.alpha"] = torch.tensor(1.0 if shared else float(number - 1))
    lora = read(tensors)
    expected = deltas(lora)["single_blocks.1.linear1.weight"]
    moved = {index for index, row in enumerate(expected) if row.any()}
    starts = {"to_q": 0, "to_k": HIDDEN, "to_v": 2 * HIDDEN, "proj_mlp": 3 * HIDDEN}
    still = {part for part in starts if starts[part] not in moved}
    assert still == starts.keys() - {part for number, part in enumerate(parts) if shared or number != 1}  # that alpha is 0
    for target in TARGETS:
        written = read(to_layout(lora, target))
        torch.testing.assert_close(deltas(written)["single_blocks.1.linear1.weight"], expected, atol=1e-5, rtol=1e-6)
    (fused,) = read(to_layout(lora, "default")).updates
    assert fused.update.rank == (2 if shared else sum(2 + number for number in range(len(parts))))


def test_biases_and_norms_are_put_together_from_parts():
    theirs = to_diffusers(weights(), HIDDEN)
    generator = torch.Generator().manual_seed(0)
    changes = {
        name: torch.randn(theirs[name].shape, generator=generator)
        for name in theirs
        if name.startswith(("transformer_blocks.0", "single_transformer_blocks.1", "norm_out", "context_embedder.token_refiner"))
    }
    tensors = {
        f"transformer.{name.removesuffix('.weight').removesuffix('.bias')}.diff{'_b' if name.endswith('bias') else ''}": change
        for name, change in changes.items()
    }
    expected = {name: weight + changes[name] if name in changes else weight for name, weight in theirs.items()}
    lora = read(tensors)
    for each in (lora, read(to_layout(lora, "comfy"))):
        assert distance(to_diffusers(merged(each, weights()), HIDDEN), expected) < 1e-6
    assert "diffusion_model.single_blocks.1.linear1.diff_b" in to_layout(lora, "comfy")


def test_dora_of_parts_is_put_together():
    tensors = {}
    for part, name in enumerate(("to_q", "to_k", "to_v")):
        key = f"transformer.transformer_blocks.0.attn.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(part))
        tensors[f"{key}.lora_B.weight"] = torch.randn(HIDDEN, 2, generator=torch.Generator().manual_seed(part + 3))
        tensors[f"{key}.lora_magnitude_vector.weight"] = torch.rand(HIDDEN, generator=torch.Generator().manual_seed(part + 6))
    lora = read(tensors)
    for target in ("default", "comfy"):
        assert distance(merged(read(to_layout(lora, target)), weights()), merged(lora, weights())) < 1e-6
    some = {key: tensor for key, tensor in tensors.items() if "to_k" not in key}
    with pytest.raises(UserError, match=r"DoRA of 2 of 3 parts cannot be put together"):
        to_layout(read(some), "default")


def test_dora_for_each_input_of_the_last_modulation_is_read_with_its_rows_swapped():
    """The length of a column does not depend on the order of rows."""
    shapes = {"lora_down.weight": (2, HIDDEN), "lora_up.weight": (2 * HIDDEN, 2), "dora_scale": (1, HIDDEN)}
    tensors = {
        f"lora_transformer_norm_out_linear.{name}": torch.rand(shape, generator=torch.Generator().manual_seed(1))
        for name, shape in shapes.items()
    }
    ours = {
        f"lora_unet_final_layer_adaLN_modulation_1.{key.partition('.')[2]}": torch.cat(tensor.chunk(2)[::-1])
        if "lora_up" in key
        else tensor
        for key, tensor in tensors.items()
    }
    assert distance(merged(read(tensors), weights()), merged(read(ours), weights())) == 0


def test_more_than_one_update_of_a_row_is_merged_but_not_converted():
    fused = sd_scripts_lora(transformer(), lambda path: path == "double_blocks.0.img_attn_qkv")
    split = to_layout(
        read(sd_scripts_lora(transformer(), lambda path: path == "double_blocks.0.img_attn_qkv", seed=1)), "diffusers"
    )
    lora = read(fused | split)
    both = {name: deltas(read(fused))[name] + delta for name, delta in deltas(read(split)).items()}
    assert distance(deltas(lora), both) < 1e-6
    for target in TARGETS:
        with pytest.raises(UserError, match=r"more than one update for the same rows"):
            to_layout(lora, target)
    with pytest.raises(UserError, match=r"cannot be trained further: of .* more than one update"):
        plain_network(lora)


def test_parts_of_two_precisions_are_put_together_in_the_better_one():
    names = {part: f"transformer.transformer_blocks.0.attn.to_{part}.lora_" for part in "qk"}
    tensors = {names["q"] + "A.weight": torch.ones(1, HIDDEN).half(), names["q"] + "B.weight": torch.ones(HIDDEN, 1).half()}
    tensors |= {names["k"] + "A.weight": torch.ones(1, HIDDEN), names["k"] + "B.weight": torch.full((HIDDEN, 1), 1e7)}
    up = to_layout(read(tensors), "comfy")["diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight"]
    assert up.dtype == torch.float32 and up.max() == 1e7


def test_factors_that_leave_half_precision_become_float32():
    key = "lora_unet_double_blocks_0_img_mlp_fc1"
    tensors = {f"{key}.lora_down.weight": torch.ones(1, HIDDEN).half(), f"{key}.lora_up.weight": torch.ones(256, 1).half()}
    large = to_layout(read(tensors | {f"{key}.alpha": torch.tensor(1e10)}), "other")
    assert {tensor.dtype for tensor in large.values()} == {torch.float32}
    tensors = {name: tensor.float() * 1e30 for name, tensor in tensors.items()} | {f"{key}.alpha": torch.tensor(1e38)}
    with pytest.raises(UserError, match=r"its alpha makes factors that are no numbers"):
        to_layout(read(tensors), "other")


@pytest.mark.parametrize("layout", [*TARGETS, *spellings(BLOCK_LORA)])
def test_training_goes_on_from_every_layout(tmp_path, layout):
    """--network_weights, with and without --dim_from_weights."""
    tensors = sd_scripts_lora(transformer(), lambda path: path.startswith(("double_blocks", "single_blocks")) and "mod" not in path)
    stored = to_layout(read(tensors), layout) if layout in TARGETS else spellings(tensors)[layout]
    save_file(stored, tmp_path / "file.safetensors")
    model = transformer()
    network, _ = create_network_from_weights(1.0, tmp_path / "file.safetensors", None, None, model)
    fresh = create_network(1.0, 4, 1, None, None, model)
    assert fresh.load_weights(tmp_path / "file.safetensors") == f"20 LoRA modules loaded from {tmp_path / 'file.safetensors'}"
    expected = deltas(read(tensors))
    for trained in (network, fresh):
        assert {module.rank for module in trained.loras()} == {4}
        assert distance(deltas(read(trained.state_dict())), expected) < 1e-6
