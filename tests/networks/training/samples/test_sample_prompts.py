"""networks.training.samples.prompts: what a file of prompts may hold, and one sentence for everything else."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from networks.training.samples.prompts import PROMPT_OPTIONS, SamplePrompt, parse_prompt_line, read_sample_prompts
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
FUZZ = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def values(prompt: SamplePrompt) -> dict:
    found = asdict(prompt)
    del found["where"]
    return found


def test_a_line_with_nothing_but_a_prompt_has_the_defaults():
    assert values(parse_prompt_line("a red ball", "here")) == {"prompt": "a red ball", **DEFAULTS}


def test_every_option_of_a_line():
    prompt = parse_prompt_line("a red ball --w 512 --h 320 --f 25 --d 7 --s 30 --g 4.5 --fs 7", "here")
    assert values(prompt) == dict(zip(["prompt", *DEFAULTS], ["a red ball", 512, 320, 25, 7, 30, 4.5, 7.0]))


@pytest.mark.parametrize(
    ("line", "text", "changed"),
    [
        ("a \"quoted\" 'word' --w 32", "a \"quoted\" 'word'", {"width": 32}),
        ("a\tball\t--w\t32\t--h  48", "a\tball", {"width": 32, "height": 48}),
        ("a ball --W 32 --FS=3", "a ball", {"width": 32, "discrete_flow_shift": 3.0}),
        ("a ball --d 5 # the seed of yesterday", "a ball", {"seed": 5}),
        ("a shirt with #1 on it", "a shirt with #1 on it", {}),
        ("day -- and night --- at --5 degrees", "day -- and night --- at --5 degrees", {}),
        ("well--known --s 3", "well--known", {"sample_steps": 3}),
        ("--w 64", "", {"width": 64}),
        ("C:\\clips\\a.mp4 on a screen", "C:\\clips\\a.mp4 on a screen", {}),
    ],
)
def test_odd_lines_that_mean_something(line, text, changed):
    assert values(parse_prompt_line(line, "here")) == {"prompt": text, **DEFAULTS, **changed}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a ball --x 3", "--x is no option"),
        ("a ball --n ugly --w 64", "no negative prompt"),
        ("a ball --l 7", "--g"),
        ("a ball --width 64", "--width is no option of a prompt line. There are --w --h"),
        ("a ball --w", "width (--w) must be a whole number from 16 to 8192, but it is ''"),
        ("a ball --w wide", "but it is 'wide'"),
        ("a ball --w 64.0", "but it is 64.0"),
        ("a ball --g nan", "guidance_scale (--g) must be a number from 0 to 1000, but it is nan"),
        ("a ball --fs 0", "discrete_flow_shift (--fs) must be a number from 0.01"),
        ("a ball --w 64 --W 32", "--w twice"),
        ("a ball --w 64 and a cat", "text behind --w"),
        ("a ball --f 24", "4n + 1"),
        ("a ball --w 100", "not divisible by 16"),
        ("a ball --d 4294967296", "seed (--d) must be a whole number from 0 to 4294967295"),
        (f"a ball --d {'9' * 5000}", "seed (--d) must be"),
        ("a ball --w 8192 --h 8192 --f 129", "are not sampled: the model was trained with up to"),
    ],
)
def test_lines_that_are_refused_name_their_place(tmp_path, line, says):
    path = write(tmp_path, "prompts.txt", f"# mine\n\na cat\n{line}\n")
    with pytest.raises(UserError) as error:
        read_sample_prompts(path)
    assert says in str(error.value) and f"{path}, line 4" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_text_file_with_comments_empty_lines_and_any_line_ends(tmp_path):
    content = "# first\r\na ball --w 64\r\n\r\n   # indented\r\n  a cat  \n#last\ra dog with no end"
    prompts = read_sample_prompts(write(tmp_path, "p.TXT", b"\xef\xbb\xbf" + content.encode()))
    assert [prompt.prompt for prompt in prompts] == ["a ball", "a cat", "a dog with no end"]
    assert [prompt.where.rpartition(" ")[2] for prompt in prompts] == ["2", "5", "7"]


SUBSETS = """
[prompt]
width = 512
height = 320
seed = 1
[[prompt.subset]]
prompt = "a ball"
[[prompt.subset]]
prompt = 'a "cat"'
seed = 2
guidance_scale = 1
"""


def test_toml_with_defaults_and_subsets(tmp_path):
    first, second = read_sample_prompts(write(tmp_path, "p.toml", SUBSETS))
    assert values(first) == {"prompt": "a ball", **DEFAULTS, "width": 512, "height": 320, "seed": 1}
    assert values(second) == values(first) | {"prompt": 'a "cat"', "seed": 2, "guidance_scale": 1.0}
    assert isinstance(second.guidance_scale, float) and second.where.endswith("p.toml, prompt 2")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.toml", '[[prompts]]\nprompt = "a ball"\nwidth = 64\n[[prompts]]\nprompt = "a cat"\n'),
        ("p.json", '[{"prompt": "a ball", "width": 64}, {"prompt": "a cat"}]'),
        ("p.json", '["a ball --w 64", "a cat"]'),
        ("p.json", '{"prompts": [{"prompt": "a ball", "width": 64}, "a cat"]}'),
        ("p.JSON", b'\xef\xbb\xbf[{"prompt": " a ball ", "width": 64},\r\n {"prompt": "a cat"}]'),
    ],
)
def test_forms_of_the_same_two_prompts(tmp_path, name, content):
    prompts = read_sample_prompts(write(tmp_path, name, content))
    assert [values(prompt) for prompt in prompts] == [
        {"prompt": "a ball", **DEFAULTS, "width": 64},
        {"prompt": "a cat", **DEFAULTS},
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.toml", '[[prompts]]\nprompt = "a"\nwidht = 64', "'width'"),
        ("p.toml", '[[prompts]]\nprompt = "a"\nnegative_prompt = "b"', "no negative prompt"),
        ("p.toml", '[[prompts]]\nprompt = "a"\nw = 64', "Known are prompt, width"),
        ("p.toml", "[[prompts]]\nwidth = 64", "prompt 1 needs the key prompt"),
        ("p.toml", '[[prompts]]\nprompt = "a"\nwidth = "64"', "width (--w) must be a whole number from 16 to 8192, but it is '64'"),
        ("p.toml", f'[[prompts]]\nprompt = "a"\nseed = 0x{"f" * 5000}', "seed (--d) must be a whole number"),
        ("p.toml", '[[prompts]]\nprompt = "a', "not valid TOML"),
        ("p.toml", "width = 64", "holds width outside of its prompts"),
        ("p.toml", '[prompt]\nwidth = 64\n[[prompts]]\nprompt = "a"', "holds prompt, prompts outside of its prompts"),
        ("p.toml", "prompts = 3", "no list of prompts"),
        ("p.toml", "prompts = [3]", "prompt 1 is '3', not a table"),
        ("p.toml", "", "holds no prompt"),
        ("p.json", "[", "not valid JSON"),
        ("p.json", '[{"prompt": "a", "seed": NaN}]', "seed (--d) must be a whole number"),
        ("p.json", "[" * 200000, "not valid JSON"),
        ("p.json", "3", "no list of prompts"),
        ("p.json", '["a --x 3"]', "prompt 1: --x is no option"),
        ("p.txt", "# nothing\n\n", "holds no prompt"),
        ("p.txt", b"a \xff ball", "not UTF-8"),
        ("p.csv", "a ball", "neither .txt nor .toml nor .json"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, says):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        read_sample_prompts(path)
    assert says in str(error.value) and str(path) in str(error.value) and len(str(error.value)) < 700


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_sample_prompts(tmp_path / "none.txt")


def test_the_prompts_that_documentation_shows(tmp_path):
    text = (Path(__file__).resolve().parents[4] / "docs" / "sampling_during_training.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^```(text|toml|json)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    names = {"text": "p.txt", "toml": "p.toml", "json": "p.json"}
    read = {kind: read_sample_prompts(write(tmp_path, names[kind], content)) for kind, content in shown.items()}
    assert {kind: len(prompts) for kind, prompts in read.items()} == {"text": 3, "toml": 2, "json": 2}
    assert [(prompt.prompt, prompt.seed) for prompt in read["toml"]] == [(prompt.prompt, prompt.seed) for prompt in read["json"]]
    rows = re.findall(r"^\| `(--\w+)` \| `(\w+)` \| .* \| (.*?) \|$", text, re.MULTILINE)
    assert tuple(option for option, _, _ in rows) == PROMPT_OPTIONS
    shown_defaults = {key: default.strip("`") for _, key, default in rows if key != "seed"}
    assert shown_defaults == {key: str(value) for key, value in DEFAULTS.items() if value is not None}


WORDS = ["--w", "--h", "--f", "--d", "--s", "--g", "--fs", "--", "---", "--q", "#", "=", "64", "5", "-1", '"', "\t"]
LINES = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=6)), max_size=12).map(
    lambda words: " ".join(words).encode("utf-8", "replace")
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
KEYS = st.sampled_from(["prompt", "prompts", "subset", "width", "seed", "frame_count", "guidance_scale", "other"])
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)), max_leaves=10
).map(lambda document: json.dumps(document).encode())


@FUZZ
@given(st.one_of(LINES, DOCUMENTS, st.binary(max_size=60)))
def test_anything_is_read_or_refused_with_one_sentence_that_names_the_file(tmp_path, content):
    for name in ("p.txt", "p.toml", "p.json"):
        path = write(tmp_path, name, content)
        try:
            assert read_sample_prompts(path)
        except UserError as error:
            assert str(path) in str(error)


@FUZZ
@given(st.builds(lambda text: " ".join(text.split()), st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1)))
def test_a_prompt_without_options_is_what_was_written(tmp_path, text):
    if text and not text.startswith(("#", "--")):
        (prompt,) = read_sample_prompts(write(tmp_path, "p.txt", text))
        assert prompt.prompt == text
