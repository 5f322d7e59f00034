"""A dataset with known faults: the page says exactly those."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
from browser import opened, until
from planted import MARKUP, PLANTED, plant

from examples.toy.model_files import require_model

CARD = re.compile(r'<article class="item\b.*?</article>', re.DOTALL)
NAME = re.compile(r'<h4 title="([^"]*)">')
NOTE = re.compile(r"<li><b>([^<]*)</b>")


@pytest.mark.slow
def test_the_page_says_what_is_wrong_with_which_file_and_nothing_else(real_media, tmp_path, run_script):
    model = require_model()
    flags = ("--text_encoder1", model.text_encoder1, "--text_encoder2", model.text_encoder2, "--device", "cpu")
    ended = run_script("cache_latents.py", "--dataset_config", plant(tmp_path), "--debug_mode", "html", *flags)
    path = Path(ended.stdout.splitlines()[-1])
    found = {}
    for card in CARD.findall(path.read_text(encoding="utf-8")):
        name = Path(unescape(NAME.search(card)[1])).stem
        found[name] = frozenset(map(unescape, NOTE.findall(card)))
    assert len(found) == 34
    assert {name: notes for name, notes in found.items() if notes} == PLANTED

    with opened(path) as page:
        captions = page.evaluate("[...document.querySelectorAll('.caption')].map(each => each.textContent.trim())")
        assert MARKUP in captions and "old coins \U0001fa99\u2728" in captions
        assert page.evaluate("window.hacked === undefined")
        page.fill("#text", "garage.webp")
        page.click(".notes a:has-text('motorcycle.png')")
        until(page, "document.querySelector('.item:target:not([hidden]) h4')?.textContent === 'motorcycle.png'")
        until(page, "document.querySelector('.item:target').getBoundingClientRect().top < innerHeight")
