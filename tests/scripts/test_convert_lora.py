"""convert_lora.py as a user runs it: converting, and describing a file with --check."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from variations import slow_but

from networks.formats.clients import Verdict
from networks.formats.description import describe
from networks.formats.layouts import LAYOUTS, TARGETS, flat_name
from networks.formats.reading import lora_of, read_lora
from networks.formats.report import report
from networks.formats.writing import tensor_hashes, to_layout
from utils.errors import UserError
from utils.safetensors_io import read_header

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
LORA, LORA_OTHER, LORA_BACK = (GOLDENS / name for name in ("lora.safetensors", "lora_other.safetensors", "lora_back.safetensors"))
DIT = GOLDENS / "dit.safetensors"
PAIR = ("lora_A.weight", "lora_B.weight")


@pytest.fixture
def convert(call_script):
    return lambda *arguments: call_script("convert_lora", *arguments)


@pytest.fixture
def refused(convert) -> Callable[..., str]:
    """Run the script, see it refuse its arguments, and return what it says."""

    def run(*arguments: object) -> str:
        ended = convert(*arguments)
        assert ended.status == 2 and not ended.stdout and "error: " in ended.stderr and ended.stderr.count("\n") == 1, ended
        return ended.stderr

    return run


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), atol=1e-6, rtol=0, msg=name)


def deltas(path: Path) -> dict[str, torch.Tensor]:
    """The update of each official module, by the formula, of a file with whole modules."""
    return {placed.module: placed.update.scale * placed.update.up @ placed.update.down for placed in read_lora(path).updates}


def in_layout(layout: str) -> dict[str, torch.Tensor]:
    """The reference LoRA in the names of any layout, without alpha."""
    named, tensors = LAYOUTS[layout], {}
    source = "diffusers" if "transformer_blocks" in named.example else "other"
    for key, value in to_layout(read_lora(LORA), source).items():
        module, ending = key.removeprefix(LAYOUTS[source].prefix).rsplit(".lora_", 1)
        if source == "other":
            (module,) = named.names.modules(module)
        tensors[f"{named.prefix}{module if named.dotted else flat_name(module)}.lora_{ending}"] = value
    return tensors


# Conversion


def test_there_and_back(tmp_path, convert):
    other, back = tmp_path / "new folder" / "other.safetensors", tmp_path / "back.safetensors"
    ended = convert("--input", LORA, "--output", other, "--target", "other")
    assert (ended.status, ended.stdout) == (0, f"{other}\n")
    assert_same_tensors(load_file(other), load_file(LORA_OTHER))
    assert convert("--input", other, "--output", back, "--target", "default").status == 0
    assert_same_tensors(load_file(back), load_file(LORA_BACK))
    metadata, source = read_header(back).metadata, read_header(LORA).metadata
    assert metadata.keys() == source.keys() and metadata["ss_network_module"] == "networks.lora"
    assert metadata["sshs_model_hash"] == tensor_hashes(load_file(back), metadata)["sshs_model_hash"] != source["sshs_model_hash"]
    assert sorted(path.name for path in tmp_path.rglob("*.safetensors")) == ["back.safetensors", "other.safetensors"]


def test_it_does_not_overwrite_its_input(tmp_path, refused):
    copy = Path(shutil.copy(LORA, tmp_path / "lora.safetensors"))
    assert "are the same file" in refused("--input", copy, "--output", tmp_path / "." / "lora.safetensors", "--target", "other")
    assert copy.read_bytes() == LORA.read_bytes()


def test_what_cannot_be_read_is_refused(tmp_path, refused):
    output = tmp_path / "out.safetensors"
    assert "does not exist" in refused("--input", tmp_path / "absent.safetensors", "--output", output, "--target", "other")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(LORA.read_bytes()[:-100])
    assert "not a readable safetensors file" in refused("--input", cut, "--output", output, "--target", "other")
    assert "not a LoRA" in refused("--input", DIT, "--output", output, "--target", "other")
    save_file({f"lora_unet_middle_block_attn.{ending}": torch.ones(2, 2) for ending in PAIR}, cut)
    assert "none of its 2 keys match" in refused("--input", cut, "--output", output, "--target", "other")
    assert "must end in .safetensors" in refused("--input", LORA, "--output", tmp_path / "out.pt", "--target", "other")
    assert "has the layout default already" in refused("--input", LORA, "--output", output, "--target", "default")
    assert not output.exists()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", TARGETS)
def test_every_target_from_every_target(tmp_path, convert, source, target):
    """A target that is the source's own layout is converted to only where that changes something."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert source == "default" or convert("--input", LORA, "--output", first, "--target", source).status == 0
    status = convert("--input", LORA if source == "default" else first, "--output", second, "--target", target).status
    assert status == (2 if source == target else 0) and second.exists() == (source != target)
    if source != target and convert("--input", second, "--output", tmp_path / "whole.safetensors", "--target", "other").status == 0:
        second = tmp_path / "whole.safetensors"
    if source != target:
        expected = deltas(LORA)
        found = deltas(second)
        assert found.keys() == expected.keys()
        for name, delta in expected.items():
            torch.testing.assert_close(found[name], delta, atol=1e-6, rtol=1e-5)


def test_alphas_are_multiplied_in_also_where_the_names_stay(tmp_path, convert):
    """Files of OneTrainer: the names of ``other`` with an alpha, at which diffusers fails."""
    source, output = tmp_path / "alpha.safetensors", tmp_path / "out.safetensors"
    alphas = {key.replace(".lora_A.weight", ".alpha"): torch.tensor(1.0) for key in load_file(LORA_OTHER) if "lora_A" in key}
    save_file(load_file(LORA_OTHER) | alphas, source)
    assert convert("--input", source, "--output", output, "--target", "other").status == 0
    assert_same_tensors(load_file(output), {key: value / 2 for key, value in load_file(LORA_OTHER).items()})  # sqrt(1 / rank 4)


def test_a_folder_of_peft_is_converted_with_its_alphas(tmp_path, convert):
    folder, output = tmp_path / "adapter", tmp_path / "out.safetensors"
    folder.mkdir()
    tensors = {f"base_model.model.single_blocks.0.linear2.{ending}": torch.ones(2, 2) for ending in PAIR}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}), encoding="utf-8")
    assert convert("--input", folder, "--output", output, "--target", "other").status == 0
    assert {value.unique().item() for value in load_file(output).values()} == {2.0}
    assert describe(folder).scale == (4.0, 4.0)


def test_commands_for_the_folder_that_the_user_is_in_and_for_names_like_flags(tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(
        {f"base_model.model.single_blocks.0.linear2.{ending}": torch.ones(2, 2) for ending in PAIR},
        folder / "adapter_model.safetensors",
    )
    shutil.copy(LORA, folder / "-x.safetensors")
    monkeypatch.chdir(folder)
    for name, output in ((".", tmp_path / "adapter_other.safetensors"), ("-x.safetensors", folder / "-x_other.safetensors")):
        assert str(output) in shlex.split(describe(name).programs[0].command)


def test_metadata_that_describes_the_tensors_is_left_out(tmp_path, convert):
    source, output = tmp_path / "diffusers.safetensors", tmp_path / "out.safetensors"
    adapter = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.peft_type": "LORA"}
    metadata = {"lora_adapter_metadata": json.dumps(adapter), "modelspec.title": "ball", "modelspec.hash_sha256": "0x1"}
    save_file(in_layout("diffusers"), source, metadata)
    ended = convert("--input", source, "--output", output, "--target", "other")
    assert ended.status == 0 and read_header(output).metadata == {"modelspec.title": "ball"}
    torch.testing.assert_close(deltas(output)["single_blocks.0.linear2"], 2 * deltas(LORA)["single_blocks.0.linear2"])


def test_keys_that_cannot_be_read(tmp_path, convert, refused):
    source, output = tmp_path / "part.safetensors", tmp_path / "out.safetensors"
    text_encoder = {f"text_encoders.llama.transformer.x.{ending}": torch.ones(2, 2) for ending in PAIR}
    save_file(load_file(LORA) | text_encoder | {"lora_unet_strange.alpha": torch.tensor(1.0)}, source)
    flags = ("--input", source, "--output", output, "--target", "other")
    assert "1 of its 69 keys match nothing" in refused(*flags) and not output.exists()
    assert convert(*flags, "--lora_partial").status == 0
    assert_same_tensors(load_file(output), load_file(LORA_OTHER))


@pytest.mark.parametrize("target", ["other", "diffusers", "framepack"])
def test_what_a_target_cannot_hold_is_refused_before_anything_is_written(tmp_path, refused, target):
    source, output = tmp_path / "lokr.safetensors", tmp_path / "new" / "out.safetensors"
    factors = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(4, 4)}
    save_file({f"lycoris_double_blocks_0_img_attn_proj.{name}": value for name, value in factors.items()}, source)
    says = refused("--input", source, "--output", output, "--target", target)
    assert "cannot be written in the layout" in says and "LoKr has no place there" in says
    assert not output.parent.exists()


# The arguments


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "the following arguments are required: --input, --output, --target"),
        (["--input", "a"], "the following arguments are required: --output, --target"),
        (["--check", "a", "--input", "b"], "--input cannot be given with --check"),
        (["--check", "a", "--output", "b", "--lora_partial"], "--output, --lora_partial cannot be given with --check"),
        (
            ["--input", "a", "--output", "b", "--target", "other", "--norms", "--json"],
            "--norms, --json cannot be given with a conversion",
        ),
        (["--dit", "a"], "--dit cannot be given with a conversion"),
    ],
)
def test_flags_of_one_task_only(refused, flags, says):
    assert refused(*flags) == f"convert_lora.py: error: {says}; see --help\n"


# --check


def test_a_description_for_scripts(convert):
    ended = convert("--check", LORA, "--dit", DIT, "--norms", "--json")
    facts = json.loads(ended.stdout)
    assert (ended.status, facts["layout"], facts["kinds"], facts["dtypes"]) == (0, "default", ["LoRA"], ["float32"])
    assert (facts["ranks"], facts["alphas"], facts["scale"], facts["modules"]) == ([4], [2.0], [0.5, 0.5], 22)
    assert facts["groups"] == {"double blocks": {"attention": 8, "MLP": 8}, "single blocks": {"attention with MLP": 6}}
    assert facts["metadata"] == {"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "2.0"}
    assert facts["model"] == {"file": str(DIT), "fits": True, "problem": None}
    weights = load_file(DIT)
    for group, blocks in (("double blocks", "double_blocks"), ("single blocks", "single_blocks")):
        updates = torch.cat([delta.flatten() for name, delta in deltas(LORA).items() if name.startswith(blocks)])
        changed = torch.cat([weights[f"{name}.weight"].flatten() for name in deltas(LORA) if name.startswith(blocks)])
        norms = facts["norms"][group]
        assert norms["update"] == pytest.approx(updates.norm().item(), rel=1e-4)
        assert norms["relative"] == pytest.approx((updates.norm() / changed.norm()).item(), rel=1e-4)


def test_norms_of_other_kinds_follow_their_formulas(tmp_path):
    torch.manual_seed(0)
    w = {name: torch.randn(size) for name, size in (("a", (6, 2)), ("b", (2, 4)), ("c", (3, 2)), ("d", (2, 2)))}
    values = {
        "hada_w1_a": w["a"],
        "hada_w1_b": w["b"],
        "hada_w2_a": -w["a"],
        "hada_w2_b": w["b"].clone(),
        "alpha": torch.tensor(1.0),
    }
    tensors = {f"lycoris_double_blocks_0_img_mlp_fc1.{name}": value for name, value in values.items()}
    tensors |= {"lycoris_single_blocks_0_linear2.lokr_w1": w["c"], "lycoris_single_blocks_0_linear2.lokr_w2": w["d"]}
    save_file(tensors, tmp_path / "lycoris.safetensors")
    norms = {group: found["update"] for group, found in describe(tmp_path / "lycoris.safetensors", norms=True).norms.items()}
    product = w["a"] @ w["b"]
    expected = {"double blocks": (0.5 * product * product).norm().item(), "single blocks": torch.kron(w["c"], w["d"]).norm().item()}
    assert norms == pytest.approx(expected, rel=1e-5)


def test_a_model_that_does_not_match(tmp_path, convert):
    weights = {name: value for name, value in load_file(DIT).items() if not name.startswith("single_blocks.2.")}
    save_file(weights, tmp_path / "dit.safetensors")
    facts = json.loads(convert("--check", LORA, "--dit", tmp_path / "dit.safetensors", "--json").stdout)
    assert not facts["model"]["fits"] and "2 of 22 are not in it" in facts["model"]["problem"]


def test_metadata_is_printed_harmlessly(tmp_path, convert):
    path = tmp_path / "lora.safetensors"
    save_file(load_file(LORA), path, {"modelspec.title": "a\x1b[31m\nfake line \u202e", "modelspec.author": "x" * 10_000})
    text = convert("--check", path).stdout
    assert "\x1b" not in text and "\u202e" not in text and len(text) < 4000
    assert r"modelspec.title   'a\x1b[31m\nfake line \u202e'" in text


def test_keys_and_odd_things_are_named(tmp_path, convert):
    path = tmp_path / "lora.safetensors"
    more = {"lora_te1_x.alpha": torch.tensor(1.0), "lora_unet_strange.alpha": torch.tensor(1.0)}
    save_file(load_file(LORA) | more, path, {"ss_base_model_version": "wan2.1"})
    ended = convert("--check", path)
    assert ended.status == 0 and not ended.stderr
    assert "1 of text encoders or embeddings (lora_te1_x.alpha)" in ended.stdout
    assert "1, for nothing in the transformer (lora_unet_strange.alpha)" in ended.stdout
    assert "made for another model" in ended.stdout and "for a model of width 48" in ended.stdout
    ours = describe(path).programs[-1]
    assert (ours.verdict, ours.keys, ours.of_keys) == ("part", 66, 67) and "--lora_partial" in ours.reason
    assert "--lora_partial" in describe(path).programs[0].command


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model.blocks.0.self_attn.q.lora_B.weight"], "Wan"),
        (["lora_unet_down_blocks_0_attentions_0.lora_down.weight"], "Stable Diffusion"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "incomplete"),
    ],
)
def test_what_is_no_lora_for_this_model_is_described(tmp_path, convert, keys, says):
    path = tmp_path / "x.safetensors"
    save_file({key: torch.ones(2, 2) for key in keys}, path)
    ended = convert("--check", path)
    assert ended.status == 0 and says in ended.stdout and "this project" in ended.stdout


def test_a_checkpoint_is_named(convert):
    ended = convert("--check", DIT)
    assert ended.status == 0 and "it looks like a HunyuanVideo transformer, not like a LoRA" in ended.stdout
    assert json.loads(convert("--check", DIT, "--json").stdout)["programs"] == []


def test_what_is_no_safetensors_file_is_refused(tmp_path, refused):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    assert "not a readable safetensors file" in refused("--check", tmp_path / "x.safetensors")
    assert "does not exist" in refused("--check", tmp_path / "y.safetensors")
    assert "--dit" in refused("--check", LORA, "--dit", LORA)


@pytest.mark.parametrize("layout", slow_but(LAYOUTS, "default", "other", "hunyuan", "lycoris", "peft-diffusers"))
def test_the_printed_commands_make_files_that_match_whole(tmp_path, convert, layout):
    path = tmp_path / "my lora.safetensors"  # to be quoted
    tensors = in_layout(layout)
    save_file(tensors, path)
    programs = describe(path).programs
    assert programs[-1].verdict == "all" and programs[-1].of_keys == len(tensors)
    printed = convert("--check", path).stdout.splitlines()
    for program in programs:
        if program.verdict == "all":
            assert program.command is None
            continue
        assert f"  {program.command}" in printed
        python, script, *arguments = shlex.split(program.command)
        assert (python, script) == ("python", "convert_lora.py")
        output = Path(arguments[arguments.index("--output") + 1])
        assert output.exists() or convert(*arguments).status == 0
        made = describe(output)
        assert {other.name: other.verdict for other in made.programs}[program.name] == Verdict.ALL, program
        assert made.modules == 22


def test_a_program_that_no_layout_helps(tmp_path):
    path = tmp_path / "lokr.safetensors"
    factors = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(4, 4)}
    save_file({f"lora_unet_double_blocks_0_img_mlp_fc1.{name}": value for name, value in factors.items()}, path)
    programs = {program.name: program for program in describe(path).programs}
    assert programs["ComfyUI"].target == "comfy" and programs["ComfyUI-HunyuanVideoWrapper"].verdict == "all"
    assert programs["diffusers"].command is None and "LoKr has no place there" in programs["diffusers"].reason


def test_nothing_heavy_is_imported():
    code = "import convert_lora, sys\nheavy = 'transformers', 'diffusers', 'peft', 'accelerate'\n"
    code += "print([name for name in heavy if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


# Damage


def damaged(tensors: dict[str, torch.Tensor], dice: random.Random) -> dict[str, torch.Tensor]:
    """With one to three keys dropped, renamed, doubled under another layout's name, or of another shape or dtype."""
    tensors = dict(tensors)
    for _ in range(dice.randint(1, 3)):
        key = dice.choice(sorted(tensors))
        value = tensors.pop(key)
        match dice.randrange(5):
            case 0:
                continue
            case 1:
                tensors[key.replace("blocks", "block", 1)] = value
            case 2:
                tensors |= {key: value, f"transformer.{key.partition('.')[2]}": value.clone()}
            case 3:
                tensors[key] = torch.ones(dice.choice([(), (0,), (3,), (1, 1), (2, 3, 4)]))
            case 4:
                tensors[key] = torch.ones(value.shape, dtype=dice.choice([torch.int8, torch.bool, torch.float64]))
    return tensors


@pytest.mark.parametrize("layout", slow_but(LAYOUTS, "default", "diffusers", "peft"))
def test_damaged_files_give_a_sentence_or_a_file(tmp_path, convert, layout):
    dice, whole = random.Random(layout), in_layout(layout)
    path, output = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    for _ in range(12):
        save_file(damaged(whole, dice), path)
        facts = describe(path)
        assert report(facts) and json.dumps(facts.as_json())
        flags = ("--input", path, "--output", output, "--target", dice.choice(TARGETS))
        ended = convert(*flags, *dice.choice([(), ("--lora_partial",)]))
        assert (ended.status, output.exists()) in ((0, True), (2, False)), ended
        if ended.status:
            assert ended.stderr.splitlines()[-1].startswith("error: ") and not ended.stdout
        else:
            lora_of(load_file(output), {}, "out")
        output.unlink(missing_ok=True)


def test_no_value_of_a_header_breaks_the_description(tmp_path):
    header = {"lora_unet_single_blocks_0_linear1.lora_down.weight": {"dtype": "F32", "shape": [2**40, 2], "data_offsets": [0, 4]}}
    content = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + bytes(4))
    with pytest.raises(UserError, match="not a readable"):
        describe(tmp_path / "x.safetensors")
