"""Reports read back from pages that anybody may have written."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from networks.training.report.page import report_page
from networks.training.report.reading import move_links, read_report
from networks.training.report.record import Curve, RunRecord, SampleRecord, Status, WrittenFile, to_json
from utils.errors import UserError
from utils.pages.page import write_page

RUN = RunRecord(
    name='</script><b>"שלום 🦊',
    session_id="1",
    status=Status.RUNNING,
    steps=3,
    planned_steps=10,
    started_at=1.5,
    written_at=2.0,
    curves={"loss/current": Curve([1, 2, 3], [0.5, 0.25, 0.125])},
    not_finite=[2],
    samples=[SampleRecord(2, 0, "<script>", 1, "sample/a b.png", "data:image/webp;base64,AAAA")],
    written=[WrittenFile("a.safetensors", "ComfyUI", "copy it", "8 of 8 keys")],
    reason="</script>",
)


@pytest.fixture(scope="module")
def page() -> str:
    return report_page([RUN])


def test_what_was_written_is_read(tmp_path, page):
    write_page(tmp_path / "report.html", page, flush=False)
    assert read_report(tmp_path / "report.html") == [RUN]


@pytest.mark.parametrize(
    "changed",
    [{"steps": -1}, {"not_finite": [2**31]}, {"curves": {"loss": Curve([-1], [1.0])}}]
    + [{"written": [WrittenFile(file, "x", "y")]} for file in ("/etc/passwd", "a\\b")]
    + [{"started_at": -1e308, "written_at": 1e308}, {"flags": {"a": json.loads("[" * 40 + "]" * 40)}}],
)
def test_what_cannot_be_is_refused(tmp_path, changed):
    data = json.dumps([to_json(replace(RUN, **changed))]).replace("<", "\\u003c")
    (tmp_path / "report.html").write_text(f'<script type="application/json" id="runs">{data}</script>', encoding="utf-8")
    with pytest.raises(UserError, match="is not a report that training wrote"):
        read_report(tmp_path / "report.html")


@pytest.mark.parametrize(
    "data", ["", "[]", "{}", "[1]", "[NaN]", "[" * 100_000, "[" + "9" * 5000 + "]", '[{"name": Infinity}]', "\0"]
)
def test_data_that_is_none(tmp_path, data):
    path = tmp_path / "report.html"
    path.write_text(f'<script type="application/json" id="runs">{data}</script>', encoding="utf-8")
    with pytest.raises(UserError, match="is not a report that training wrote"):
        read_report(path)


def test_a_page_without_data_or_too_large(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("<html></html>", encoding="utf-8")
    with pytest.raises(UserError, match="it holds no data of trainings"):
        read_report(path)
    with open(path, "wb") as file:
        file.truncate((100 << 20) + 1)
    with pytest.raises(UserError, match="larger than 100 MB"):
        read_report(path)


def test_damaged_pages_are_read_or_refused(tmp_path, page):
    """Bytes of the data changed, added or removed at random: a record or one sentence, and nothing else."""
    begin = page.index('<script type="application/json" id="runs">')
    content, choose, path = page[begin:].encode(), random.Random(0), tmp_path / "report.html"
    content, refused = content[: content.index(b"</script>") + 9], 0
    for _ in range(300):
        damaged, place = bytearray(content), choose.randrange(42, len(content))
        part = choose.choice([b"", b"-", b"9", b'"', b"]", b"null", b"1e999", b"\xff", bytes([choose.randrange(256)])])
        damaged[place : place + choose.randrange(3)] = part
        path.write_bytes(damaged)
        try:
            read_report(path)
        except UserError as error:
            refused += 1
            assert "is not a report that training wrote" in str(error) and "\n" not in str(error)
    assert refused > 100


def test_links_go_with_the_page(tmp_path):
    run = replace(RUN, samples=[replace(RUN.samples[0])], written=[replace(RUN.written[0])])
    move_links(run, tmp_path / "out" / "a", tmp_path / "pages")
    assert (run.samples[0].file, run.written[0].file) == ("../out/a/sample/a b.png", "../out/a/a.safetensors")
    move_links(run, tmp_path / "pages", tmp_path / "out" / "a")
    assert Path(run.samples[0].file) == Path("sample/a b.png")
