"""The page of a training and of several, as text and in a browser."""

from __future__ import annotations

import json
import math
import re
import time

import pytest
from browser import opened, serious_faults, until
from synthetic_runs import EVIL, synthetic_run

from networks.training.report.page import report_page
from networks.training.report.record import Curve, RunRecord, Status, from_json, to_json
from utils.pages.page import write_page


def records(page: str) -> list:
    return json.loads(re.search(r'<script type="application/json" id="runs">(.*?)</script>', page, re.DOTALL)[1])


def text(page: str) -> str:
    """Without scripts and styles."""
    return re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)


def test_a_page_holds_its_records_whole_and_says_where_training_stands():
    run = synthetic_run(status=Status.RUNNING, planned_steps=1000)
    page = report_page([run])
    assert records(page) == [json.loads(json.dumps(to_json(run)))]
    assert from_json(records(page)[0]).samples == run.samples
    words = text(page)
    for expected in ("running", "400 of 1,000", "reload it", "24 GiB", "240 of 240 keys", "16 min"):
        assert expected in words, expected
    assert page.count("data:video") == len(run.samples)


def test_a_failed_training_says_why_and_a_page_needs_no_curves():
    run = synthetic_run(status=Status.FAILED, reason="loss is NaN <b>", curves={"loss/current": Curve()}, samples=[], written=[])
    words = text(report_page([run]))
    assert "loss is NaN &lt;b&gt;" in words and "failed" in words and "Nothing is written yet" in words


def test_text_of_strangers_is_escaped_everywhere():
    run = synthetic_run(EVIL, reason=EVIL, table=EVIL, command=EVIL, hardware={EVIL: EVIL}, flags={EVIL: EVIL}, data=[{EVIL: EVIL}])
    for runs in ([run], [run, run]):
        page = report_page(runs)
        assert "<img src=x" not in page and "</script><script>document" not in page and "<b>" not in text(page)
    odd = synthetic_run("\udc80\ud800", samples=[])
    assert 'href="./%80' in report_page([odd]) or 'href="./%3F' in report_page([odd])


def test_several_trainings_stand_side_by_side():
    running = {"status": Status.RUNNING, "planned_steps": 500, "samples": []}
    page = text(report_page([synthetic_run("fox", seed=1), synthetic_run("hare", seed=2, **running)]))
    failed = synthetic_run("hare", status=Status.FAILED, reason="The device is lost.")
    assert "<bdi>hare</bdi>: <bdi>The device is lost.</bdi>" in report_page([synthetic_run("fox"), failed])
    assert "2 trainings compared" in page and "time left" in page and "400 of 500" in page
    differing = re.findall(r'<tr class="differs"><th scope="row"><bdi>(.*?)</bdi>', page)
    assert differing == ["seed"]


def test_a_page_of_a_long_training_is_small_and_quick_to_make():
    run = synthetic_run(steps=10_000, prompts=8, samples_each=50, padding=45_000)
    report_page([run])
    started = time.process_time()
    page = report_page([run])
    assert time.process_time() - started < 2
    assert 15e6 < len(page) < 30e6


@pytest.fixture
def two_runs(tmp_path):
    path = tmp_path / "report.html"
    second = synthetic_run("<b>hare</b>", steps=150, seed=5, status=Status.FAILED, reason=EVIL, written=[])
    second.samples[0].uri = second.samples[0].clip = ""
    write_page(path, report_page([synthetic_run("fox"), second]))
    return path


@pytest.fixture
def long_run(tmp_path):
    path = tmp_path / "report.html"
    write_page(path, report_page([synthetic_run(EVIL, steps=10_000, prompts=8, samples_each=50, padding=45_000)]))
    return path


def times(page) -> list[float]:
    return page.evaluate("[...player.videos].map(video => video.currentTime)")


@pytest.mark.slow
def test_a_long_report_opens_and_its_samples_are_looked_at_by_keyboard_and_mouse(long_run):
    started = time.monotonic()
    with opened(long_run) as page:
        until(page, "document.querySelector('.js-plotly-plot .scatterlayer path')")
        print(f"opened in {time.monotonic() - started:.2f} s with the browser's start")
        assert page.evaluate("performance.now()") < 20_000  # 3 s on a quiet machine
        assert page.title().startswith(EVIL) and page.inner_text("h1 bdi") == " ".join(EVIL.split())
        # the mean over a window that the arrow keys change; gaps stay gaps
        page.focus("#window")
        before = page.inner_text("#window-steps")
        page.keyboard.press("ArrowRight")
        assert before != page.inner_text("#window-steps")
        assert page.evaluate("Number.isNaN(charts[0].plot.data[0].y[5000]) && Number.isNaN(charts[0].plot.data[1].y[5000])")
        mean = page.evaluate("[means(Float32Array.from([1, 2, NaN, 6, 8]), 2)].map(all => [...all])[0]")
        assert mean[:2] + mean[3:] == [1, 1.5, 4, 7]
        page.click("#log")
        assert page.evaluate("charts[0].plot.layout.yaxis.type") == "log"
        # pictures are loaded where they are seen
        assert page.evaluate("document.querySelectorAll('.cell img[src]').length") < 200
        page.locator("#view-grid").scroll_into_view_if_needed()
        page.locator(".cell[tabindex='0']").focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.ariaLabel").startswith("step 400, a fox")
        page.keyboard.press("Enter")
        assert page.inner_text("#step-text").startswith("400 of")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("End")
        assert page.inner_text("#step-text") == "10,000 of 10,000"
        box = page.locator("#step").bounding_box()
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        assert 4_000 < page.evaluate("stepsOf[byId('step').value]") < 6_000
        # clips in view run together
        page.click("#play")
        until(page, "player.time > 0.1 && player.ready.length > 2")
        until(page, "(all => Math.max(...all) - Math.min(...all) < 1 / 24)([...player.videos].map(video => video.currentTime))")
        page.click("#play")
        until(page, "[...player.videos].every(video => !video.seeking && video.readyState > 1)")
        assert len(times(page)) > 2 and max(times(page)) - min(times(page)) < 1 / 24
        page.focus("#time")
        page.keyboard.press("End")
        page.keyboard.press("PageDown")
        until(page, "[...player.videos].every(video => !video.seeking && video.readyState > 1)")
        assert max(times(page)) - min(times(page)) < 1 / 24 and min(times(page)) > 0.4
        page.click("[data-view=pair]")
        until(page, "player.ready.length == 2")
        page.locator(".pair select:visible").nth(1).select_option("30")
        until(page, "player.ready.length == 2 && [...player.videos].every(video => !video.seeking && video.readyState > 1)")
        assert max(times(page)) - min(times(page)) < 1 / 24
        captions = page.locator(".pair figcaption").all_inner_texts()
        assert page.inner_text("#common") == "all samples: size 96x64, steps 20"
        assert "step 6,200," in captions[0] and "step 10,000," in captions[1] and " ".join(EVIL.split()) in captions[0]
        assert page.title().startswith(EVIL) and not serious_faults(page)


@pytest.mark.slow
def test_a_report_opens_without_curves_and_with_odd_ones(tmp_path):
    bare = RunRecord("", "", Status.RUNNING, 0, 0, 0.0, 0.0)
    curves = {"loss/current": Curve([1, 2], [math.nan] * 2), "lr/<i>": Curve([2], [1e-4]), "other": Curve([1], [math.inf])}
    write_page(tmp_path / "report.html", report_page([bare, synthetic_run("\udc80\ud800", 2, 1, 1, curves=curves)]))
    with opened(tmp_path / "report.html") as page:
        until(page, "charts.every(chart => chart.drawn)")
        (low, high), *_ = page.evaluate("charts.filter(chart => chart.prefix).map(chart => chart.plot.layout.yaxis.range)")
        assert low == 0 and 1e-4 < high < 1.2e-4, "of one value"
        page.click("#log")
        page.click("[data-view=step]")
        assert page.evaluate("document.querySelector('#step-samples a').href").endswith("/sample/%80%3F_000002_00_20260101_0.mp4")
        assert not serious_faults(page)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1440, False), (390, True)], ids=["wide light", "phone dark"])
def test_trainings_are_compared(two_runs, width, dark):
    with opened(two_runs, width=width, dark=dark) as page:
        until(page, "charts[0].drawn && charts.find(chart => chart.prefix).drawn")
        assert page.evaluate("charts.find(chart => chart.prefix).plot.data.every(trace => trace.mode === 'lines')"), "of both"
        assert page.evaluate("new Set(charts[0].plot.data.map(trace => trace.line.color)).size") >= 2
        assert page.evaluate("charts[0].plot.data.some(trace => trace.name.startsWith('&lt;b&gt;hare'))")
        colors = page.evaluate("charts[0].plot.layout.font.color")
        page.emulate_media(color_scheme="light" if dark else "dark")
        until(page, f"charts[0].plot.layout.font.color != '{colors}'")
        page.locator("#run-boxes input").first.uncheck()
        assert page.evaluate("charts[0].plot.data.length") == 3
        assert page.locator("#settings tbody tr:visible").count() == 1
        page.uncheck("#differing")
        page.fill("#filter", "flag_3")
        assert page.locator("#settings tbody tr:visible").count() == 11
        assert page.inner_text("#left-out").startswith("1 of 16 samples")
        for view in ("step", "pair", "grid"):
            page.focus(f"[data-view={view}]")
            page.keyboard.press("Enter")
            assert page.locator(f"#view-{view}").is_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert not serious_faults(page)
