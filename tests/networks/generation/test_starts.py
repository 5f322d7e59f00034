"""Requests with starts: one for each file of a folder, errors with their line, latents that must fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hunyuan_model.sampling.generation import SamplingSettings
from networks.generation.requests import Request, without_effect
from networks.generation.starts import Start, expand_starts, one_for_each, start_of
from utils.errors import UserError

SAMPLING = SamplingSettings(seed=5, video_size=(32, 48), video_length=5)
PLAIN = Request("a red ball", SAMPLING)


class Finder:
    """Finds what it is given, and notes what it is asked for."""

    def __init__(self, **folders: list[str]) -> None:
        self.folders, self.asked = folders, []

    def __call__(self, kind: str, path: Path, size: tuple[int, int], length: int) -> list[Path]:
        self.asked.append((kind, str(path), size, length))
        if path.name == "bad.mp4":
            raise UserError(f"video {path} does not exist.")
        return [path / name for name in self.folders[path.name]] if path.name in self.folders else [path]


def test_one_request_for_each_file_of_a_folder_named_after_it():
    find = Finder(pictures=["a.png", "b.jpg", "b.png"])
    line = PLAIN.changed({"name": "prompts_0001", "image_path": "pictures"}, "prompts.txt, line 1")
    requests = [PLAIN, PLAIN.changed({"image_path": "pictures"}), line, PLAIN.changed({"video_path": "clip.mp4"})]
    expanded = expand_starts(requests, find)
    assert [request.start for request in expanded[1:4]] == [str(Path("pictures", name)) for name in ("a.png", "b.jpg", "b.png")]
    assert [request.stem for request in expanded[1:7]] == [
        *("a_5", "b.jpg_5", "b.png_5"),
        *("prompts_0001_a_5", "prompts_0001_b.jpg_5", "prompts_0001_b.png_5"),
    ]
    assert str(expanded[4]) == "prompts.txt, line 1, a.png" and str(expanded[2]) == str(Path("pictures", "b.jpg"))
    assert expanded[0] is PLAIN and expanded[7] is requests[3]
    assert find.asked == [("image", "pictures", (32, 48), 5), ("video", "clip.mp4", (32, 48), 5)]  # each once


@pytest.mark.parametrize(
    ("where", "begins"), [("p.txt, line 3", "p.txt, line 3: video bad.mp4"), ("", "--video_path: video bad.mp4")]
)
def test_errors_name_the_line_or_the_flag(where, begins):
    with pytest.raises(UserError, match=f"^{begins}"):
        expand_starts([PLAIN, PLAIN.changed({"video_path": "bad.mp4"}, where)], Finder())


def test_latents_must_fit_the_size_and_length(tmp_path):
    path = tmp_path / "x_latent.safetensors"
    save_file({"latent": torch.zeros(16, 2, 4, 6)}, path)
    fitting = PLAIN.changed({"latent_path": str(path)})
    assert expand_starts([fitting], Finder()) == [fitting]
    for other in ({"video_length": 9}, {"video_size": (48, 32)}):
        with pytest.raises(UserError, match=r"holds 5 frame\(s\) of 32 x 48 .*Give --video_length 5 --video_size 32 48") as error:
            expand_starts([fitting.changed(other)], Finder())
        assert f"{other.get('video_length', 5)} of {' x '.join(map(str, other.get('video_size', (32, 48))))}" in str(error.value)


def test_a_start_replaces_another_and_two_are_refused():
    request = PLAIN.changed({"image_path": "a.png"}).changed({"video_path": "b.mp4"})
    assert start_of(request) == Start("video", Path("b.mp4"), (32, 48), 5) and request.image_path is None
    with pytest.raises(UserError, match="line 2: --image_path and --video_path are both"):
        PLAIN.changed({"image_path": "a.png", "video_path": "b.mp4"}, "line 2")


def test_several_latents_are_named_after_themselves():
    requests = one_for_each(PLAIN, "latent", [Path("a_latent.safetensors"), Path("b.safetensors")])
    assert [(request.stem, request.latent_path) for request in requests] == [
        ("a_5", "a_latent.safetensors"),
        ("b_5", "b.safetensors"),
    ]


def test_a_strength_without_a_start_is_said():
    strong = PLAIN.changed({"strength": 0.5})
    assert without_effect([PLAIN, strong.changed({"image_path": "a.png"})]) == []
    assert without_effect([strong]) == ["--strength has no effect without --image_path, --video_path or --latent_path."]
    assert "p.txt, line 2: --strength has no effect" in without_effect([PLAIN, strong.changed({}, "p.txt, line 2")])[0]
