"""The quickstart's training, whole: zorps appear, and what is no zorp stays as it was."""

from __future__ import annotations

import importlib
import shlex
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

import quickstart
from examples.toy import scoring
from examples.toy.make_concept import CONCEPT, ROOT
from examples.toy.model_files import FOLDER, files_in
from examples.toy.reading import read
from examples.toy.toy_model import ToyModel

NUMBER = 16
ORDINARY = 24

pytestmark = pytest.mark.slow  # three minutes


@pytest.fixture(scope="module")
def zorp_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by the quickstart's command on its dataset."""
    folder, files = tmp_path_factory.mktemp("zorp"), files_in(FOLDER)
    toml = folder / "dataset.toml"
    text = (CONCEPT / "dataset.toml").read_text(encoding="utf-8").replace("quickstart_output/cache", (folder / "cache").as_posix())
    assert text.count("prior_preservation = true") == 2
    toml.write_text(text, encoding="utf-8")
    call_main("cache_latents", "--dataset_config", toml, "--vae", files.vae, "--device", "cpu")
    encoders = ("--text_encoder1", files.text_encoder1, "--text_encoder2", files.text_encoder2)
    call_main("cache_text_encoder_outputs", "--dataset_config", toml, *encoders, "--device", "cpu")
    (command,) = [command for _, command in quickstart.STAGES if "hv_train_network.py" in command]
    words = shlex.split(command.replace("quickstart_output", folder.as_posix()))
    flags = words[words.index("hv_train_network.py") + 1 :]
    flags[flags.index("--dataset_config") + 1] = str(toml)
    call_main("hv_train_network", *flags)
    return folder / "lora" / "zorp.safetensors"


def call_main(script: str, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the dataset's paths begin there
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        AcceleratorState._reset_state(reset_partial_state=True)
        assert not importlib.import_module(script).main()


def zorps(model: ToyModel) -> int:
    """How many pictures of prompts about zorps show one."""
    prompts = scoring.zorp_prompts(NUMBER, frames=1, first_seed=900)
    pictures = model.generate([prompt.text for prompt in prompts], [prompt.seed for prompt in prompts], frames=1)
    return sum(read(picture).zorp for picture in pictures)


def test_zorps_appear_with_the_lora_and_never_without(zorp_lora: Path) -> None:
    assert zorps(ToyModel.load()) == 0
    found = zorps(ToyModel.load(lora=[zorp_lora]))
    assert found >= 0.75 * NUMBER, f"{found} of {NUMBER}"


def test_what_is_no_zorp_stays_as_it_was(zorp_lora: Path) -> None:
    """Held-out prompts: shapes right of pictures, of which the model without the LoRA has about 94 %."""
    prompts = scoring.held_out_prompts(ORDINARY, frames=1, first_seed=700)
    pictures = ToyModel.load(lora=[zorp_lora]).generate(
        [prompt.text for prompt in prompts], [prompt.seed for prompt in prompts], frames=1
    )
    readings = [read(picture) for picture in pictures]
    right = sum(reading.shape == prompt.attributes.shape for reading, prompt in zip(readings, prompts))
    assert right >= 0.75 * ORDINARY, f"{right} of {ORDINARY} shapes are right"
    assert not any(reading.zorp for reading in readings)
