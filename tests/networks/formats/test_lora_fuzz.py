"""Random damage to LoRA files of every layout and kind: a UserError, or a file that does the same to the weights."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import convert_lora
from networks.formats.layouts import ENDINGS, LAYOUTS, TARGETS
from networks.formats.reading import check_lora_file, fit_to_model, lora_of, read_lora
from networks.formats.writing import to_layout
from networks.lora import create_network_from_weights
from tests.lora_samples import merged, sd_scripts_lora, transformer
from utils.errors import UserError, run_script

MODEL = transformer()
WEIGHTS = MODEL.state_dict()
SHAPES = {name: tuple(weight.shape) for name, weight in WEIGHTS.items()}
PLACES = (
    "double_blocks.0.img_attn_qkv",
    "single_blocks.1.linear1",
    "final_layer.adaLN_modulation.1",
    "double_blocks.1.img_mlp.fc2",
)
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64, torch.bool)
ODD_KEYS = (
    "",
    ".",
    "x",
    "lora_unet_",
    "diffusion_model.",
    ".lora_A.weight",
    "transformer.double_blocks.99999999999.img_attn_qkv.alpha",
)
ODD_SHAPES = ((), (0,), (1,), (0, 64), (64, 0), (3, 3), (1, 1, 1), (4, 64, 1, 1), (64, 4, 1, 1), (192, 4, 2), (2, 1, 1, 1, 1))


def kinds(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """LoRA, LoHa, LoKr, DoRA and differences on the same modules, under the names of sd-scripts."""
    modules = sorted({key.partition(".")[0] for key in tensors})
    sizes = {key: (len(tensors[f"{key}.lora_up.weight"]), tensors[f"{key}.lora_down.weight"].shape[1]) for key in modules}
    generator = torch.Generator().manual_seed(0)

    def filled(parts: Callable[[int, int], dict[str, tuple[int, ...]]]) -> dict[str, Tensor]:
        return {
            f"{key}.{part}": torch.randn(shape, generator=generator) * 0.1
            for key, size in sizes.items()
            for part, shape in parts(*size).items()
        }

    return {
        "LoRA": tensors,
        "LoHa": filled(
            lambda o, i: {"hada_w1_a": (o, 2), "hada_w1_b": (2, i), "hada_w2_a": (o, 2), "hada_w2_b": (2, i), "alpha": ()}
        ),
        "LoKr": filled(
            lambda o, i: {"lokr_w1": (8, 8), "lokr_w2_a": (o // 8, 2), "lokr_w2_b": (2, i // 8), "alpha": (), "scalar": ()}
        ),
        "DoRA": tensors | filled(lambda o, i: {"dora_scale": (o, 1)}),
        "differences": filled(lambda o, i: {"diff": (o, i), "diff_b": (o,)}),
    }


KINDS = kinds(sd_scripts_lora(MODEL, lambda path: path in PLACES, ranks=(4, 2)))


def renamed(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Under the names of any layout; where that splits modules, rows are not split, so that shapes are wrong."""
    paths = {f"lora_unet_{place.replace('.', '_')}": place for place in PLACES}
    form, names = LAYOUTS[layout], {}
    for key, tensor in tensors.items():
        flat, _, ending = key.partition(".")
        for module in form.names.modules(paths[flat]):
            names[f"{form.prefix}{module if form.dotted else module.replace('.', '_')}.{ending}"] = tensor.clone()
    return names


def damaged(tensors: dict[str, Tensor], dice: random.Random) -> dict[str, Tensor]:
    tensors = dict(tensors)
    for _ in range(dice.randint(1, 3)):
        key = dice.choice(sorted(tensors) or [""])
        value = tensors.get(key, torch.ones(2, 2))
        match dice.randrange(9):
            case 0:
                tensors.pop(key, None)
            case 1:  # another ending
                tensors[f"{key.partition('.lora')[0]}.{dice.choice(sorted(ENDINGS))}"] = tensors.pop(key, value)
            case 2:  # the same in another spelling
                tensors |= renamed(KINDS[dice.choice(sorted(KINDS))], dice.choice(sorted(LAYOUTS)))
            case 3:
                tensors[dice.choice(ODD_KEYS)] = value
            case 4:
                tensors[key] = torch.ones(dice.choice(ODD_SHAPES))
            case 5:
                tensors[key] = value.to(dice.choice(DTYPES))
            case 6 if value.is_floating_point() and value.itemsize > 1:
                tensors[key] = torch.full_like(value, dice.choice((torch.nan, torch.inf, 0.0, -1.0, 1e4)))
            case 7:  # alphas
                alphas = (torch.nan, -torch.inf, 0.0, 1e38, -1e-38, -3.0)
                number = torch.tensor(dice.choice(alphas), dtype=dice.choice((torch.float32, torch.float64, torch.bfloat16)))
                tensors[f"{key.partition('.lora')[0]}.alpha"] = dice.choice((number, number.repeat(2), torch.tensor(4)))
            case _:
                tensors[key] = value.flatten()[: dice.randrange(1, 9)]
    return {key: tensor.clone() for key, tensor in tensors.items()}  # which may not share memory


def consistent(lora) -> None:
    """Every way to use the LoRA refuses it, or agrees with merging it."""
    shapes_fit = fit_to_model(lora, SHAPES)
    expected = {name: weight for name, weight in merged(lora, WEIGHTS).items() if name in shapes_fit}
    for target in TARGETS:
        try:
            written = lora_of(to_layout(lora, target), {}, "written")
        except UserError:
            continue
        found = merged(written, WEIGHTS)
        for name, weight in expected.items():
            if weight.isfinite().all():
                assert (found[name] - weight).norm() <= 0.05 * (weight - WEIGHTS[name]).norm() + 1e-4, (target, name)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_user_errors_or_consistent(tmp_path, kind, layout):
    dice = random.Random(f"{kind} {layout}")
    for number in range(12):
        tensors = renamed(KINDS[kind], layout)
        if number:
            tensors = damaged(tensors, dice)
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path, {"ss_base_model_version": "a\nb"})
        for partial in (False, True):
            lora = None
            try:
                lora = read_lora(path, partial=partial)
            except UserError as error:
                assert "\n" not in str(error)
            try:
                header = check_lora_file(path, partial=partial)
            except UserError:
                assert lora is None
            else:
                if lora is not None:
                    assert [(p.parameter, p.update.shape) for p in header.updates] == [
                        (p.parameter, p.update.shape) for p in lora.updates
                    ]
            if lora is not None:
                try:
                    consistent(lora)
                    create_network_from_weights(1.0, path, None, None, MODEL)
                except UserError as error:
                    assert "\n" not in str(error)


def test_nothing_is_written_on_an_error(tmp_path, monkeypatch, capsys):
    dice = random.Random(0)
    written = 0
    for _ in range(60):
        path, output = tmp_path / "damaged.safetensors", tmp_path / "output.safetensors"
        tensors = damaged(renamed(KINDS[dice.choice(sorted(KINDS))], dice.choice(sorted(LAYOUTS))), dice)
        save_file(tensors, path)
        target = dice.choice(TARGETS)
        monkeypatch.setattr(sys, "argv", ["convert_lora.py", "--input", str(path), "--output", str(output), "--target", target])
        with pytest.raises(SystemExit) as exit_info:
            run_script(convert_lora.main)
        message = capsys.readouterr().err
        assert exit_info.value.code == (0 if output.exists() else 2), message
        assert {file.name for file in tmp_path.iterdir()} <= {"damaged.safetensors", "output.safetensors"}
        if output.exists():
            written += 1
            output.unlink()
    assert 0 < written < 60
