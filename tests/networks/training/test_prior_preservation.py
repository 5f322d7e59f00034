"""``prior_preservation`` in the dataset file: the network learns to change nothing for such captions."""

from __future__ import annotations

import types
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import hunyuan_model
from dataset import load_dataset_config
from dataset.batches.batches import read_batch
from dataset.batches.cached_items import find_cached_items, hold_out
from dataset.batches.order import BatchOrder
from dataset.batches.reading import EpochReader, HeldOut
from networks import lora
from networks.network_module import create_network, network_off, require_switch
from networks.training.loss.flow_matching import FlowMatching
from networks.training.loss.timestep_sampling import TimestepSampler, TimestepSettings
from utils.errors import UserError

CPU = torch.device("cpu")


def preserving(toml: Path, *numbers: int) -> Path:
    """The dataset file with prior preservation in these of its datasets, counted from 0."""
    head, *tables = toml.read_text(encoding="utf-8").split("[[datasets]]")
    tables = [f"\nprior_preservation = true{table}" if number in numbers else table for number, table in enumerate(tables)]
    changed = toml.with_name("preserving.toml")
    changed.write_text("[[datasets]]".join([head, *tables]), encoding="utf-8")
    return changed


def groups_of(toml: Path):
    return find_cached_items(load_dataset_config(toml, require_media=False))


@pytest.fixture
def setting(tiny_model):
    """The tiny model with a LoRA that does something, and the losses of both."""
    transformer = hunyuan_model.load_transformer(tiny_model.dit, device=CPU, dtype=torch.float32)
    network = create_network(lora, transformer, dim=2, alpha=2.0, dropout=None, network_args={})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in network.loras():
            module.lora_up.weight.copy_(torch.randn(module.lora_up.weight.shape, generator=generator) * 0.1)
    sampler = TimestepSampler(TimestepSettings(), torch.Generator().manual_seed(1))
    losses = FlowMatching(
        transformer,
        Accelerator(cpu=True),
        sampler,
        torch.Generator().manual_seed(2),
        torch.float32,
        6.0,
        partial(network_off, network),
    )
    return types.SimpleNamespace(transformer=transformer, network=network, losses=losses)


def test_the_loss_is_the_distance_from_the_model_without_the_network(setting, cached):
    batch = read_batch(groups_of(preserving(cached, 0))[0].items[:1])
    assert batch["prior_preservation"]
    t, generator = torch.tensor([0.6]), torch.Generator().manual_seed(4)
    noise = torch.randn(batch["latents"].shape, generator=generator)
    loss = setting.losses.loss_at(batch, noise, t)

    noisy = (1 - t) * batch["latents"].float() * 0.476986 + t * noise
    rest = (1000 * t, batch["text_states"].float(), batch["text_mask"], batch["text_states_2"].float(), torch.tensor([6000.0]))
    with torch.no_grad():
        changed = setting.transformer(noisy, *rest)
        for module in setting.network.loras():
            module.lora_up.weight.zero_()
        untouched = setting.transformer(noisy, *rest)
    assert loss.item() == pytest.approx((changed - untouched).square().mean().item(), rel=1e-4) and loss.item() > 1e-4


def test_a_network_that_does_nothing_yet_has_no_loss_and_only_it_learns(setting, cached):
    batch = read_batch(groups_of(preserving(cached, 0))[0].items[:1])
    setting.losses.loss_at(batch, *setting.losses.sample(batch["latents"].shape)).backward()
    assert all(module.lora_down.weight.grad.abs().max() > 0 for module in setting.network.loras())
    assert {module.multiplier for module in setting.network.loras()} == {1.0}
    with torch.no_grad():
        for module in setting.network.loras():
            module.lora_up.weight.zero_()
    assert setting.losses.loss_at(batch, *setting.losses.sample(batch["latents"].shape)).item() == 0


def test_the_network_is_back_after_an_error_inside(setting):
    with pytest.raises(KeyError), network_off(setting.network):
        assert {module.multiplier for module in setting.network.loras()} == {0.0}
        raise KeyError
    assert {module.multiplier for module in setting.network.loras()} == {1.0}


def drift(dit: Path, cached: Path, weights: Path) -> float:
    """How far a LoRA moves what the model predicts for the clips, as a mean square."""
    transformer = hunyuan_model.load_transformer(dit, device=CPU, dtype=torch.float32)
    options = {"dim": None, "alpha": 1.0, "dropout": None, "network_args": {}, "dim_from_weights": True}
    network = create_network(lora, transformer, **options, weights=weights)
    timesteps = TimestepSampler(TimestepSettings(), torch.Generator())
    losses = FlowMatching(
        transformer, Accelerator(cpu=True), timesteps, None, torch.float32, 1.0, partial(network_off, network)
    )  # fmt: skip
    items = [item for group in groups_of(preserving(cached, 1)) for item in group.items if item.prior_preservation]
    batches, generator = HeldOut(items), torch.Generator().manual_seed(9)
    with torch.no_grad():
        found = [
            losses.loss_at(batch, torch.randn(batch["latents"].shape, generator=generator), torch.tensor([t]))
            for batch in batches
            for t in (0.3, 0.6, 0.9)
        ]
    return torch.stack(found).mean().item()


@pytest.mark.slow
def test_training_leaves_alone_what_it_is_to_preserve(train, tiny_model, cached, tmp_path):
    """Pictures are trained on, clips preserved: those move far less than by training on both, or on the pictures alone."""
    flags = ("--max_train_steps", 40, "--learning_rate", 5e-3, "--network_dim", 4)
    files, both = {}, cached.read_text(encoding="utf-8").split("[[datasets]]")
    alone = tmp_path / "alone.toml"
    alone.write_text("[[datasets]]".join(both[:2]), encoding="utf-8")
    for name, toml in {"both": cached, "alone": alone, "preserving": preserving(cached, 1)}.items():
        ended = train(*flags, name=name, dataset=toml)
        assert ended.status == 0, ended.stderr
        files[name] = drift(tiny_model.dit, cached, tmp_path / "out" / f"{name}.safetensors")
        assert ("prior preservation: the model" in ended.stdout) is (name == "preserving")
    assert files["preserving"] < 0.5 * min(files["alone"], files["both"]), files


def test_nothing_of_it_is_held_out(cached):
    assert len(hold_out(groups_of(cached), 0.5, seed=1)[1]) == 2
    with pytest.raises(UserError, match="every dataset without prior_preservation has only one"):
        hold_out(groups_of(preserving(cached, 0)), 0.5, seed=1)


def test_something_must_be_left_to_learn(train, cached):
    ended = train(dataset=preserving(cached, 0, 1))
    assert ended.status == 2 and "nothing to learn" in ended.stderr and "Traceback" not in ended.stderr


def test_it_is_a_switch_of_single_data_sets(cached):
    wrong = preserving(cached, 0)
    wrong.write_text(wrong.read_text("utf-8").replace("prior_preservation = true", "prior_preservation = 1"), encoding="utf-8")
    with pytest.raises(UserError, match="prior_preservation = 1 must be true or false"):
        load_dataset_config(wrong, require_media=False)
    wrong.write_text("[general]\nprior_preservation = true\n[[datasets]]\nimage_directory = 'x'\n", encoding="utf-8")
    with pytest.raises(UserError, match="cannot stand here"):
        load_dataset_config(wrong, require_media=False)


def test_a_network_without_a_switch_is_refused():
    with pytest.raises(UserError, match="set_multiplier"):
        require_switch(torch.nn.Linear(2, 2), "foreign_network")


def test_a_state_tells_what_was_preserved(cached):
    """Or a training would go on from it without a word, learning what it preserved before."""
    fingerprints = []
    for numbers in ((), (0,), (1,)):
        groups = groups_of(preserving(cached, *numbers))
        fingerprints.append(EpochReader(groups, BatchOrder(groups, 1), 0, False).fingerprint())
    assert len(set(fingerprints)) == 3
