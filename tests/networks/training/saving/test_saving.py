"""Which models and states training saves, which it removes again, and what it does with steps that are not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from networks.training import loop
from networks.training.loss.flow_matching import FlowMatching
from networks.training.report.reading import REPORT_FILE
from networks.training.saving.state import read_state_file
from networks.training.step import MAX_SKIPPED_IN_A_ROW

FINAL = ("lora.safetensors", "lora_comfyui.safetensors")


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(REPORT_FILE))


def steps(numbers: list[int], suffix: str = ".safetensors") -> list[str]:
    return [f"lora-step{number:08d}{suffix}" for number in numbers]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), []),
        (("--save_every_n_steps", 2), steps([2, 4])),
        (("--save_every_n_steps", 1, "--save_last_n_steps", 2), steps([3, 4, 5])),
        (("--save_every_n_steps", 2, "--save_last_n_steps", 2), steps([2, 4])),  # a span of steps, not a number of files
        (("--save_every_n_steps", 2, "--save_last_n_steps", 1), steps([4])),
        (("--save_every_n_steps", 2, "--save_state"), [*steps([2, 4]), *steps([2, 4], "-state"), "lora-state"]),
        (
            ("--save_every_n_steps", 1, "--save_state", "--save_last_n_steps", 3, "--save_last_n_steps_state", 1),
            [*steps([2, 3, 4, 5]), *steps([4, 5], "-state"), "lora-state"],
        ),
        (("--save_state_on_train_end",), ["lora-state"]),
        (("--save_every_n_epochs", 1), ["lora-000001.safetensors"]),
        (("--save_every_n_epochs", 1, "--save_state"), ["lora-000001.safetensors", "lora-000001-state", "lora-state"]),
    ],
)
def test_what_is_saved_and_kept(train, tmp_path: Path, flags: tuple, expected: list[str]) -> None:
    assert train("--max_train_steps", 6, *flags).status == 0
    assert saved(tmp_path / "out") == sorted([*expected, *FINAL])


def test_of_epochs_the_last_ones_stay(train, tmp_path: Path) -> None:
    rules = ("--save_every_n_epochs", 1, "--save_last_n_epochs", 2, "--save_state", "--save_last_n_epochs_state", 1)
    assert train("--max_train_epochs", 5, *rules).status == 0
    models, states = ["lora-000003.safetensors", "lora-000004.safetensors"], ["lora-000004-state"]
    assert saved(tmp_path / "out") == sorted([*models, *states, *FINAL, "lora-state"])


def test_models_of_other_runs_and_requested_ones_stay(train, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    others = [
        "lora-step00000001.safetensors",
        "lora2-step00000002.safetensors",
        "lora-step2.safetensors",
        "xlora-000001.safetensors",
    ]
    for name in others:
        (out / name).touch()
    assert train("--max_train_steps", 8, "--save_every_n_steps", 2, "--save_last_n_steps", 1).status == 0
    assert set(others) <= set(saved(out))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--save_last_n_steps", 2), "--save_every_n_steps"),
        (("--save_last_n_epochs", 2), "--save_every_n_epochs"),
        (("--save_last_n_steps_state", 2, "--save_every_n_steps", 1), "--save_state"),
        (("--save_last_n_epochs_state", 2, "--save_state"), "--save_every_n_epochs"),
    ],
)
def test_limits_for_what_is_never_saved_are_refused(train, flags: tuple, says: str) -> None:
    ended = train(*flags)
    assert ended.status == 2 and f"give {says} as well" in ended.stderr


@pytest.mark.parametrize(("precision", "dtype"), [("float", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_models_are_saved_in_the_precision_asked_for(train, tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    assert train("--max_train_steps", 1, "--save_precision", precision).status == 0
    weights = load_file(tmp_path / "out" / "lora.safetensors")
    assert {value.dtype for name, value in weights.items() if ".lora_" in name} == {dtype}


# ---------------------------------------------------------------------------------------------------------------------
# Steps that are not finite


@pytest.fixture
def not_finite(monkeypatch):
    """``not_finite(lambda number: ..., kind)`` makes the losses (or their gradients) of the batches chosen by number NaN."""

    def arrange(chosen, kind: str) -> None:
        plain, count = FlowMatching.loss_at, iter(range(1, 1000))

        def sometimes(*arguments):
            loss = plain(*arguments)
            if not chosen(next(count)):
                return loss
            if kind == "loss":
                return loss * float("nan")
            loss.register_hook(lambda gradient: gradient * float("inf"))
            return loss

        monkeypatch.setattr(FlowMatching, "loss_at", sometimes)

    return arrange


def test_ten_in_a_row_end_the_training_and_what_was_saved_stays(train, tmp_path: Path, not_finite, caplog) -> None:
    not_finite(lambda number: number > 3, "loss")
    ended = train("--max_train_steps", 50, "--save_every_n_steps", 2, "--save_state")
    assert (
        ended.status == 1
        and f"{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped" in ended.stderr
        and "Traceback" not in ended.stderr
    )
    assert {"lora-step00000002.safetensors", "lora-step00000002-state"} <= set(saved(tmp_path / "out"))
    assert "lora.safetensors" not in saved(tmp_path / "out")
    assert caplog.text.count("was skipped: ") == MAX_SKIPPED_IN_A_ROW


def test_a_row_of_skipped_steps_goes_on_in_a_resumed_training(train, tmp_path: Path, not_finite, caplog) -> None:
    not_finite(lambda number: number > 3, "loss")
    flags = ("--max_train_steps", 50, "--save_every_n_steps", 1, "--save_state")
    whole = train(*flags)
    assert whole.status == 1 and "step 13 was skipped" in caplog.text
    state = tmp_path / "out" / "lora-step00000007-state"
    assert read_state_file(state).progress.skipped == 4

    caplog.clear()
    again = train(*flags, "--resume", state, name="again")  # no batch is finite from now on
    assert again.status == 1 and again.stderr.splitlines()[-1] == whole.stderr.splitlines()[-1]
    assert caplog.text.count("was skipped: ") == MAX_SKIPPED_IN_A_ROW - 4 and "step 13 was skipped" in caplog.text


def test_a_step_that_the_scaler_skips_is_named_and_counted(train, monkeypatch, caplog) -> None:
    skipped = iter([False, True, False, *[True] * MAX_SKIPPED_IN_A_ROW])
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda accelerator: next(skipped)))
    ended = train("--max_train_steps", 50)
    assert ended.status == 1 and f"{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped" in ended.stderr
    lines = [message for message in caplog.messages if "was skipped" in message]
    assert len(lines) == 1 + MAX_SKIPPED_IN_A_ROW and "step 2 was skipped: the gradient is too large for fp16" in lines[0]


def test_weights_that_are_not_finite_are_not_saved_and_remove_nothing(train, tmp_path: Path, monkeypatch) -> None:
    step, made = loop.train_step, []

    def poisoned(training, batches):
        made.append(step(training, batches))
        if len(made) == 4:
            with torch.no_grad():
                next(training.network.parameters()).fill_(float("nan"))
        return made[-1]

    monkeypatch.setattr(loop, "train_step", poisoned)
    flags = ("--save_every_n_steps", 1, "--save_last_n_steps", 1, "--save_state")
    ended = train("--max_train_steps", 9, *flags)
    assert ended.status == 1 and "after step 4" in ended.stderr and "are not saved" in ended.stderr
    kept = saved(tmp_path / "out")
    assert "lora-step00000003.safetensors" in kept and "lora-step00000003-state" in kept
    assert not [name for name in kept if "00000004" in name] and "lora.safetensors" not in kept


def test_nine_in_a_row_do_not(train, tmp_path: Path, not_finite) -> None:
    not_finite(lambda number: number % 10 != 0, "gradient")
    assert train("--max_train_steps", 21).status == 0
