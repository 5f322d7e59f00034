"""What a batch takes, as its benchmark measures it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.generation import generation, measured


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs os.wait4, which knows the peak of memory")
def test_sixty_prompts_take_the_memory_of_one_and_little_of_their_time(tmp_path: Path):
    """Latents alone, as the contact sheet of frames has a size of its own."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{number} red balls" for number in range(60)), encoding="utf-8")
    command = generation(tmp_path / "out", size=64, frames=9, steps=2, output_type="latent")
    one = measured([*command, "--prompt", "a red ball"], threads=1)
    all_of_them = measured([*command, "--from_file", str(prompts)], threads=1)
    assert len(list((tmp_path / "out").iterdir())) == 61
    assert all_of_them.peak < 1.05 * one.peak
    assert all_of_them.cpu < 60 / 8 * one.cpu
