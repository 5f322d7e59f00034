"""networks.training.samples.prompts: what a prompt leaves out, and what samples while training do not take."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from networks.training.samples.prompts import SAMPLE_OPTIONS, SamplePrompt, read_sample_prompts
from utils.errors import UserError

DEFAULTS = {
    "width": 256,
    "height": 256,
    "frame_count": 1,
    "seed": None,
    "sample_steps": 20,
    "guidance_scale": 6.0,
    "discrete_flow_shift": 14.5,
}


def write(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


def values(prompt: SamplePrompt) -> dict:
    found = asdict(prompt)
    del found["where"]
    return found


def test_a_prompt_alone_and_one_with_every_option(tmp_path):
    lines = "a red ball\na red ball --w 512 --h 320 --f 25 --d 7 --s 30 --g 4.5 --fs 7"
    first, second = read_sample_prompts(write(tmp_path, "p.txt", lines))
    assert values(first) == {"prompt": "a red ball", **DEFAULTS}
    assert values(second) == dict(zip(["prompt", *DEFAULTS], ["a red ball", 512, 320, 25, 7, 30, 4.5, 7.0]))
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
    assert [(prompt.prompt, prompt.seed) for prompt in read["toml"]] == [(prompt.prompt, prompt.seed) for prompt in read["json"]]
    rows = re.findall(r"^\| `(--\w+)` \| `(\w+)` \| .* \| (.*?) \|$", text, re.MULTILINE)
    assert tuple(option for option, _, _ in rows) == SAMPLE_OPTIONS
    shown_defaults = {key: default.strip("`") for _, key, default in rows if key != "seed"}
    assert shown_defaults == {key: str(value) for key, value in DEFAULTS.items() if value is not None}
