"""The page of a batch, beside its contact sheet."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import av
import numpy as np
import pytest
from browser import opened, serious_faults, until
from PIL import Image

from hunyuan_model.sampling.generation import SamplingSettings
from hv_generate_video import build_parser
from networks.generation.record import Recorder
from networks.generation.requests import Request
from networks.generation.sheets import page, sheet
from networks.generation.sheets.sheet import BatchSheet

EVIL = """</script><script>document.title = "run"</script><img src=x onerror="document.title='run'"> $HOME 'q' שלום 猫 🦊"""
FLAGS = {
    "dit": "my models/dit.safetensors",
    "prompt": "of the run",
    "fp8": True,
    "xy": ["seed=1,2", "prompt=a,b"],
    "save_path": "out",
}


class Elements(HTMLParser):
    """The attributes of all elements by name, and the JSON of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: dict[str, list[dict[str, str]]] = {}
        self.feed(html)
        self.details = json.loads(re.search(r'id="details">(.*?)</script>', html, re.DOTALL)[1])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str]]) -> None:
        self.found.setdefault(tag, []).append(dict(attrs))

    @property
    def cells(self) -> list[dict[str, str]]:
        return [each for each in self.found["button"] if each.get("class", "").startswith("cell")]


@pytest.fixture
def save(tmp_path):
    """``save(grid, ...)`` writes a sheet of clips, each as bright as its seed times 40, and returns its page."""

    def write(grid, *labels, length=9, size=(32, 48), failing=(), metadata=True, folder="out", grain=0) -> Path:
        (tmp_path / "lora.safetensors").write_bytes(b"lora")
        recorder = Recorder(FLAGS, (str(tmp_path / "lora.safetensors"),), "inject", {"torch": "9.9"})
        made = BatchSheet(tmp_path / folder / "xy.png", grid, 12, recorder.lora_weight, *labels)
        requests = list(dict.fromkeys(request for row in grid for request in row))
        for number, request in enumerate(requests):
            if number in failing:
                made.add_failure(request, f"no memory {EVIL}")
                continue
            frames = np.full((length, *size, 3), request.sampling.seed * 40, np.uint8)
            frames += np.random.default_rng(number).integers(0, grain + 1, frames.shape, np.uint8)
            made.add(request, frames, tmp_path / "out" / f"{request.name}.mp4")
        of_each = {request: recorder.metadata(request) for request in requests}
        png, *_, html = made.save(recorder.of_batch(requests) if metadata else {}, of_each if metadata else {})
        assert (png, html) == (made.path, made.path.with_suffix(".html"))
        return html

    return write


def request(seed: int, prompt: str = "a ball", **values) -> Request:
    name = values.pop("name", f"xy_1_{seed}")
    return Request(prompt, SamplingSettings(seed=seed), lora_multiplier=(0.5,), name=name).changed(values)


def asked(command: str) -> dict:
    program, script, *words = shlex.split(command)
    assert (program, script) == ("python", "hv_generate_video.py")
    return vars(build_parser().parse_args(words))


def content(uri: str) -> io.BytesIO:
    return io.BytesIO(base64.b64decode(uri.partition(",")[2]))


def test_a_page_holds_pictures_clips_and_commands_of_every_result(save, tmp_path):
    cells = [request(1), request(2), request(1, EVIL, name="xy_2_1 #1%"), request(2, EVIL, negative_prompt=EVIL)]
    html = save([cells[:2], cells[2:]], ["seed 1", "seed 2"], ["a ball", EVIL], failing=[3]).read_text(encoding="utf-8")
    assert "<img src=x" not in html and "<script>document" not in html
    found = Elements(html)
    assert [cell["aria-label"] for cell in found.cells] == [
        *("seed 1, a ball", "seed 2, a ball", f"seed 1, {EVIL}", f"seed 2, {EVIL}, not made")
    ]
    for cell, still, seed in zip(found.cells, found.found["img"], (1, 2, 1)):
        with Image.open(content(still["src"])) as picture, av.open(content(cell["data-clip"])) as clip:
            assert picture.size == (48, 32) and abs(np.asarray(picture).mean() - 40 * seed) < 4
            shown = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
            assert len(shown) == 9 and abs(shown[8].mean() - 40 * seed) < 6
    first, _, third, failed = found.details
    assert unquote(third["href"]) == "xy_2_1 #1%.mp4" == third["file"] and first["href"] == "xy_1_1.mp4"
    assert asked(third["repeat"])["repeat"] == str(tmp_path / "out" / "xy_2_1 #1%.mp4")
    whole = asked(third["whole"])
    assert (whole["prompt"], whole["seed"], whole["fp8"], whole["dit"]) == (EVIL, 1, True, "my models/dit.safetensors")
    assert whole["save_path"] == str(tmp_path / "out") and whole["xy"] is None
    facts = dict(third["facts"])
    assert facts["prompt"] == EVIL and facts["seed"] == "1" and "multiplier 0.5, SHA-256" in facts["LoRA"]
    assert failed["reason"] == f"no memory {EVIL}" and "file" not in failed and asked(failed["whole"])["seed"] == 2


def test_a_link_leads_from_the_sheet_to_a_result_elsewhere(save):
    path = save([[request(1), request(2)]], folder="sheets")
    found = Elements(path.read_text(encoding="utf-8"))
    assert [each["href"] for each in found.details] == ["../out/xy_1_1.mp4", "../out/xy_1_2.mp4"]
    assert [cell["aria-label"] for cell in found.cells] == ["seed 1", "seed 2"]


def test_a_cell_that_stands_there_twice_is_one_result(save):
    one, other = request(1), request(2)
    found = Elements(save([[one, one], [other, one]], ["a", "b"], ["c", "d"]).read_text(encoding="utf-8"))
    assert [cell["data-result"] for cell in found.cells] == ["0", "0", "1", "0"] and len(found.details) == 2


def test_without_metadata_a_page_says_what_the_sheet_shows(save):
    html = save([[request(1), request(2)]], metadata=False).read_text(encoding="utf-8")
    assert "hv_generate_video" not in html and "SHA-256" not in html and "a ball" in html
    assert [each["facts"] for each in Elements(html).details] == [[], []]


def test_a_page_stays_small(save, monkeypatch):
    """With clips of noise, the worst there is."""
    monkeypatch.setattr(sheet, "save_video", lambda *_: None)
    grid = [[request(seed, name=f"xy_{row}_{seed}", infer_steps=row + 1) for seed in (1, 2)] for row in range(3)]

    def size() -> int:
        found = Elements(save(grid, length=17, size=(160, 160), grain=150).read_text(encoding="utf-8"))
        return sum(len(each.get("data-clip", "")) + len(each.get("src", "")) for each in (*found.cells, *found.found["img"]))

    plain = size()
    monkeypatch.setattr(page, "MOST_BYTES", plain // 3)
    assert plain // 8 < size() < plain // 3 * 1.1


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1440, False), (390, True)])
def test_a_browser_opens_results_and_plays_them_in_sync(save, width, dark):
    cells = [request(1), request(2), request(3, EVIL, name="c"), request(4, EVIL, name="d")]
    path = save([cells[:2], cells[2:]], ["seed 1", "seed 2"], ["a ball", EVIL], length=25, failing=[3])
    with opened(path, width=width, dark=dark) as shown:
        assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth") and not serious_faults(shown)
        assert shown.inner_text("tbody:nth-of-type(2) th") == " ".join(EVIL.split())
        shown.focus(".cell >> nth=2")
        until(shown, "document.querySelector('video')?.currentTime > 0")
        shown.keyboard.press("Enter")
        until(shown, "document.querySelector('#detail video')?.currentTime > 0")
        assert shown.evaluate("details => details.repeat === document.getElementById('repeat').textContent", _details(path)[2])
        assert shown.get_attribute("#file", "href") == "c.mp4" and EVIL in shown.inner_text("#facts")
        assert not serious_faults(shown)
        shown.keyboard.press("ArrowRight")
        assert "no memory" in shown.inner_text("#reason") and not shown.is_visible("#file")
        shown.keyboard.press("Escape")
        until(shown, "document.activeElement === document.querySelectorAll('.cell')[3]")
        assert not shown.is_visible("#detail")
        shown.focus("#together")
        shown.keyboard.press("Space")
        until(shown, "[...document.querySelectorAll('.cell video')].filter((video) => video.currentTime > .3).length == 3")
        times = shown.evaluate("[...document.querySelectorAll('.cell video')].map((video) => video.currentTime)")
        assert max(times) - min(times) < 0.15, "of clips of 2 seconds"
        shown.hover(".cell")
        shown.hover("h1")
        assert shown.locator(".cell video").count() == 3, "what the pointer leaves plays on"
        until(shown, "[...document.querySelectorAll('.cell video')].every((video) => video.currentTime < .3)")
        shown.keyboard.press("Space")
        assert shown.locator(".cell video").count() == 0 and shown.locator(".cell img:visible").count() == 3
        assert shown.title() == "xy"


def _details(path: Path) -> list[dict]:
    return Elements(path.read_text(encoding="utf-8")).details


def test_without_its_page_the_sheet_is_written(tmp_path, caplog):
    made = BatchSheet(tmp_path / "xy.png", [[request(1)]], 12)
    made.add(request(1), np.zeros((1, 32, 48, 3), np.uint8), tmp_path / "1.png")
    (tmp_path / "xy.html").mkdir()  # nothing can have this name
    assert made.save({}, {}) == [made.path] and made.path.exists()
    assert "xy.html is not written" in caplog.text
