"""How a script ends, and what it does not say."""

from __future__ import annotations

import logging

import pytest

from utils.errors import run_script


def test_bitsandbytes_does_not_ask_for_a_package_that_nothing_here_uses(caplog):
    """transformers' schedules import peft, and that imports bitsandbytes, also where no 8-bit optimiser is asked for."""

    def main() -> None:
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward: please install kernels")
        logging.getLogger("bitsandbytes").warning("something else")

    with pytest.raises(SystemExit):
        run_script(main)
    assert "something else" in caplog.text and "gemm_4bit_forward" not in caplog.text
