"""--tf32 and --cudnn_benchmark: what torch is told, which needs no card to be seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hunyuan_model.runtime.settings import KernelSettings

CARD, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def backends() -> Iterator[None]:
    """As torch begins, inside and afterwards."""

    def begin() -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
        torch.backends.cudnn.benchmark = False

    begin()
    yield
    begin()


def found() -> tuple[bool, bool, bool]:
    """TF32 in matrix products and in convolutions, and whether cuDNN tries its convolutions."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (False, True, False)),
        ({"tf32": True}, (True, True, False)),
        ({"cudnn_benchmark": True}, (False, True, True)),
        ({"tf32": True, "cudnn_benchmark": True}, (True, True, True)),
    ],
)
def test_what_a_card_may_use(given: dict[str, bool], expected: tuple[bool, bool, bool], caplog) -> None:
    KernelSettings(**given).apply(CARD)
    assert found() == expected and not caplog.messages


def test_convolutions_follow_where_somebody_switched_them_off() -> None:
    torch.backends.cudnn.allow_tf32 = False
    KernelSettings(cudnn_benchmark=True).apply(CARD)
    assert found() == (False, False, True)
    KernelSettings(tf32=True).apply(CARD)
    assert found() == (True, True, True)


def test_on_the_cpu_nothing_changes_and_that_is_said(caplog) -> None:
    KernelSettings(tf32=True, cudnn_benchmark=True).apply(CPU)
    assert found() == (False, True, False)
    assert caplog.messages == ["--tf32, --cudnn_benchmark: no effect on cpu; only CUDA has a choice of such kernels."]
