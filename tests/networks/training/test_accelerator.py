"""What training makes of the flags on processes."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState


@pytest.mark.parametrize("flags", [("--ddp_static_graph",), ("--ddp_gradient_as_bucket_view", "--ddp_static_graph")], ids=" ".join)
def test_flags_without_effect_are_said_in_one_warning(train, caplog, flags: tuple[str, ...]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(*flags, "--ddp_timeout", 7, "--max_train_steps", 1).status == 0
    said = [message for message in caplog.messages if "--ddp_" in message]
    assert said == [f"{', '.join(flags)}: no effect, as gradients are averaged without torch's wrapper."]
