"""Pages that stand alone."""

from __future__ import annotations

import base64
import io
import re
import sys

import av
import numpy as np
import pytest
from browser import opened, serious_faults, until
from PIL import Image

from utils.errors import UserError
from utils.pages.media import clip_uri, picture_uri
from utils.pages.page import chart_library, render, require_templates, write_page

EVIL = """</script><script>document.title = "run"</script><img src=x onerror="document.title='run'">&amp; "q" 'q' שלום 🦊"""
TEMPLATE = """{% extends "base.html.j2" %}
{% block title %}page{% endblock %}
{% block header %}<h1>A page</h1>{% endblock %}
{% block main %}<p id="text" title="{{ text }}"><bdi>{{ text }}</bdi></p>
<div data-clip="{{ clip }}" tabindex="0" role="img" aria-label="a clip"><img src="{{ picture }}" alt=""></div>{% endblock %}
{% block scripts %}{{ data("facts", {"text": text}) }}{% endblock %}
"""


@pytest.fixture
def page(tmp_path):
    template = tmp_path / "page.html.j2"
    template.write_text(TEMPLATE, encoding="utf-8")
    frames = np.zeros((9, 30, 51, 3), np.uint8) + np.arange(9, dtype=np.uint8)[:, None, None, None] * 20
    html = render(template, text=EVIL, picture=picture_uri(frames[4], 20), clip=clip_uri(frames, 24, 40))
    path = tmp_path / "page.html"
    write_page(path, html)
    return path


def content(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


def test_pictures_and_clips_are_small_and_hold_what_they_show():
    frames = np.full((9, 30, 51, 3), 200, np.uint8)
    frames[:, :, :25] = 30
    with Image.open(io.BytesIO(content(picture_uri(frames[0], 20)))) as picture:
        assert picture.size == (20, 12)
        assert np.abs(np.asarray(picture)[6, [3, 17]].astype(int) - [[30] * 3, [200] * 3]).max() < 8
    with av.open(io.BytesIO(content(clip_uri(frames, 24, 40)))) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 24
    assert len(shown) == 9 and shown[0].shape == (24, 40, 3)
    assert np.abs(shown[8][12, [3, 36]].astype(int) - [[30] * 3, [200] * 3]).max() < 12


def test_text_is_escaped_wherever_it_stands(page):
    html = page.read_text(encoding="utf-8")
    assert html.count("document.title") == 6 and "<img src=x" not in html and "</script><script>" not in html
    nonces = set(re.findall(r"nonce(?:-|=\")([\w-]+)", html))
    assert len(nonces) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_text_as_text_and_plays_clips(page, dark):
    with opened(page, dark=dark) as shown:
        assert shown.inner_text("#text") == " ".join(EVIL.split()) and shown.title() == "page"
        assert shown.evaluate("JSON.parse(document.getElementById('facts').textContent).text") == EVIL
        shown.keyboard.press("Tab")
        shown.keyboard.press("Tab")
        until(shown, "document.querySelector('video')?.currentTime > 0")
        assert not serious_faults(shown)


@pytest.mark.parametrize(("name", "use"), [("jinja2", require_templates), ("plotly", chart_library.__wrapped__)])
def test_a_package_that_is_missing_is_named(monkeypatch, name, use):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"(?i)pip install {name}"):
        use()
