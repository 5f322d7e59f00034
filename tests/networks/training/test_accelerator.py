"""networks.training.accelerator: what training makes of the flags on processes and precision."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState

from networks.training.accelerator import make_accelerator
from networks.training.arguments import build_training_parser


@pytest.fixture
def warnings_of(caplog):
    """``warnings_of(*flags)``: what is said when the accelerator is made for them."""

    def make(*flags: str) -> list[str]:
        AcceleratorState._reset_state(reset_partial_state=True)  # a process makes one; this one makes several
        caplog.clear()
        make_accelerator(build_training_parser().parse_args(flags))
        return [record.getMessage() for record in caplog.records if record.name == "networks.training.accelerator"]

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "flags",
    [("--ddp_static_graph",), ("--ddp_gradient_as_bucket_view",), ("--ddp_gradient_as_bucket_view", "--ddp_static_graph")],
    ids=" ".join,
)
def test_flags_without_effect_are_said_in_one_warning(warnings_of, flags: tuple[str, ...]) -> None:
    assert warnings_of(*flags) == [f"{', '.join(flags)}: no effect, as gradients are averaged without torch's wrapper."]


def test_only_the_main_process_says_it(warnings_of, monkeypatch) -> None:
    monkeypatch.setattr("accelerate.Accelerator.is_main_process", False)
    assert warnings_of("--ddp_static_graph") == []


def test_nothing_is_said_of_flags_with_an_effect(warnings_of) -> None:
    assert warnings_of("--ddp_timeout", "7") == []
