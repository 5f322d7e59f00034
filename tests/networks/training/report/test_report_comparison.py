"""Trainings compared on the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from networks.training.report import samples
from networks.training.report.__main__ import main
from networks.training.report.comparison import compared_runs
from networks.training.report.page import report_page
from networks.training.report.reading import read_report
from networks.training.report.record import RunRecord, SampleRecord, Status
from utils.errors import run_script
from utils.pages.page import write_page


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Two trainings of one name."""
    for folder, loss in (("x", 1), ("y", 2)):
        run = RunRecord("lora", folder, Status.FINISHED, 9, 9, 1.0, loss)
        run.samples = [SampleRecord(step, 0, "", 0, f"sample/{step}.png", "data:image/webp;base64,AAAA") for step in range(9)]
        write_page(tmp_path / folder / "report.html", report_page([run]), flush=False)
    return [tmp_path / "x", tmp_path / "y"]


def call(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    return ended.value.code, *capsys.readouterr()


def test_one_page_about_both(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, said, _ = call(monkeypatch, capsys, folders[0], folders[1] / "report.html")
    assert (status, said) == (0, "report_compare.html\n")
    runs = read_report(tmp_path / "report_compare.html")
    assert [run.name for run in runs] == ["x/lora", "y/lora"] and runs[1].samples[0].file == "y/sample/0.png"
    again = compared_runs([tmp_path / "report_compare.html"], tmp_path / "x" / "other.html")
    assert again[0].samples[0].file == "sample/0.png"


def test_trainings_of_one_name_and_folder_are_named_by_their_files(folders, tmp_path):
    (folders[0] / "lora_report.html").write_bytes((folders[1] / "report.html").read_bytes())
    runs = compared_runs([folders[0], folders[0] / "lora_report.html", folders[1]], tmp_path / "c.html")
    assert [run.name for run in runs] == ["x/lora (report.html)", "x/lora (lora_report.html)", "y/lora"]


def test_samples_of_all_share_the_room(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("networks.training.report.comparison.MOST_CHARACTERS", 8 * len("data:image/webp;base64,AAAA"))
    for run in compared_runs(folders, tmp_path / "c.html"):
        assert sum(bool(sample.uri) for sample in run.samples) == 4 and run.samples[0].uri and run.samples[-1].uri
    assert samples.MOST_CHARACTERS > 20e6


def test_what_cannot_be_compared_is_one_sentence(folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.html").write_text("x", encoding="utf-8")
    for words, says in (
        ([tmp_path], "does not exist"),
        ([folders[0], tmp_path / "bad.html"], "bad.html is not a report that training wrote"),
        ([folders[0], folders[0] / "report.html"], "is given twice"),
        ([*folders, "--output", folders[0] / "report.html"], "is one of the reports"),
        ([*folders, "--output", tmp_path], "is a folder"),
    ):
        status, said, error = call(monkeypatch, capsys, *words)
        assert status == 2 and not said and error.startswith("error: ") and says in error and error.count("\n") == 1
    assert not (tmp_path / "report_compare.html").exists()


def test_it_starts_without_torch():
    code = "import sys, networks.training.report.__main__; sys.exit(any(name in sys.modules for name in ('torch', 'accelerate')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False, cwd=Path(__file__).parents[4]).returncode == 0
