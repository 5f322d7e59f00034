"""Ctrl-C at any moment ends a script in a word and with status 130; a training that made a step saves first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ("cache_latents", "cache_text_encoder_outputs", "hv_train_network", "hv_generate_video", "convert_lora")


@pytest.mark.parametrize("script", SCRIPTS)
def test_while_libraries_are_imported(script: str, tmp_path: Path) -> None:
    # Stands for torch, and is interrupted while it is imported.
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n", encoding="utf-8")
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(tmp_path), str(ROOT)]}; import {script}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


def test_before_the_first_step_there_is_nothing_to_save(train, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("hunyuan_model.load_transformer", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    ended = train()
    assert ended.status == 130 and "interrupted" in ended.stderr and "Traceback" not in ended.stderr
    assert not list((tmp_path / "out").glob("lora*"))


@pytest.mark.slow
def test_a_terminal_interrupts_a_training_and_its_workers(tiny_model, cached: Path, tmp_path: Path) -> None:
    log = tmp_path / "stderr.txt"
    command = [
        *(sys.executable, "hv_train_network.py", "--dit", tiny_model.dit, "--dataset_config", cached),
        *("--output_dir", tmp_path / "out", "--output_name", "lora", "--max_train_steps", 100000),
        *("--max_data_loader_n_workers", 2, "--loss_log", tmp_path / "loss.csv"),
    ]
    with log.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=stderr, stdout=stderr, start_new_session=True)
        while process.poll() is None and not (tmp_path / "loss.csv").is_file():
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers, too
        status = process.wait(60)
    text = log.read_text(encoding="utf-8")
    assert status == 130 and "Traceback" not in text and "go on with: " in text, text
    saved = sorted(path.name.partition("-step")[2][8:] for path in (tmp_path / "out").glob("*-step*"))
    assert saved == ["-state", ".safetensors"]
