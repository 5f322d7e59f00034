"""Where reports lie, and which one goes on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from networks.training.report.page import report_page
from networks.training.report.places import go_on, make_place
from networks.training.report.record import Curve, RunRecord, SampleRecord, Status, WrittenFile
from utils.pages.page import write_page
from utils.processes.locks import Holder


def run(name: str = "a", session: str = "1", steps: int = 4, status: Status = Status.RUNNING) -> RunRecord:
    curve = Curve(list(range(1, steps + 1)), [0.5] * steps)
    samples = [SampleRecord(step, 0, "", 0, f"sample/{step}.png", "") for step in range(0, steps + 1, 2)]
    return RunRecord(name, session, status, steps, 9, 1.0, 2.0, {"loss": curve}, [2, 3], samples)


def write(folder: Path, record: RunRecord, name: str = "report.html") -> Path:
    write_page(folder / name, report_page([record]), flush=False)
    return folder / name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".html")


def test_a_training_has_its_own_report(tmp_path):
    assert make_place(tmp_path, run()).name == "report.html"
    write(tmp_path, run())
    assert make_place(tmp_path, run()).name == "report.html" and names(tmp_path) == ["report.html"]


@pytest.mark.parametrize("other", [run("b"), run("a", "2"), run("a", "2", status=Status.FINISHED)])
def test_that_of_another_is_renamed(tmp_path, other):
    for count in (1, 2):
        before = write(tmp_path, other).read_bytes()
        assert make_place(tmp_path, run()).name == "report.html"
        stem = f"{other.name}_report"
        assert (tmp_path / (f"{stem}.html" if count == 1 else f"{stem}-2.html")).read_bytes() == before
        assert not (tmp_path / "report.html").exists()


def test_one_without_a_step_gives_way(tmp_path):
    write(tmp_path, RunRecord("b", "2", Status.RUNNING, 0, 9, 1.0, 2.0))
    assert make_place(tmp_path, run()).name == "report.html" and names(tmp_path) == ["report.html"]


def test_what_is_damaged_or_has_a_strange_name_is_kept(tmp_path):
    (tmp_path / "report.html").write_text("mine", encoding="utf-8")
    assert make_place(tmp_path, run()).name == "report.html"
    assert (tmp_path / "earlier_report.html").read_text("utf-8") == "mine"
    write(tmp_path, run("../../x"))
    assert make_place(tmp_path, run()).name == "report.html"
    assert names(tmp_path) == ["earlier_report-2.html", "earlier_report.html"] and names(tmp_path.parent) == []


def test_two_trainings_at_once_have_two_reports(tmp_path):
    before = write(tmp_path, run("b")).read_bytes()
    (tmp_path / ".b.lock").write_text(json.dumps(asdict(Holder.this_process())), encoding="utf-8")
    assert make_place(tmp_path, run("a")).name == "a_report.html"
    assert (tmp_path / "report.html").read_bytes() == before
    write(tmp_path, run("a"), "a_report.html")
    (tmp_path / ".b.lock").unlink()
    assert make_place(tmp_path, run("a")).name == "a_report.html", "it stays where it is"


def test_a_record_goes_on_to_the_step_of_the_state(tmp_path, caplog):
    caplog.set_level("INFO")
    earlier = run(session="7", steps=6)
    earlier.written = [WrittenFile("a.safetensors", "ComfyUI", "")]
    write(tmp_path / "old", earlier)
    record = RunRecord("a", "7", Status.RUNNING, 3, 9, 1.0, 2.0)
    go_on(record, [tmp_path / "new", tmp_path / "old"])
    assert record.curves == {"loss": Curve([1, 2, 3], [0.5, 0.5, 0.5])} and record.not_finite == [2, 3]
    assert [sample.file for sample in record.samples] == ["../old/sample/0.png", "../old/sample/2.png"]
    assert [file.file for file in record.written] == ["../old/a.safetensors"]
    other = RunRecord("a", "8", Status.RUNNING, 3, 9, 1.0, 2.0)
    assert not caplog.text
    go_on(other, [tmp_path / "old"])
    assert not other.curves and not other.samples and "begins after step 3" in caplog.text


def test_leftovers_of_a_kill_are_removed(tmp_path):
    (tmp_path / ".0123abcd.tmp.report.html").touch()
    make_place(tmp_path, run())
    assert names(tmp_path) == []
