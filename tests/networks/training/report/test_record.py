"""Records of trainings, as JSON and back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from networks.training.report.record import Curve, RunRecord, SampleRecord, Status, WrittenFile, from_json, to_json


@pytest.fixture
def run():
    return RunRecord(
        name="a <b> שלום \udc80",
        session_id="1",
        status=Status.RUNNING,
        steps=3,
        planned_steps=10,
        started_at=1.5,
        written_at=2,
        curves={"loss/current": Curve([1, 2, 4], [0.5, math.nan, math.inf]), "lr/unet": Curve()},
        samples=[SampleRecord(2, 0, "a fox", 1, "sample/a.png", "data:image/webp;base64,AAAA", settings={"steps": "20"})],
        written=[WrittenFile("a.safetensors", "ComfyUI", "copy it", "8 of 8 keys")],
        flags={"network_dim": 4, "rate": math.inf, "folder": Path("x"), "values": (1, None, True)},
        data=[{"resolution": (64, 64)}],
    )


def test_a_record_comes_back(run):
    again = from_json(json.loads(json.dumps(to_json(run), allow_nan=False)))
    loss = again.curves["loss/current"]
    assert loss.steps == [1, 2, 4] and loss.values[::2] == [0.5, math.inf] and math.isnan(loss.values[1])
    assert again.flags == {"network_dim": 4, "rate": "inf", "folder": "x", "values": [1, None, True]}
    assert again.data == [{"resolution": [64, 64]}]
    assert (again.name, again.status, again.samples, again.written) == (run.name, Status.RUNNING, run.samples, run.written)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("name", 3),
        ("status", "asleep"),
        ("steps", True),
        ("steps", 1.5),
        ("written_at", math.nan),
        ("curves", {"loss": {"steps": "AAAA", "values": ""}}),
        ("curves", {"loss": {"steps": "AQAAAAEAAAA=", "values": "AAAAAAAAAAA="}}),
        ("curves", {"loss": []}),
        ("samples", {}),
        ("samples", [{"step": 1}]),
        ("hardware", {"gpu": 1}),
    ],
)
def test_what_is_no_record_is_refused(run, entry, value):
    with pytest.raises(ValueError, match=f"{entry}|asleep"):
        from_json(to_json(run) | {entry: value})


@pytest.mark.parametrize(
    "uri", ["javascript:alert(1)", "data:text/html;base64,AAAA", "https://x/a.png", "data:image/webp;base64,A\n"]
)
def test_media_of_other_kinds_are_refused(run, uri):
    record = to_json(run)
    for place in ("uri", "clip"):
        sample = record["samples"][0] | {place: uri}
        with pytest.raises(ValueError, match="other media"):
            from_json(record | {"samples": [sample]})


def test_what_is_missing_is_named(run):
    with pytest.raises(ValueError, match="run has no steps"):
        from_json({name: value for name, value in to_json(run).items() if name != "steps"})
    with pytest.raises(ValueError, match="run is not"):
        from_json([])
