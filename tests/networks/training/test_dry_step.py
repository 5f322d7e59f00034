"""The dry step: the largest batch is tried before training, which does not feel it."""

from __future__ import annotations

import pytest
import torch
from conftest import write_caches
from safetensors.torch import load_file

from dataset import load_dataset_config
from dataset.batches.batches import largest_batch
from dataset.batches.cached_items import find_cached_items
from hunyuan_model.runtime.memory import BatchSize
from networks.training import loop
from networks.training.dry_step import wants_dry_step
from networks.training.loss.flow_matching import FlowMatching
from tiny.make_model import TRANSFORMER


@pytest.mark.parametrize(
    ("choice", "device", "wanted"),
    [("auto", "cpu", False), ("auto", "cuda", True), ("always", "cpu", True), ("never", "cuda", False)],
)
def test_gpus_are_tried_unless_flags_say_otherwise(choice: str, device: str, wanted: bool) -> None:
    assert wants_dry_step(choice, torch.device(device)) is wanted


@pytest.mark.parametrize(
    "flags",
    [
        "--network_dropout 0.5 --network_args rank_dropout=0.3 module_dropout=0.2 --num_timestep_buckets 4",
        pytest.param(
            "--gradient_checkpointing --blocks_to_swap 4 --gradient_accumulation_steps 2 --optimizer_type SGD",
            marks=pytest.mark.slow,
        ),
        pytest.param("--mixed_precision bf16 --int8_base", marks=pytest.mark.slow),
    ],
)
def test_the_training_is_the_same_to_the_bit(train, tmp_path, flags: str) -> None:
    for name in ("always", "never"):
        log = ("--loss_log", tmp_path / f"{name}.csv")
        ended = train("--max_train_steps", 4, "--learning_rate", 1e-2, "--dry_step", name, *log, *flags.split(), name=name)
        assert ended.status == 0, ended.stderr
    assert (tmp_path / "always.csv").read_text("utf-8") == (tmp_path / "never.csv").read_text("utf-8")
    ours, plain = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("always", "never"))
    assert ours.keys() == plain.keys() and all(torch.equal(ours[key], plain[key]) for key in ours)


@pytest.mark.slow
def test_a_resumed_training_is_the_same_to_the_bit(train, tmp_path) -> None:
    flags = ("--learning_rate", 1e-2, "--save_state", "--save_every_n_steps", 2)
    assert train("--max_train_steps", 4, *flags, name="whole").status == 0
    again = ("--resume", tmp_path / "out" / "whole-step00000002-state", "--dry_step", "always")
    assert train("--max_train_steps", 4, *flags, *again, name="whole").status == 0
    first = load_file(tmp_path / "out" / "whole.safetensors")
    assert train("--max_train_steps", 4, *flags, name="plain").status == 0
    plain = load_file(tmp_path / "out" / "plain.safetensors")
    assert all(torch.equal(first[key], plain[key]) for key in plain)


def test_the_largest_batch_is_tried_first_and_leaves_no_gradients(train, monkeypatch) -> None:
    seen = []
    plain = FlowMatching.loss_at

    def note(flow_matching, batch, noise, t):
        seen.append((tuple(batch["latents"].shape), t.tolist()))
        return plain(flow_matching, batch, noise, t)

    def step(training, _batches):
        assert all(parameter.grad is None for parameter in training.network.parameters())
        assert not training.optimizer.state_dict()["state"]
        raise KeyboardInterrupt

    monkeypatch.setattr(FlowMatching, "loss_at", note)
    monkeypatch.setattr(loop, "train_step", step)
    assert train("--dry_step", "always").status == 130
    assert seen == [((2, 16, 1, 4, 4), [0.5, 0.5])]


def test_out_of_memory_in_the_dry_step_explain_batch_out_of_memory_and_the_next_flag(train, monkeypatch) -> None:
    def full(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(FlowMatching, "loss_at", full)
    ended = train("--dry_step", "always", "--gradient_checkpointing")
    assert ended.status == 2
    assert "out of memory while trying the largest batch, 2 x 32x32 (c.x_0032x0032_hv.safetensors, b_1_" in ended.stderr
    assert "; give --int8_base next, which saves about" in ended.stderr


def test_the_largest_batch_has_the_most_tokens_and_the_longest_captions(tmp_path) -> None:
    items = dict.fromkeys("abcde", (1, 8, 8))  # the captions have 3, 7, 11, 15 and 19 rows
    write_caches(tmp_path / "many", items)
    write_caches(tmp_path / "large", {"one": (1, 8, 16)})
    toml = tmp_path / "dataset.toml"

    def largest(batch_size: int, repeats: int = 1):
        toml.write_text(
            f"""
[general]
resolution = [64, 64]
[[datasets]]
image_directory = '{tmp_path / "gone"}'
cache_directory = '{tmp_path / "many"}'
batch_size = {batch_size}
[[datasets]]
image_directory = '{tmp_path / "gone_too"}'
cache_directory = '{tmp_path / "large"}'
batch_size = 4
num_repeats = {repeats}
""",
            encoding="utf-8",
        )
        return largest_batch(find_cached_items(load_dataset_config(toml, require_media=False)), TRANSFORMER)

    assert largest(2).size == BatchSize(2, (1, 8, 8), 19)  # 2 x (16 + 19) tokens, against 32 + 3
    assert [item.stem for item in largest(2).items] == ["e", "d"]
    assert largest(1).size == BatchSize(1, (1, 8, 16), 3) or largest(1).size == BatchSize(1, (1, 8, 8), 19)
    assert largest(1, repeats=3).size == BatchSize(3, (1, 8, 16), 3)  # a batch may hold an item and its repeats
    assert largest(2).load()["text_states"].shape[:2] == (2, 19)
    assert largest(1, repeats=3).load()["names"] == ["one_0128x0064_hv.safetensors"] * 3
