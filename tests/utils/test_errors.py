"""How a script ends, and what it does not say."""

from __future__ import annotations

import logging

import pytest

from utils.errors import run_script, with_visible_characters


def test_bitsandbytes_does_not_ask_for_a_package_that_nothing_here_uses(caplog):
    """transformers' schedules import peft, and that imports bitsandbytes, also where no 8-bit optimizer is asked for."""

    def main() -> None:
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward: please install kernels")
        logging.getLogger("bitsandbytes").warning("something else")

    with pytest.raises(SystemExit):
        run_script(main)
    assert "something else" in caplog.text and "gemm_4bit_forward" not in caplog.text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\u202adata/pics does not exist.", "<U+202A>data/pics does not exist. It has invisible characters: U+202A (left-to-right"),
        ("data/pics\u00a0 is no folder.", "data/pics<U+00A0> is no folder."),
        ("a\u200bb", "a<U+200B>b"),
        ("a\x1b[31mb", "a<U+001B>[31mb"),
    ],
)
def test_invisible_characters_are_shown(text, says):
    assert with_visible_characters(text).startswith(says)


def test_what_people_can_see_stays():
    text = "C:\\Bilder\\Zoë 猫.png does not exist.\nGive another."
    assert with_visible_characters(text) == text


def test_a_locale_that_lacks_a_character_is_named(capsys):
    def main():
        "Zoë".encode("ascii")

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 2 and "PYTHONUTF8=1" in capsys.readouterr().err
