"""States that were changed after they were saved: each is refused by name in one sentence, and ``latest`` skips it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from networks.training.loss.timestep_sampling import TimestepSampler, TimestepSettings
from networks.training.saving.latest import find_latest_state, next_lineage
from networks.training.saving.state import Progress, Restorable, StateFile, load_state, read_state_file, save_state
from utils.checksums import checksum, file_checksum
from utils.errors import UserError

FLAGS = ("--learning_rate", 1e-2, "--max_train_steps", 4, "--optimizer_type", "AdamW", "--lr_scheduler", "cosine")
STATES = ("--save_state", "--save_every_n_steps", 1)
LAST = "lora-step00000003-state"

# Changes of state.json that are made with whole files beside it.
NUMBERS: dict[str, Any] = {"text": "x", "negative": -1, "none": None, "list": [1], "huge": 10**30, "infinite": float("inf")}
FIELDS = {
    **{
        f"{field} {kind}": (("progress", field), value) for field in ("step", "epoch", "batches") for kind, value in NUMBERS.items()
    },
    **{
        f"losses {kind}": (("progress", "losses"), value)
        for kind, value in {"text": "x", "of texts": ["x"], "of lists": [[1]]}.items()
    },
    "log_runs of numbers": (("progress", "log_runs"), {"tensorboard": 1}),
    "session_id number": (("progress", "session_id"), 3),
    "seed text": (("seed",), "1"),
    "seed negative": (("seed",), -1),
    "seed true": (("seed",), True),
    "saved_at infinite": (("saved_at",), float("inf")),
    "lineage list": (("lineage",), []),
    "optimizer none": (("optimizer",), None),
    "order list": (("order",), [1]),
    "flags none": (("flags",), None),
    "files outside": (("files", "../x"), 1),
    "files with texts": (("files", "optimizer.pt"), "1"),
    "checksums with numbers": (("checksums", "optimizer.pt"), 1),
}


def change_optimizer(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(state: Path) -> None:
        states = torch.load(state / "optimizer.pt", weights_only=True)
        change(states)
        torch.save(states, state / "optimizer.pt")

    return apply


def change_network(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(state: Path) -> None:
        tensors = load_file(state / "network.safetensors")
        change(tensors)
        save_file(tensors, state / "network.safetensors")

    return apply


def change_random(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(state: Path) -> None:
        states = torch.load(state / "random-0.pt", weights_only=True)
        change(states)
        torch.save(states, state / "random-0.pt")

    return apply


def first(tensors: dict) -> str:
    return next(iter(tensors))


# Changes of the other files, whose sizes and checksums are made to fit: whoever wants to can do that.
CONTENTS = {
    "optimizer is a list": change_optimizer(lambda s: s.update(optimizer=[1])),
    "no optimizer": change_optimizer(lambda s: s.pop("optimizer")),
    "no param_groups": change_optimizer(lambda s: s["optimizer"].pop("param_groups")),
    "fewer parameters": change_optimizer(lambda s: s["optimizer"]["param_groups"][0]["params"].pop()),
    "lr is a text": change_optimizer(lambda s: s["optimizer"]["param_groups"][0].update(lr="x")),
    "betas are one": change_optimizer(lambda s: s["optimizer"]["param_groups"][0].update(betas=(0.9,))),
    "betas are texts": change_optimizer(lambda s: s["optimizer"]["param_groups"][0].update(betas=("a", "b"))),
    "eps is a list": change_optimizer(lambda s: s["optimizer"]["param_groups"][0].update(eps=[1])),
    "state of no parameter": change_optimizer(lambda s: s["optimizer"]["state"].update({9999: {}})),
    "state under a text": change_optimizer(lambda s: s["optimizer"]["state"].update(x={})),
    "state is a number": change_optimizer(lambda s: s["optimizer"]["state"].update({0: 1})),
    "exp_avg of another shape": change_optimizer(lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(3))),
    "exp_avg_sq is empty": change_optimizer(lambda s: s["optimizer"]["state"][0].update(exp_avg_sq=torch.zeros(0))),
    "step is a text": change_optimizer(lambda s: s["optimizer"]["state"][0].update(step="x")),
    "schedule is none": change_optimizer(lambda s: s.update(lr_scheduler=None)),
    "last_epoch is a text": change_optimizer(lambda s: s["lr_scheduler"].update(last_epoch="x")),
    "base_lrs are fewer": change_optimizer(lambda s: s["lr_scheduler"].update(base_lrs=[])),
    "base_lrs are texts": change_optimizer(lambda s: s["lr_scheduler"].update(base_lrs=["x"])),
    "a tensor is missing": change_network(lambda t: t.pop(first(t))),
    "a tensor of another shape": change_network(lambda t: t.update({first(t): torch.zeros(7)})),
    "a tensor of another name": change_network(lambda t: t.update(x=torch.zeros(1))),
    "no noise": change_random(lambda s: s.pop("noise")),
    "noise is a number": change_random(lambda s: s.update(noise=1)),
    "python is a number": change_random(lambda s: s.update(python=1)),
    "numpy is short": change_random(lambda s: s.update(numpy=("MT19937", torch.zeros(3, dtype=torch.int64), 0, 0, 0.0))),
    "torch is short": change_random(lambda s: s.update(torch=torch.zeros(3, dtype=torch.uint8))),
    "not a pickle": lambda state: (state / "optimizer.pt").write_bytes(b"x" * 1000),
    "not safetensors": lambda state: (state / "network.safetensors").write_bytes(b"x" * 1000),
}


def edit(state: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((state / "state.json").read_text("utf-8"))
    content.pop("checksum")
    change(content)
    (state / "state.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def parts() -> Restorable:
    """A network, an optimizer and a schedule after two steps."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for _ in range(2):
        network(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        schedule.step()
    noise = torch.Generator().manual_seed(0)
    return Restorable(network, optimizer, schedule, noise, TimestepSampler(TimestepSettings(), noise), Accelerator(cpu=True))


@pytest.fixture
def saved(parts: Restorable, tmp_path: Path) -> Path:
    state = tmp_path / "lora-step00000002-state"
    save_state(state, parts, StateFile(Progress(step=2), 1, "AdamW", {}, {}, 0.0))
    return state


def values_of(parts: Restorable) -> list[torch.Tensor]:
    states = [value for state in parts.optimizer.state.values() for value in state.values()]
    return [tensor.clone() for tensor in (*parts.network.parameters(), *states)]


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_cannot_be(saved: Path, name: str) -> None:
    path, value = FIELDS[name]

    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    edit(saved, change)
    with pytest.raises(UserError, match=saved.name):
        read_state_file(saved)


@pytest.mark.parametrize("name", CONTENTS)
def test_contents_that_cannot_be_change_nothing(saved: Path, parts: Restorable, name: str) -> None:
    before = values_of(parts)
    CONTENTS[name](saved)
    with pytest.raises(UserError, match=rf"{saved.name} cannot be loaded|is not a readable safetensors file"):
        load_state(saved, parts)
    random_is_last = CONTENTS[name].__qualname__.startswith("change_random")
    assert random_is_last or all(map(torch.equal, before, values_of(parts)))


def test_what_the_schedule_has_no_such_value_for_is_passed_over(saved: Path, parts: Restorable) -> None:
    change_optimizer(lambda states: states["lr_scheduler"].update(step=1))(saved)
    load_state(saved, parts)
    assert callable(parts.lr_scheduler.step)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "out"


@pytest.fixture
def out(train, tmp_path: Path, trained_once: Path) -> Path:
    """The output folder of a training that was killed after 3 of 4 steps."""
    if not trained_once.exists():
        assert train(*FLAGS, *STATES).status == 0
        shutil.copytree(tmp_path / "out", trained_once)
    shutil.copytree(trained_once, tmp_path / "out", dirs_exist_ok=True)
    for name in ("lora.safetensors", "lora_comfyui.safetensors"):
        (tmp_path / "out" / name).unlink()
    shutil.rmtree(tmp_path / "out/lora-state")
    shutil.rmtree(tmp_path / "out/lora-step00000004-state", ignore_errors=True)
    return tmp_path / "out"


def refused(ended, state: Path) -> None:
    assert ended.status == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert state.name in ended.stderr.strip().splitlines()[-1], ended.stderr


@pytest.mark.parametrize("name", ["network.safetensors", "optimizer.pt", "random-0.pt"])
def test_a_flipped_bit_is_noticed_and_latest_takes_the_state_before(
    train, out: Path, trained_once: Path, name: str, caplog
) -> None:
    path = out / LAST / name
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)
    refused(train(*FLAGS, "--resume", out / LAST), out / LAST)
    ended = train(*FLAGS, *STATES, "--resume", "latest")
    assert ended.status == 0 and f"{name} is not what was saved" in caplog.text
    wanted, found = load_file(trained_once / "lora.safetensors"), load_file(out / "lora.safetensors")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_states_without_checksums_are_read(out: Path) -> None:
    for state in out.glob("*-state"):
        edit(state, lambda content: (content.pop("checksums"), content.pop("lineage")))
    assert find_latest_state(out, "lora") == out / LAST and read_state_file(out / LAST).lineage == 0


def test_latest_goes_by_step_and_not_by_the_clock(out: Path) -> None:
    for step in (1, 2, 3):
        edit(out / f"lora-step{step:08d}-state", lambda content, step=step: content.update(saved_at=1e9 - step))
    assert find_latest_state(out, "lora") == out / LAST


def test_a_training_that_went_back_is_newer_than_what_it_left(train, out: Path) -> None:
    """Going on from step 1 leaves the states of steps 2 and 3 of the first training behind."""
    assert next_lineage(out, "lora") == 2
    ended = train(*FLAGS[:2], *FLAGS[4:], "--max_train_steps", 2, *STATES, "--resume", out / "lora-step00000001-state")
    assert ended.status == 0, ended.stderr
    found = find_latest_state(out, "lora")
    assert found is not None and found != out / LAST and read_state_file(found).lineage == 2


def test_checksums_see_what_happens_to_files(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    content = torch.randint(0, 256, (5 * 2**20 + 3,), dtype=torch.uint8, generator=generator).numpy()
    path = tmp_path / "file"
    found = {checksum([content])}
    for change in ("flip", "zero", "swap", "end", "shorter", "longer", "empty"):
        changed = content.copy()
        if change == "flip":
            changed[12345] ^= 128
        elif change == "zero":
            changed[2**20 : 2**20 + 4096] = 0
        elif change == "swap":
            changed[: 2**20], changed[2**20 : 2**21] = content[2**20 : 2**21], content[: 2**20]
        elif change == "end":
            changed[-1] ^= 1
        changed = {"shorter": changed[:-1], "longer": [*changed.tobytes(), 0], "empty": []}.get(change, changed)
        path.write_bytes(bytes(changed))
        found.add(file_checksum(path))
    assert len(found) == 8
    path.write_bytes(content.tobytes())
    assert file_checksum(path) in found


def test_a_digit_of_a_state_that_changed_is_noticed(saved: Path) -> None:
    path = saved / "state.json"
    text = path.read_text("utf-8")
    path.write_text(text.replace('"step": 2', '"step": 3'), encoding="utf-8")
    assert path.read_text("utf-8") != text
    with pytest.raises(UserError, match="it is not what was saved"):
        read_state_file(saved)
