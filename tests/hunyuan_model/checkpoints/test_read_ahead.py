"""Reading ahead while a checkpoint loads: order, how far ahead, and how it ends."""

import threading
import time

import pytest
import torch

from hunyuan_model.checkpoints.mapped_files import read_ahead

SIZE = 1000  # bytes of each tensor


def tensors(count: int) -> dict[str, torch.Tensor]:
    return {f"t{index}": torch.full((SIZE,), index, dtype=torch.uint8) for index in range(count)}


def test_all_come_in_order_and_no_more_than_asked_for_is_held():
    stored, asked, came = tensors(20), [], []

    def get(name: str) -> torch.Tensor:
        assert threading.current_thread() is threading.main_thread()
        asked.append(name)
        return stored[name]

    with read_ahead(stored, get, ahead_bytes=3 * SIZE) as coming:
        for name, tensor in coming:
            assert tensor is stored[name]
            came.append(name)
            assert len(asked) == min(len(came) + 3, 20)
    assert came == list(stored)


def test_one_larger_than_what_is_read_ahead_comes_too():
    stored = tensors(3)
    with read_ahead(stored, stored.__getitem__, ahead_bytes=1) as coming:
        assert [name for name, _ in coming] == list(stored)


def test_the_pages_of_what_follows_are_read_meanwhile(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(64 << 20))
    storage = torch.UntypedStorage.from_file(str(file), False, 64 << 20)
    mapped = torch.empty(0, dtype=torch.bfloat16).set_(storage)
    seen = []
    real = torch.Tensor.sum

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.data_ptr())
        return real(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "sum", noted)
        with read_ahead(["a"], lambda name: mapped) as coming:
            assert next(coming)[0] == "a"
            deadline = time.monotonic() + 30
            while len(seen) < 4 and time.monotonic() < deadline:
                time.sleep(0.01)
    assert seen == [mapped.data_ptr() + (piece << 24) for piece in range(4)]


@pytest.mark.parametrize(
    "tensor", [torch.zeros(0), torch.tensor(1.0), torch.zeros(4, 6).t(), torch.zeros(3).to(torch.float8_e4m3fn)]
)
def test_any_tensor_may_come(tensor):
    with read_ahead(["a", "b"], lambda name: tensor) as coming:
        assert [entry[1] is tensor for entry in coming] == [True, True]


def test_the_thread_ends_with_the_context_also_after_an_error():
    before, stored = threading.active_count(), tensors(5)
    with pytest.raises(RuntimeError, match="no room"), read_ahead(stored, stored.__getitem__) as coming:
        next(coming)
        raise RuntimeError("no room")
    assert threading.active_count() == before
