"""The size of a LoRA's updates relative to the weights they change, and its scale: what is logged, and what is warned of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hunyuan_model
from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime.settings import RuntimeSettings
from networks.lora import create_network
from networks.training.logging.logs import TrainingLogs
from networks.training.logging.update_size import measure_changed_weights

CPU = torch.device("cpu")


def norm(tensors) -> float:
    return sum(tensor.double().square().sum().item() for tensor in tensors) ** 0.5


def dense_share(dit: Path, model: Path) -> float:
    """From the files, with every update made whole."""
    lora, weights = load_file(model), load_file(dit)
    flat = {name.removesuffix(".weight").replace(".", "_"): weight for name, weight in weights.items()}
    modules = [name.removesuffix(".alpha") for name in lora if name.endswith(".alpha")]
    updates = [
        lora[f"{name}.alpha"]
        / len(lora[f"{name}.lora_down.weight"])
        * lora[f"{name}.lora_up.weight"]
        @ lora[f"{name}.lora_down.weight"]
        for name in modules
    ]
    return norm(updates) / norm(flat[name.removeprefix("lora_unet_")] for name in modules)


@pytest.mark.parametrize("flags", [(), ("--blocks_to_swap", 2)])
def test_the_size_is_logged_at_every_save(train, tiny_model, tmp_path: Path, monkeypatch, caplog, flags: tuple) -> None:
    caplog.set_level("INFO")
    logged = []
    plain = TrainingLogs.values
    monkeypatch.setattr(
        TrainingLogs, "values", lambda logs, step, values: (logged.append((step, values)), plain(logs, step, values))
    )
    assert train("--max_train_steps", 3, "--save_every_n_steps", 2, "--learning_rate", 1e-2, *flags).status == 0
    sizes = [(step, values["update/relative_norm"]) for step, values in logged if "update/relative_norm" in values]
    expected = [
        (step, dense_share(tiny_model.dit, tmp_path / "out" / f"lora{name}.safetensors"))
        for step, name in ((2, "-step00000002"), (3, ""))
    ]
    assert sizes == [(step, pytest.approx(share, rel=1e-4)) for step, share in expected]
    lines = re.findall(r"size of the updates relative to the weights they change: (\S+)", caplog.text)
    assert [float(line) for line in lines] == [pytest.approx(share, rel=0.05) for _, share in expected]
    assert "nothing of a LoRA is seen" not in caplog.text


@pytest.mark.parametrize("weights", list(WeightFormat))
def test_quantized_weights_count_as_what_they_stand_for(tiny_model, weights: WeightFormat) -> None:
    runtime = RuntimeSettings(weights=weights)
    transformer = hunyuan_model.load_transformer(tiny_model.dit, device=CPU, dtype=torch.float32, runtime=runtime)
    network = create_network(1.0, 4, 1.0, None, None, transformer)
    stored = load_file(tiny_model.dit)
    expected = norm(stored[f"{path}.weight"] for path in network.paths.values())
    assert measure_changed_weights(network, transformer, CPU).norm == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(("rate", "warned"), [(2e-6, True), (1e-2, False)])
def test_a_lora_that_will_do_nothing_is_warned_of_at_both_ends(train, caplog, rate: float, warned: bool) -> None:
    caplog.set_level("INFO")
    assert train("--max_train_steps", 4, "--network_dim", 32, "--learning_rate", rate).status == 0
    assert "LoRA of rank 32, alpha 1: its update is scaled by alpha / rank = 0.0312" in caplog.text
    assert ("hardly changes a LoRA" in caplog.text) == ("nothing of a LoRA is seen" in caplog.text) == warned


def test_the_scale_is_that_of_the_weights_to_start_from(train, tmp_path: Path, caplog) -> None:
    assert train("--max_train_steps", 1, "--network_dim", 2, "--network_alpha", 8, name="first").status == 0
    caplog.set_level("INFO")
    weights = ("--network_weights", tmp_path / "out" / "first.safetensors")
    for flags in (("--network_dim", 2), ("--dim_from_weights",)):
        caplog.clear()
        assert train("--max_train_steps", 1, *weights, *flags).status == 0
        assert "LoRA of rank 2, alpha 8: its update is scaled by alpha / rank = 4" in caplog.text
