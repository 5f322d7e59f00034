"""How a script ends, and what it does not say."""

from __future__ import annotations

import logging

import pytest

from utils.errors import run_script


def test_bitsandbytes_does_not_ask_for_a_package_that_nothing_here_uses(caplog):
    """transformers' schedules import peft, and that imports bitsandbytes, also where no 8-bit optimizer is asked for."""

    def main() -> None:
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward: please install kernels")
        logging.getLogger("bitsandbytes").warning("something else")

    with pytest.raises(SystemExit):
        run_script(main)
    assert "something else" in caplog.text and "gemm_4bit_forward" not in caplog.text


def test_a_locale_that_lacks_a_character_is_named(capsys):
    def main():
        "Zoë".encode("ascii")

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 2 and "PYTHONUTF8=1" in capsys.readouterr().err
