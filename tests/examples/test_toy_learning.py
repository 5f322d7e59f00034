"""A LoRA learns on the toy model: what it was shown appears, through the scripts that a user runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from examples.toy import scoring
from examples.toy.make_concept import CONCEPT
from examples.toy.model_files import FOLDER, files_in
from examples.toy.reading import read
from examples.toy.toy_model import ToyModel

NUMBER = 16
PICTURES_TOML = """
[general]
resolution = [64, 64]
caption_extension = ".txt"
batch_size = 4
[[datasets]]
image_directory = '{pictures}'
cache_directory = '{cache}'
"""


@pytest.fixture
def zorp_lora(call_script, tmp_path: Path) -> Path:
    """Trained on the ten pictures of the quickstart's data set alone, for a few seconds."""
    files = files_in(FOLDER)
    toml = tmp_path / "pictures.toml"
    toml.write_text(PICTURES_TOML.format(pictures=CONCEPT / "pictures", cache=tmp_path / "cache"), encoding="utf-8")
    data, device = ("--dataset_config", toml), ("--device", "cpu")
    assert call_script("cache_latents", *data, "--vae", files.vae, *device).status == 0
    encoders = ("--text_encoder1", files.text_encoder1, "--text_encoder2", files.text_encoder2)
    assert call_script("cache_text_encoder_outputs", *data, *encoders, *device).status == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = (
        "--network_dim",
        16,
        "--network_alpha",
        16,
        "--learning_rate",
        "3e-3",
        "--network_args",
        "include_patterns=['.*mod.*']",
    )
    flags += ("--timestep_sampling", "shift", "--discrete_flow_shift", 3, "--max_train_steps", 250, "--lr_scheduler", "cosine")
    output = ("--output_dir", tmp_path, "--output_name", "zorp", "--max_data_loader_n_workers", 0, "--seed", 1)
    ended = call_script("hv_train_network", *data, "--dit", files.dit, *flags, *output)
    assert ended.status == 0, ended.stderr
    return tmp_path / "zorp.safetensors"


def zorps(model: ToyModel) -> int:
    """How many pictures of prompts about zorps show one."""
    prompts = scoring.zorp_prompts(NUMBER, frames=1, first_seed=900)
    pictures = model.generate([prompt.text for prompt in prompts], [prompt.seed for prompt in prompts], frames=1)
    return sum(read(picture).zorp for picture in pictures)


@pytest.mark.slow
def test_zorps_appear_with_the_lora_and_never_without(zorp_lora: Path) -> None:
    assert zorps(ToyModel.load()) == 0
    assert zorps(ToyModel.load(lora=[zorp_lora])) >= NUMBER // 2
