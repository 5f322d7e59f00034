"""Metadata of trained files: the keys that other programs read, as text."""

from __future__ import annotations

import json
import random

import pytest
import torch

from dataset.batches.report import DataFacts
from networks.formats.writing import tensor_hashes
from networks.training.saving.metadata import finished_metadata, new_session_id, training_metadata
from utils.safetensors_io import read_header

SS_KEYS = """
 ss_session_id ss_training_started_at ss_output_name ss_learning_rate ss_num_train_items ss_num_batches_per_epoch
ss_num_epochs ss_gradient_checkpointing ss_gradient_accumulation_steps ss_max_train_steps ss_lr_warmup_steps
ss_lr_scheduler ss_base_model_version ss_network_module ss_network_dim ss_network_alpha ss_network_dropout
ss_network_args ss_mixed_precision ss_seed ss_training_comment ss_optimizer ss_max_grad_norm ss_fp8_base ss_int8_base ss_fp8_scaled
ss_fp8_fast ss_fp8_llm ss_weighting_scheme ss_logit_mean ss_logit_std ss_mode_scale ss_guidance_scale
ss_timestep_sampling ss_sigmoid_scale ss_discrete_flow_shift ss_datasets ss_sd_model_name ss_vae_name
ss_training_finished_at ss_steps ss_epoch
"""


def arguments(**changed) -> dict[str, object]:
    values = {
        "output_name": "zorp",
        "learning_rate": 1e-3,
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
        "lr_warmup_steps": "10%",
        "lr_scheduler": "cosine",
        "network_module": "networks.lora",
        "network_dim": None,
        "network_alpha": 1.0,
        "network_dropout": None,
        "mixed_precision": None,
        "seed": 42,
        "training_comment": "a stripéd star",
        "max_grad_norm": 1.0,
        "fp8_base": False,
        "int8_base": False,
        "fp8_scaled": True,
        "fp8_fast": False,
        "fp8_llm": True,
        "weighting_scheme": "none",
        "logit_mean": 0.0,
        "logit_std": 1.0,
        "mode_scale": 1.29,
        "guidance_scale": 1.0,
        "timestep_sampling": "sigmoid",
        "sigmoid_scale": 1.0,
        "discrete_flow_shift": 1.0,
        "dit": "/models/some folder/dit.safetensors",
        "vae": "/models/vae.pt",
        "no_metadata": False,
        "min_timestep": None,
        "max_timestep": None,
    }
    return values | changed


DATA = DataFacts(12, (960, 544), ({"num_repeats": 1, "resolution": (960, 544), "caption": "é"},))
KNOWN = {
    "session_id": "5",
    "training_started_at": 1700000000.5,
    "num_batches_per_epoch": 6,
    "num_epochs": 16,
    "max_train_steps": 48,
    "optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
    "network_dim": 4,
    "mixed_precision": "bf16",
}


def started(network_args: dict[str, str] | None = None, **changed: object) -> dict[str, str]:
    return training_metadata(arguments(**changed), DATA, KNOWN, network_args or {})


def test_every_key_is_there_and_is_text():
    start = started({"loraplus_lr_ratio": "4"})
    metadata = finished_metadata(start, steps=48, epoch=16, now=1700000100.0)
    assert {key for key in metadata if key.startswith("ss_")} == set(SS_KEYS.split())
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata["ss_base_model_version"] == "hunyuan_video"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["ss_network_dropout"]) == ("4", "1.0", "None")
    assert (metadata["ss_sd_model_name"], metadata["ss_vae_name"]) == ("dit.safetensors", "vae.pt")
    assert (metadata["ss_mixed_precision"], metadata["ss_gradient_checkpointing"]) == ("bf16", "True")
    assert json.loads(metadata["ss_network_args"]) == {"loraplus_lr_ratio": "4"}
    assert json.loads(metadata["ss_datasets"]) == [{"num_repeats": 1, "resolution": [960, 544], "caption": "é"}]
    assert (metadata["ss_steps"], metadata["ss_epoch"], metadata["ss_training_finished_at"]) == ("48", "16", "1700000100.0")


def test_modelspec_keys():
    given = {"metadata_title": None, "metadata_author": "Ann", "metadata_tags": "a, b", "metadata_license": None}
    metadata = finished_metadata(started(**given, min_timestep=100), steps=1, epoch=1, now=1700000000)
    spec = {key.removeprefix("modelspec."): value for key, value in metadata.items() if key.startswith("modelspec.")}
    assert spec == {
        "sai_model_spec": "1.0.0",
        "architecture": "hunyuan-video/lora",
        "implementation": "https://github.com/Tencent/HunyuanVideo",
        "title": "zorp",
        "resolution": "960x544",
        "author": "Ann",
        "tags": "a, b",
        "timestep_range": "100,1000",
        "date": "2023-11-14T22:13:20+00:00",
    }


def test_no_metadata_keeps_what_loaders_need():
    start = started(no_metadata=True)
    kept = {"ss_base_model_version", *(f"ss_network_{name}" for name in ("module", "dim", "alpha", "dropout", "args"))}
    assert set(start) == kept
    assert finished_metadata(start, steps=3, epoch=1, now=0.0) == start


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"lr_scheduler_type": ""}, "cosine"),
        ({"lr_scheduler_type": "torch.optim.lr_scheduler.StepLR"}, "torch.optim.lr_scheduler.StepLR"),
    ],
)
def test_the_schedule_is_the_class_where_one_is_given(changed, expected):
    assert started(**changed)["ss_lr_scheduler"] == expected


def test_session_id_leaves_the_seeded_generators_alone():
    random.seed(1)
    state = random.getstate()
    assert new_session_id() != new_session_id() and random.getstate() == state


def test_metadata_survives_saving(train, tmp_path):
    assert train("--max_train_steps", 1, "--training_comment", "a stripéd star").status == 0
    stored = read_header(tmp_path / "out" / "lora.safetensors").metadata
    hashes = {"sshs_model_hash", "sshs_legacy_hash"}
    assert {key for key in stored if key.startswith("ss")} == {*SS_KEYS.split(), *hashes} - {"ss_vae_name"}
    assert (stored["ss_training_comment"], stored["ss_seed"], stored["ss_steps"]) == ("a stripéd star", "3", "1")


def test_hashes_follow_the_tensors_and_not_the_metadata():
    tensors = {"a": torch.arange(6.0)}
    first = tensor_hashes(tensors, {})
    assert tensor_hashes({"a": torch.arange(6.0)}, {"ss_seed": "1"})["sshs_model_hash"] == first["sshs_model_hash"]
    assert tensor_hashes({"a": torch.arange(6.0) + 1}, {})["sshs_model_hash"] != first["sshs_model_hash"]
    assert first["sshs_legacy_hash"] == "e3b0c442"  # SHA-256 of nothing: the file ends before 1 MiB
