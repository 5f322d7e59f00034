"""networks.training.samples.prompts: what a prompt leaves out, and what samples while training do not take."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from networks.training.samples.prompts import DEFAULTS, SAMPLE_OPTIONS, read_sample_prompts
from utils.errors import UserError

SHOWN_DEFAULTS = {  # by the keys of prompts
    "width": DEFAULTS.video_size[1],
    "height": DEFAULTS.video_size[0],
    "frame_count": DEFAULTS.video_length,
    "sample_steps": DEFAULTS.infer_steps,
    "guidance_scale": DEFAULTS.embedded_cfg_scale,
    "discrete_flow_shift": DEFAULTS.flow_shift,
    "negative_prompt": "the empty text",
    "scale": DEFAULTS.guidance_scale,
    "step_cache": DEFAULTS.step_cache,
}


def write(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


def test_a_prompt_alone_and_one_with_every_option(tmp_path):
    lines = "a red ball\na blue ball --w 512 --h 320 --f 25 --d 7 --s 30 --g 4.5 --fs 7 --n red, dark --l 3 --step_cache 0.1"
    first, second = read_sample_prompts(write(tmp_path, "p.txt", lines))
    assert (first.prompt, first.negative_prompt, first.seed_given, first.sampling) == ("a red ball", None, False, DEFAULTS)
    assert (second.prompt, second.negative_prompt, second.seed_given) == ("a blue ball", "red, dark", True)
    given = {"seed": 7, "video_size": (320, 512), "video_length": 25, "infer_steps": 30, "embedded_cfg_scale": 4.5}
    assert second.sampling == replace(DEFAULTS, **given, flow_shift=7.0, guidance_scale=3.0, step_cache=0.1)
    assert second.where.endswith("p.txt, line 2")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a ball --f 24", "4n + 1"),
        ("a ball --w 100", "not divisible by 16"),
        ("a ball --w 8192 --h 8192 --f 129", "are not sampled: the model was trained with up to"),
        ("a ball --x 3", "--x is no option"),
        (
            "a ball --am 0.5",
            "--am (lora_multiplier) is of generation: samples show the network that is trained at its full strength",
        ),
        ("a ball --i a.png", "--i (image_path) is of generation: samples while training start from noise"),
    ],
)
def test_lines_that_are_refused_name_their_place(tmp_path, line, says):
    path = write(tmp_path, "p.txt", f"a cat\n{line}\n")
    with pytest.raises(UserError) as error:
        read_sample_prompts(path)
    assert says in str(error.value) and f"{path}, line 2: " in str(error.value)


def test_the_prompts_that_documentation_shows(tmp_path):
    text = (Path(__file__).resolve().parents[4] / "docs" / "sampling_during_training.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^```(text|toml|json)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    names = {"text": "p.txt", "toml": "p.toml", "json": "p.json"}
    read = {kind: read_sample_prompts(write(tmp_path, names[kind], content)) for kind, content in shown.items()}
    assert {kind: len(prompts) for kind, prompts in read.items()} == {"text": 3, "toml": 2, "json": 2}
    asked = [[(prompt.prompt, prompt.sampling.seed) for prompt in read[kind]] for kind in ("toml", "json")]
    assert asked[0] == asked[1]
    rows = re.findall(r"^\| `(--\w+)` \| `(\w+)` \| .* \| (.*?) \|$", text, re.MULTILINE)
    assert tuple(option for option, _, _ in rows) == SAMPLE_OPTIONS
    shown_defaults = {key: default.strip("`") for _, key, default in rows if key != "seed"}
    assert shown_defaults == {key: str(value) for key, value in SHOWN_DEFAULTS.items()}
