"""Random damage to what users write and copy (TOML, JSONL, captions, safetensors): nothing but UserError comes out."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from dataset import load_dataset_config
from dataset.cache.files import read_latent_header, read_latents, read_text, read_text_header
from dataset.config import COMMON_KEYS, SOURCE_KEYS, VIDEO_KEYS, DatasetConfig
from dataset.items import list_items, settle_captions
from hunyuan_model.checkpoints.reading import open_checkpoint
from networks.formats.reading import check_lora_file, read_lora
from networks.training.arguments import build_training_parser
from utils.cli.config_files import parse_with_config
from utils.errors import UserError
from utils.safetensors_io import read_header, read_tensors

pytestmark = pytest.mark.filterwarnings("ignore")
# The same examples every time: a failure here is one that anybody can repeat.
FUZZ = settings(
    max_examples=60,
    deadline=20_000,  # milliseconds; a busy machine takes some time for anything
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

text = st.text(max_size=12)
odd_words = st.sampled_from(["", ".", "a.png", "~x", "\0"])
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-4, 200), st.floats(), text, odd_words)
json_values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)), max_leaves=6
)


@contextlib.contextmanager
def only_user_errors():
    """Let a UserError pass if it is one line that says something."""
    try:
        yield
    except UserError as error:
        assert str(error).strip() and len(str(error).splitlines()) == 1, str(error)


def toml_value(value: object) -> str:
    """``value`` as TOML, or as what looks like it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


known_keys = st.sampled_from([*COMMON_KEYS, *SOURCE_KEYS, *VIDEO_KEYS, "cache_directory", "image_directry"])
tables = st.dictionaries(known_keys, json_values, max_size=4)


@st.composite
def dataset_files(draw) -> str:
    """A TOML file with sections and keys that are near to right, with values that are not."""
    lines = []
    if draw(st.booleans()):
        lines.append(draw(st.sampled_from(["[general]", "[general]", "[[general]]", "general = 1", "[general.x]"])))
        lines += [f"{key} = {toml_value(value)}" for key, value in draw(tables).items()]
    for _ in range(draw(st.integers(0, 2))):
        lines.append(draw(st.sampled_from(["[[datasets]]", "[[datasets]]", "[datasets]", "[[dataset]]"])))
        table = draw(tables) | ({"image_directory": "."} if draw(st.booleans()) else {})
        lines += [f"{key} = {toml_value(value)}" for key, value in table.items()]
    written = "\n".join(lines)
    if draw(st.booleans()):
        return written
    cut = draw(st.integers(0, len(written)))
    return written[:cut] + draw(text) + written[cut:]


@FUZZ
@given(content=dataset_files())
def test_dataset_files(tmp_path, content):
    path = tmp_path / "d.toml"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with only_user_errors():
        load_dataset_config(path)


training_keys = st.sampled_from(
    [option[2:] for option in build_training_parser()._option_string_actions if option.startswith("--")]
)


@FUZZ
@given(content=st.dictionaries(st.one_of(training_keys, training_keys, text), json_values, max_size=5))
def test_config_files(tmp_path, content):
    path = tmp_path / "c.toml"
    lines = [f"{json.dumps(key)} = {toml_value(value)}" for key, value in content.items()]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    with only_user_errors():
        parse_with_config(build_training_parser(), ["--config_file", str(path)])


lines_of_jsonl = st.one_of(
    st.dictionaries(st.sampled_from(["image_path", "caption", "video_path", "x"]), json_values, max_size=3).map(json.dumps),
    st.fixed_dictionaries({"image_path": st.text(max_size=300), "caption": text}).map(json.dumps),
    json_values.map(json.dumps),
    text,
)


@FUZZ
@given(lines=st.lists(lines_of_jsonl, max_size=4), tail=st.binary(max_size=3))
def test_jsonl_lines(tmp_path, lines, tail):
    path = tmp_path / "items.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + tail)
    with only_user_errors():
        settle_captions(list_items(DatasetConfig(0, "image", None, path, tmp_path / "cache")), "error")


@FUZZ
@given(caption=st.binary(max_size=20))
def test_captions(tmp_path, caption):
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").write_bytes(caption)
    with only_user_errors():
        dataset = DatasetConfig(0, "image", tmp_path, None, tmp_path / "cache", caption_extension=".txt")
        settle_captions(list_items(dataset), "error")


CACHE_NAMES = ("latents_1x2x2_float32", "llm_float32", "llm_mask", "clipL_float32")
LORA_NAMES = [f"lora_unet_double_blocks_0_img_mod_linear.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")]
names = st.sampled_from([*CACHE_NAMES, *LORA_NAMES, "diffusion_model.single_blocks.0.linear1.lora_A.weight", "x", ""])
tensors = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]),
    st.sampled_from([0.0, 1.0, float("nan")]),
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "F4", "F8_E8M0", "C64", "Q4", "", 7]),
        "shape": st.one_of(st.lists(st.integers(-1, 2**64), max_size=3), json_values),
        "data_offsets": st.one_of(st.tuples(st.integers(0, 64), st.integers(0, 64)), st.lists(st.integers(-1, 2**64), max_size=3)),
    },
)
headers = st.dictionaries(st.one_of(names, st.just("__metadata__")), st.one_of(entries, json_values), max_size=4)


@st.composite
def safetensors_files(draw) -> bytes:
    """A file whose header is right or nonsense, perhaps with other bytes somewhere or cut short."""
    content = save(draw(st.dictionaries(names, tensors, max_size=4)), {"architecture": "hunyuan_video"})
    if draw(st.booleans()):
        header = json.dumps(draw(headers)).encode()
        length = len(header) + draw(st.sampled_from([0, 0, 0, -1, 10**8, 2**63]))
        content = length.to_bytes(8, "little") + header + bytes(draw(st.integers(0, 64)))
    if draw(st.booleans()):
        position, put = draw(st.integers(0, len(content))), draw(st.binary(max_size=8))
        content = content[:position] + put + content[position + len(put) :]
        content = content[: draw(st.integers(position, len(content)))]
    return content


READERS = (
    read_header,
    read_tensors,
    read_latent_header,
    read_latents,
    read_text_header,
    read_text,
    check_lora_file,
    read_lora,
    lambda path: open_checkpoint(path, "model"),
)


@settings(FUZZ, max_examples=250)
@given(content=safetensors_files())
@example(content=b"\x16" + bytes(7) + b'{"__metadata__": null}')
def test_safetensors_files(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.unlink(missing_ok=True)  # what an earlier example left mapped must not shrink
    path.write_bytes(content)
    for reader in READERS:
        with only_user_errors():
            reader(path)
