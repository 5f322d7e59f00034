"""A batch that is killed at any moment and started again leaves the same files as one that nobody killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from killing import run_plan
from PIL import Image
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, to start the same script quickly many times"),
]
PROMPTS = 24


def results(folder: Path) -> Iterator[Path]:
    """All files but those that a killed run left half-written, whose names, or whose folders', begin with a dot."""
    paths = sorted(folder.rglob("*"))
    return (path for path in paths if path.is_file() and not any(part[0] == "." for part in path.relative_to(folder).parts))


def content(path: Path) -> bytes:
    if path.suffix == ".html":  # whose commands name the folder
        return path.read_bytes()[-8:]
    if path.suffix == ".png":
        with Image.open(path) as picture:
            return np.asarray(picture).tobytes()
    if path.suffix == ".safetensors":
        return load_file(path)["latent"].numpy().tobytes()
    with av.open(str(path)) as clip:
        return b"".join(frame.to_ndarray(format="rgb24").tobytes() for frame in clip.decode(video=0))


@pytest.mark.parametrize("flags", ["--output_type images", "--output_type both", "--output_type images --decode_on_cpu"])
def test_a_killed_batch_is_made_good_by_another_run(tiny_model, tmp_path: Path, flags: str) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{number} red balls --f {1 + 4 * (number % 2)}" for number in range(PROMPTS)), encoding="utf-8")

    def arguments(folder: Path) -> list[object]:
        return [
            *("--dit", tiny_model.dit, "--vae", tiny_model.vae, "--device", "cpu", "--save_path", folder, "--skip_existing"),
            *("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2, "--from_file", prompts),
            *("--video_size", 32, 32, "--infer_steps", 1, "--seed", 5, *flags.split()),
        ]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_plan(tmp_path, "hv_generate_video", arguments(whole), arguments(killed), (whole, killed), kills=12, share=1 / PROMPTS)
    first, second = ({path.relative_to(folder): content(path) for path in results(folder)} for folder in (whole, killed))
    assert first.keys() == second.keys() and len(first) >= PROMPTS
    assert all(first[name] == second[name] for name in first)
