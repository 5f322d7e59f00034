"""hunyuan_model.sampling.prompts: what a file of prompts may hold, and one sentence for everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hv_generate_video
from hunyuan_model.sampling.prompts import PROMPT_SETTINGS, PromptEntry, options_within, parse_prompt_line, read_prompts
from utils.errors import UserError

FLAG = "--from_file"
FUZZ = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def values(entry: PromptEntry) -> dict:
    return {"prompt": entry.prompt, **entry.values}


def test_every_option_of_a_line():
    line = (
        "a red ball --w 512 --h 320 --f 25 --d 7 --s 30 --g 4.5 --fs 7 --n blurred, dark --l 3 --am 0.5,1 --i my pictures/a.png "
        "--t 0.6 --step_cache 0.1"
    )
    assert values(parse_prompt_line(line, "here")) == {
        "prompt": "a red ball",
        "width": 512,
        "height": 320,
        "video_length": 25,
        "seed": 7,
        "infer_steps": 30,
        "embedded_cfg_scale": 4.5,
        "flow_shift": 7.0,
        "negative_prompt": "blurred, dark",
        "guidance_scale": 3.0,
        "lora_multiplier": (0.5, 1.0),
        "image_path": "my pictures/a.png",
        "strength": 0.6,
        "step_cache": 0.1,
    }


def test_every_setting_is_a_flag_of_generation():
    flags = {action.dest for action in hv_generate_video.build_parser()._actions} | {"width", "height"}
    assert {setting.flag for setting in PROMPT_SETTINGS} <= flags


# Lines and files in the forms that sd-scripts documents: weights in brackets, --n in the middle, several multipliers.
SD_SCRIPTS = (
    "(a zorp), in the snow, upper body, simple --n blurred, (two of them:1.2), dark --w 768 --h 512 --d 1 --l 7.5 --s 28",
    "a zorp: red, on a table --am 0.5,-0.7 --fs 3.0 --g 5 --f 25 --N drawn by a child",
    "a zorp --am 1.0, 0.5 --l=5",
)


def test_lines_in_the_forms_of_sd_scripts():
    first, second, third = (values(parse_prompt_line(line, "here")) for line in SD_SCRIPTS)
    numbers = {"width": 768, "height": 512, "seed": 1, "guidance_scale": 7.5, "infer_steps": 28}
    assert first == {
        "prompt": "(a zorp), in the snow, upper body, simple",
        "negative_prompt": "blurred, (two of them:1.2), dark",
        **numbers,
    }
    assert second["lora_multiplier"] == (0.5, -0.7) and second["negative_prompt"] == "drawn by a child"
    assert third == {"prompt": "a zorp", "lora_multiplier": (1.0, 0.5), "guidance_scale": 5.0}


@pytest.mark.parametrize(
    ("line", "text", "changed"),
    [
        ("a \"quoted\" 'word' --w 32", "a \"quoted\" 'word'", {"width": 32}),
        ("a\tball\t--w\t32\t--h  48", "a\tball", {"width": 32, "height": 48}),
        ("a ball --W 32 --FS=3", "a ball", {"width": 32, "flow_shift": 3.0}),
        ("a ball --d 5 # the seed of yesterday", "a ball", {"seed": 5}),
        ("a shirt with #1 on it", "a shirt with #1 on it", {}),
        ("day -- and night --- at --5 degrees", "day -- and night --- at --5 degrees", {}),
        ("well--known --s 3", "well--known", {"infer_steps": 3}),
        ("--w 64", "", {"width": 64}),
        ("C:\\clips\\a.mp4 on a screen", "C:\\clips\\a.mp4 on a screen", {}),
    ],
)
def test_odd_lines_that_mean_something(line, text, changed):
    assert values(parse_prompt_line(line, "here")) == {"prompt": text, **changed}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a ball --x 3", "--x is no option"),
        ("a ball --width 64", "--width is no option of a prompt line. Did you mean --w? There are --w --h"),
        ("a ball --infer_step 3", "--infer_step is no option of a prompt line. Did you mean --s?"),
        ("a ball --negative ugly", "Did you mean --n?"),
        ("a ball --am", "lora_multiplier (--am) must be one or more numbers from -1000 to 1000, but it is ''"),
        ("a ball --am 0.5,high", "but it is 'high'"),
        ("a ball --l full", "scale (--l) must be a number"),
        ("a ball --i", "image_path (--i) must be a text"),
        ("a ball --i a.png --v b.mp4", "starts from a picture (--i) and from a video (--v)"),
        ("a ball --n dark --N bright", "--n twice"),
        ("a ball --w", "width (--w) must be a whole number from 16 to 8192, but it is ''"),
        ("a ball --w wide", "but it is 'wide'"),
        ("a ball --w 64.0", "but it is 64.0"),
        ("a ball --g nan", "guidance_scale (--g) must be a number from 0 to 1000, but it is nan"),
        ("a ball --fs 0", "discrete_flow_shift (--fs) must be a number from 0.01"),
        ("a ball --w 64 --W 32", "--w twice"),
        ("a ball --w 64 and a cat", "text behind --w"),
        ("a ball --d 4294967296", "seed (--d) must be a whole number from 0 to 4294967295"),
        (f"a ball --d {'9' * 5000}", "seed (--d) must be"),
    ],
)
def test_lines_that_are_refused_name_their_place(tmp_path, line, says):
    path = write(tmp_path, "prompts.txt", f"# mine\n\na cat\n{line}\n")
    with pytest.raises(UserError) as error:
        read_prompts(path, FLAG)
    assert says in str(error.value) and f"{path}, line 4" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_text_file_with_comments_empty_lines_and_any_line_ends(tmp_path):
    content = "# first\r\na ball --w 64\r\n\r\n   # indented\r\n  a cat  \n#last\ra dog with no end"
    prompts = read_prompts(write(tmp_path, "p.TXT", b"\xef\xbb\xbf" + content.encode()), FLAG)
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
    first, second = read_prompts(write(tmp_path, "p.toml", SUBSETS), FLAG)
    assert values(first) == {"prompt": "a ball", "width": 512, "height": 320, "seed": 1}
    assert values(second) == values(first) | {"prompt": 'a "cat"', "seed": 2, "embedded_cfg_scale": 1.0}
    assert isinstance(second.values["embedded_cfg_scale"], float) and second.where.endswith("p.toml, prompt 2")


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
    prompts = read_prompts(write(tmp_path, name, content), FLAG)
    assert [values(prompt) for prompt in prompts] == [
        {"prompt": "a ball", "width": 64},
        {"prompt": "a cat"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.toml", '[[prompts]]\nprompt = "a"\nwidht = 64', "'width'"),
        ("p.toml", '[[prompts]]\nprompt = "a"\nnegative_promt = "b"', "Did you mean 'negative_prompt'"),
        ("p.toml", '[[prompts]]\nprompt = "a"\ninfer_steps = 3', "Did you mean 'sample_steps'"),
        ("p.toml", '[[prompts]]\nprompt = "a"\nnegative_prompt = 3', "negative_prompt (--n) must be a text"),
        ("p.toml", '[[prompts]]\nprompt = "a"\nlora_multiplier = [0.5, true]', "but it is True"),
        ("p.toml", '[[prompts]]\nprompt = "a"\nlora_multiplier = []', "one or more numbers"),
        ("p.toml", '[[prompts]]\nprompt = "a"\nw = 64', "Known are prompt, width"),
        ("p.toml", "[[prompts]]\nwidth = 64", "prompt 1 needs the key prompt"),
        ("p.toml", '[[prompts]]\nprompt = "a"\nwidth = "64"', "width (--w) must be a whole number from 16 to 8192, but it is '64'"),
        ("p.toml", f'[[prompts]]\nprompt = "a"\nseed = 0x{"f" * 5000}', "seed (--d) must be a whole number"),
        (
            "p.toml",
            '[[prompts]]\nprompt = "a ball --w 64"',
            "the prompt holds --w, which would be read as words; use the key(s) width",
        ),
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
        read_prompts(path, FLAG)
    assert says in str(error.value) and str(path) in str(error.value) and len(str(error.value)) < 700


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"--from_file file not found: .*none\.txt does not exist"):
        read_prompts(tmp_path / "none.txt", FLAG)


def test_a_start_of_its_own_is_in_place_of_the_default(tmp_path):
    content = (
        '[prompt]\nimage_path = "a.png"\n[[prompt.subset]]\nprompt = "x"\nvideo_path = "b.mp4"\n[[prompt.subset]]\nprompt = "y"\n'
    )
    first, second = read_prompts(write(tmp_path, "p.toml", content), FLAG)
    assert first.values == {"video_path": "b.mp4"} and second.values == {"image_path": "a.png"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a ball --w 512 --n ugly", ["w", "n"]),
        ("--am=0.5", ["am"]),
        ("day -- and night --very fast", []),
        ("well--known --W 3", ["w"]),
    ],
)
def test_options_within_a_text(text, expected):
    assert [setting.option for setting in options_within(text)] == expected


WORDS = [
    "--w",
    "--h",
    "--f",
    "--d",
    "--s",
    "--g",
    "--fs",
    "--n",
    "--am",
    "--i",
    "--",
    "---",
    "--q",
    "#",
    "=",
    "64",
    "5",
    "-1",
    '"',
    "\t",
]
LINES = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=6)), max_size=12).map(
    lambda words: " ".join(words).encode("utf-8", "replace")
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
KEYS = st.sampled_from(
    ["prompt", "prompts", "subset", "width", "seed", "frame_count", "guidance_scale", "lora_multiplier", "negative_prompt", "other"]
)
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)), max_leaves=10
).map(lambda document: json.dumps(document).encode())


@FUZZ
@given(st.one_of(LINES, DOCUMENTS, st.binary(max_size=60)))
def test_anything_is_read_or_refused_with_one_sentence_that_names_the_file(tmp_path, content):
    for name in ("p.txt", "p.toml", "p.json"):
        path = write(tmp_path, name, content)
        try:
            assert read_prompts(path, FLAG)
        except UserError as error:
            assert str(path) in str(error)


@FUZZ
@given(st.builds(lambda text: " ".join(text.split()), st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1)))
def test_a_prompt_without_options_is_what_was_written(tmp_path, text):
    if text and not text.startswith(("#", "--")):
        (prompt,) = read_prompts(write(tmp_path, "p.txt", text), FLAG)
        assert prompt.prompt == text
