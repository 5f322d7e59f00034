"""Devices by the names that users give them. Running out of their memory: tests/hunyuan_model/runtime/test_memory_plan.py."""

from __future__ import annotations

import pytest
import torch

from utils.devices import pick_device
from utils.errors import UserError


@pytest.fixture
def made_current(monkeypatch) -> list[torch.device]:
    """On a machine with two GPUs."""
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    return devices


def test_a_gpu_by_its_number_is_the_current_one(made_current):
    assert pick_device("cuda:1") == torch.device("cuda:1") and made_current == [torch.device("cuda:1")]


@pytest.mark.parametrize("name", ["cuda", "cpu", "cpu:0", None])
def test_other_names_leave_the_current_one(made_current, name):
    assert pick_device(name).type == (name or "cuda").partition(":")[0] and not made_current


@pytest.mark.parametrize("name", ["cuda:2", "gpu", "mps"])
def test_a_device_that_is_not_there_is_refused(made_current, name):
    with pytest.raises(UserError, match=name):
        pick_device(name)
    assert not made_current
