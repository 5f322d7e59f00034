"""hv_train_network.py: what it refuses, before minutes are spent, in one sentence and with status 2."""

from __future__ import annotations

import argparse
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType
from safetensors.torch import load_file, save_file

import hunyuan_model
import hv_train_network
from hunyuan_model.runtime.sharding import ShardingSettings
from networks.training import loop
from networks.training.arguments import training_settings
from utils.processes.locks import sole_run
from utils.safetensors_io import read_tensors


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_an_output_folder_that_cannot_be_written_is_told_before_training(train, monkeypatch, tmp_path, place):
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("there is no /proc here")
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setattr(hv_train_network, "run_training", lambda training: pytest.fail("training began"))
    ended = train("--output_dir", tmp_path / place if not place.startswith("/") else place)
    assert ended.status == 2 and "--output_dir" in ended.stderr and "cannot be written" in ended.stderr


def test_a_broken_cache_is_one_sentence_from_a_worker(train, tmp_path):
    path = next((tmp_path / "clips").glob("clip_0*"))
    file = read_tensors(path)
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in file.tensors.items()}, path, file.metadata)
    ended = train("--max_train_epochs", 1, "--max_data_loader_n_workers", 1)
    assert ended.status == 2 and path.name in ended.stderr
    assert "Traceback" not in ended.stderr and "\nerror: " in ended.stderr


def test_lycoris_over_float8_is_refused_before_loading(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "lycoris", types.ModuleType("lycoris"))
    monkeypatch.setitem(sys.modules, "lycoris.kohya", types.ModuleType("lycoris.kohya"))
    ended = train("--network_module", "lycoris.kohya", "--fp8_base")
    assert ended.status == 2 and "leave --fp8_base" in ended.stderr


def test_out_of_memory_names_the_flags(train, monkeypatch):
    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(loop, "train_step", full)
    ended = train()
    assert ended.status == 2
    assert "out of memory while training on 2 x 32x32 (" in ended.stderr or "training on 1 x " in ended.stderr
    assert "; give --int8_base next, which saves about" in ended.stderr


def test_weights_of_another_rank_are_refused_before_loading(train, monkeypatch, tmp_path):
    assert train("--max_train_steps", 1, "--network_dim", 3).status == 0
    monkeypatch.setattr(hunyuan_model, "load_transformer", lambda *_a, **_k: pytest.fail("the model was loaded"), raising=False)
    ended = train("--network_weights", tmp_path / "out" / "lora.safetensors", "--network_dim", 5)
    assert ended.status == 2 and "has rank 3, not 5" in ended.stderr


def test_a_model_that_gives_nan_stops_before_anything_is_saved(train, tiny_model, tmp_path):
    tensors = load_file(tiny_model.dit)
    tensors["final_layer.linear.bias"][0] = float("nan")
    save_file(tensors, tmp_path / "broken.safetensors")
    ended = train("--max_train_steps", 20, dit=tmp_path / "broken.safetensors")
    assert ended.status == 1 and "the loss is nan" in ended.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"], "which says why"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--sage_attn"], "cannot train"),
        (["--sdpa", "--xformers"], "exclude each other"),
        (["--min_timestep", 600, "--max_timestep", 500], "are no range"),
        (["--max_grad_norm", -1], "of at least 0"),
        (["--network_dropout", 1.5], "not between 0 and 1"),
        (["--dim_from_weights"], "--network_weights, which is missing"),
        (["--base_weights_multiplier", 0.5], r"has more values (1) than --base_weights has files (0)"),
        (["--learning_rate", 0], "not a finite number above 0"),
        (["--network_module", "networks.nothing"], "cannot be imported"),
        (["--network_module", "json"], "no network module"),
        (["--network_args", "rank_drop=0.1"], "Did you mean 'rank_dropout'"),
        (["--optimizer_type", "adamw9bit"], "adamw9bit"),
        (["--lr_scheduler", "cosinus"], "cosinus"),
        (["--lr_scheduler_type", "torch.optim.lr_scheduler.LRScheduler"], "schedule"),
        (["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 9, "--max_train_epochs", 1], "the training has 4"),
        (["--optimizer_type", "builtins.dict"], "not a torch.optim"),
        (["--output_name", "a/b"], "path separator"),
        (["--output_name", "x" * 300], "too long"),
        (["--max_train_steps", 0], "at least 1"),
        (["--lerning_rate", 1], "--lerning_rate"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_flags_are_one_sentence_and_status_2(train, tmp_path, flags, says):
    ended = train("--max_train_steps", 1, *flags)
    assert ended.status == 2
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("flags", [["--flash_attn"], ["--xformers"], ["--mixed_precision", "fp16"]], ids=" ".join)
def test_cuda_flags_without_cuda(train, flags):
    ended = train(*flags)
    assert ended.status == 2 and "needs a CUDA device" in ended.stderr


def test_wrong_and_missing_models(train, tiny_model, tmp_path):
    vae = train(dit=tiny_model.vae)
    assert vae.status == 2 and "HunyuanVideo VAE" in vae.stderr and "--dit" in vae.stderr
    missing = train(dit=tmp_path / "none.safetensors")
    assert missing.status == 2 and "does not exist" in missing.stderr


def test_missing_caches_name_the_command(train, cached, tmp_path):
    next((tmp_path / "pictures").glob("b_1_hv_te*")).unlink()
    ended = train()
    assert ended.status == 2 and "cache_text_encoder_outputs.py" in ended.stderr and "b_1" in ended.stderr
    for path in (tmp_path / "pictures").glob("*x*_hv.safetensors"):
        path.unlink()
    ended = train()
    assert ended.status == 2 and "cache_latents.py" in ended.stderr


@pytest.mark.parametrize("what", ["channels", "text", "pooled", "odd"])
def test_caches_of_another_model_are_refused_before_loading(train, monkeypatch, tmp_path, what):
    latents, text = next((tmp_path / "pictures").glob("b_1_0*")), tmp_path / "pictures" / "b_1_hv_te.safetensors"
    path = text if what in ("text", "pooled") else latents
    file = read_tensors(path)
    changed = {
        "channels": lambda name, tensor: tensor[:4],
        "odd": lambda name, tensor: tensor[:, :, :3],
        "text": lambda name, tensor: tensor[:, :8] if name.startswith("llm_f") else tensor,
        "pooled": lambda name, tensor: tensor[:8] if name.startswith("clipL_f") else tensor,
    }[what]
    save_file({name: changed(name, tensor).contiguous() for name, tensor in file.tensors.items()}, path, file.metadata)
    monkeypatch.setattr(hunyuan_model, "load_transformer", lambda *_a, **_k: pytest.fail("the model was loaded"), raising=False)
    ended = train()
    assert ended.status == 2 and path.name in ended.stderr
    assert ("cache_text_encoder_outputs.py" if path is text else "cache_latents.py") in ended.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("flags", ["--blocks_to_swap 99", "--fp8_base --fp8_fast", "--optimizer_type LBFGS"])
def test_what_the_data_cannot_change_is_refused_before_they_are_looked_at(train, monkeypatch, flags):
    monkeypatch.setattr(hv_train_network, "load_dataset_config", lambda *_, **__: pytest.fail("looked at the datasets"))
    ended = train(*flags.split())
    assert ended.status == 2 and flags.split("--")[-1] in ended.stderr


def test_flags_with_checks_of_their_own_are_read_once(tmp_path):
    class Counting(argparse.Namespace):
        def __getattribute__(self, name):
            counts[name] += 1
            return super().__getattribute__(name)

    counts = Counter()
    needed = f"--dataset_config d --dit d --output_dir {tmp_path / 'out'} --output_name n --loss_log {tmp_path / 'loss.csv'}"
    args = hv_train_network.build_parser().parse_args(needed.split(), Counting())
    counts.clear()
    training_settings(args)
    assert counts["mixed_precision"] == counts["loss_log"] == counts["learning_rate"]


def test_what_the_launcher_cannot_train_with_is_refused(train, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    monkeypatch.setattr(hv_train_network, "build_training", lambda *_: pytest.fail("loaded"))
    ended = train("--max_train_steps", 1)
    assert ended.status == 2 and "accelerate" in ended.stderr and "fp8" in ended.stderr
    megatron = DistributedType.MEGATRON_LM
    for precision, processes, says in (("fp8", DistributedType.NO, "Use bf16"), ("no", megatron, "is set up for MEGATRON_LM")):
        fitting = types.SimpleNamespace(mixed_precision=precision, distributed_type=processes)  # as where packages for it are there
        monkeypatch.setattr("networks.training.accelerator.Accelerator", lambda fitting=fitting, **_: fitting)
        ended = train("--max_train_steps", 1)
        assert ended.status == 2 and says in ended.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "version 1 of FSDP"),
        ({"FSDP_VERSION": "2"}, "two processes or more"),
        ({"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}, "every process would hold all weights"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "is done by --gradient_checkpointing here"),
        ({"FSDP_VERSION": "2", "FSDP_IGNORED_MODULES": "img_in"}, "fsdp_ignored_modules, which has no effect"),
    ],
)
def test_of_fsdp_only_what_is_done_is_taken(train, monkeypatch, options, says):
    monkeypatch.setattr(hv_train_network, "inspect_model", lambda *_: pytest.fail("something was read"))
    for name, value in ({"ACCELERATE_USE_FSDP": "true"} | options).items():
        monkeypatch.setenv(name, value)
    ended = train("--max_train_steps", 1)
    assert ended.status == 2 and says in ended.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [(("--blocks_to_swap", "auto"), "--blocks_to_swap"), ((), "take prior_preservation out"), ((), "take it out of the prompts")],
)
def test_what_sharded_weights_exclude_is_said_before_anything_is_loaded(
    train, cached, tiny_model, tmp_path, monkeypatch, flags, says
):
    monkeypatch.setattr(hv_train_network, "build_training", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("networks.training.accelerator.ShardingSettings", lambda _, offload: ShardingSettings(2, offload))
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    if "prior" in says:
        cached.write_text(cached.read_text("utf-8").replace("batch_size = 2", "prior_preservation = true"), encoding="utf-8")
    if "prompts" in says:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a ball --w 32 --h 32 --s 4 --step_cache 0.1\n", encoding="utf-8")
        flags = ("--sample_prompts", prompts, "--vae", tiny_model.vae, "--sample_at_first")
        flags += ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
    ended = train("--max_train_steps", 1, *flags)
    assert ended.status == 2 and says in ended.stderr


def test_a_setup_that_accelerate_cannot_make_is_one_sentence(train, monkeypatch):
    def fail(**_):
        raise RuntimeError("There are currently no available devices found.")

    monkeypatch.setattr("networks.training.accelerator.Accelerator", fail)
    ended = train("--max_train_steps", 1)
    assert ended.status == 2 and "accelerate refuses this setup: There are currently no available" in ended.stderr


def test_all_missing_flags_are_named(call_script):
    ended = call_script("hv_train_network")
    assert ended.status == 2 and "--dataset_config, --dit, --output_dir, --output_name, which are missing" in ended.stderr


def test_two_trainings_do_not_share_a_name(train, monkeypatch, tmp_path):
    monkeypatch.setattr(hv_train_network, "inspect_model", lambda *_: pytest.fail("something was loaded"))
    with sole_run(tmp_path / "out" / ".lora.lock", "trains lora", ""):
        ended = train("--max_train_steps", 1)
        assert ended.status == 2 and "Traceback" not in ended.stderr
        assert f"error: another run trains lora in {tmp_path / 'out'} (process " in ended.stderr
        assert "give another --output_name or --output_dir." in ended.stderr
        monkeypatch.undo()
        assert train("--max_train_steps", 1, name="another").status == 0
    assert not list((tmp_path / "out").glob(".*"))
