"""Folders of text encoders and VAEs from strangers: nothing in them is executed, and what cannot be read ends in one sentence."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch

from hunyuan_model import check_text_encoder_files, check_vae_file
from hunyuan_model.text import clip, llm
from hunyuan_model.text.clip import load_text_encoder_2
from hunyuan_model.text.llm import load_text_encoder_1
from hunyuan_model.text.tokenizer_files import check_tokenizer_json
from hunyuan_model.text.tokenizers import load_tokenizer, token_ids
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
STRANGERS, TOY = ROOT / "tests" / "strangers", ROOT / "examples" / "toy"
CPU = {"device": "cpu", "dtype": torch.float32}
READ = ("from_pretrained", "from_config", "from_single_file", "load_dataset", "snapshot_download", "hf_hub_download", "pipeline")


def folder_of(tmp_path: Path, name: str, stranger: str | None = None) -> Path:
    """A copy of the toy model's folder, with the files of a stranger in their places."""
    folder = tmp_path / name
    shutil.copytree(TOY / name, folder)
    for path in (STRANGERS / stranger).iterdir() if stranger else ():
        shutil.copy(path, folder / path.name.removesuffix(".txt"))
    return folder


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def test_no_call_of_ours_trusts_code_of_others_or_asks_the_hub_unasked() -> None:
    calls = {}
    folders = ("hunyuan_model", "dataset", "networks", "utils", "examples", "benchmarks")
    for path in [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "attr", getattr(getattr(node, "func", None), "id", None))
            if isinstance(node, ast.Call) and name in READ:
                calls[f"{path.relative_to(ROOT)}:{node.lineno}"] = (
                    name,
                    {item.arg: ast.unparse(item.value) for item in node.keywords},
                )
    readers = {where: given for where, (name, given) in calls.items() if name == "from_pretrained"}
    assert len(readers) == 2 and {name for name, _ in calls.values()} == {"from_pretrained", "snapshot_download"}, calls
    assert all(given["trust_remote_code"] == "False" and given["local_files_only"] == "True" for given in readers.values()), readers


@pytest.fixture
def never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Code for a folder that leaves a trace; looks afterwards that there is none. Whoever asks gets a yes."""
    marker = tmp_path / "executed"
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    yield f"open({str(marker)!r}, 'w')\nfrom transformers import CLIPTextConfig as Config, CLIPTextModel as Evil, CLIPTokenizer\n"
    assert not marker.exists()


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "vae"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"])
def test_code_in_a_folder_is_never_executed(tmp_path: Path, never_executed: str, name: str, file: str) -> None:
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    folder = folder_of(tmp_path, name)
    (folder / "evil.py").write_text(never_executed, encoding="utf-8")
    code = {"auto_map": dict.fromkeys(classes, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    edit(
        folder / file, **code, _attn_implementation="stranger/kernels", attn_implementation="stranger/kernels", custom_pipelines={}
    )
    if name == "vae":
        check_vae_file(folder)
        return
    place, load = (clip, load_text_encoder_2) if name == "text_encoder_2" else (llm, load_text_encoder_1)
    try:
        load(folder, **CPU)
    except UserError as error:
        assert file == "tokenizer.json" and place.TOKENIZER.flag in str(error)


def test_a_tokenizer_of_a_strange_class(tmp_path: Path, never_executed: str) -> None:
    folder = folder_of(tmp_path, "text_encoder_2", "tokenizer_auto_map")
    (folder / "evil.py").write_text(never_executed, encoding="utf-8")
    with pytest.raises(UserError, match=r"'Evil', .*code in that folder, which is never executed"):
        load_text_encoder_2(folder, **CPU)


@pytest.mark.parametrize(
    ("stranger", "reason"),
    [
        ("tokenizer_redos", r"pattern '\(a\+\)\+\$\|.* may take for ever"),
        ("tokenizer_no_unk", "of the type 'WordLevel'"),
        ("tokenizer_huge_ids", "the number of its token '!' is 4000000000"),
    ],
)
def test_tokenizers_that_end_the_process(tmp_path: Path, stranger: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"{reason}.*--tokenizer1"):
        load_text_encoder_1(folder_of(tmp_path, "text_encoder", stranger), **CPU)


TOKENIZERS = {
    "no object": lambda content: [],
    "no vocabulary": lambda content: content["model"].update(vocab={}),
    "a vocabulary without end": lambda content: content["model"].update(
        vocab={str(index): index for index in range((1 << 19) + 1)}
    ),
    "a negative number": lambda content: content["model"]["vocab"].update({"!": -1}),
    "a number that is none": lambda content: content["model"]["vocab"].update({"!": 1.0}),
    "a large number of an added token": lambda content: content["added_tokens"][0].update(id=1 << 40),
    "an added token without text": lambda content: content["added_tokens"][0].update(content=""),
    "an unknown token that is missing": lambda content: content["model"].update(unk_token="<none>"),
    "merges dropped at random": lambda content: content["model"].update(dropout=0.5),
    "a slow pattern": lambda content: content.update(normalizer={"type": "Replace", "pattern": {"Regex": "a*a*b"}, "content": ""}),
    "a slow pattern of a decoder": lambda content: content.update(
        decoder={"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"Regex": "(a|a)*b"}, "content": ""}]}
    ),
    "a normalization that grows": lambda content: content.update(
        normalizer={"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}
    ),
    "a part that is not known": lambda content: content.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "deep": lambda content: content.update(normalizer=json.loads('{"type": "Sequence", "normalizers": [' * 200 + "]}" * 200)),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_that_are_not_read(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, "text_encoder")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content = TOKENIZERS[name](content) or content
    (folder / "tokenizer.json").write_text(json.dumps([] if name == "no object" else content), encoding="utf-8")
    with pytest.raises(UserError, match=r"text_encoder cannot be read .*--tokenizer1"):
        load_text_encoder_1(folder, **CPU)


def with_pattern(pattern: str) -> str:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": cut})


QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CLIP = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@pytest.mark.parametrize("pattern", [QWEN2, CLIP, r"\s+", r" {2}", r"\p{N}{1,3}", r" ?\p{L}+| ?[^\s]+"])
def test_patterns_that_are_quick(pattern: str) -> None:
    check_tokenizer_json(with_pattern(pattern))


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "a*a*b", "a+b", "(a|aa)*", r"(\w+)\1", "(?<=a+)b", "[a&&[b]]+", "a{1,9999}", "a" * 9999, 7]
)
def test_patterns_that_may_be_slow(pattern: object) -> None:
    with pytest.raises(ValueError, match="which may take for ever"):
        check_tokenizer_json(with_pattern(pattern))


class Panicking:
    """A tokenizer as those whose library panics: the error is no Exception."""

    def __call__(self, *_texts: object, **_how: object) -> None:
        raise type("PanicException", (BaseException,), {})("entered unreachable code\nat line 1")


def test_a_panic_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"a tokenizer cannot read the texts \(entered unreachable code\)"):
        token_ids(Panicking(), ["a"])


@pytest.mark.parametrize("numbers", [{"a": 1 << 40}, {"a": -1}, {"a": None}, {"a": "1"}, [], {}])
def test_vocabularies_without_tokenizer_json(tmp_path: Path, numbers: object) -> None:
    folder = folder_of(tmp_path, "text_encoder_2")
    (folder / "vocab.json").write_text(json.dumps(numbers), encoding="utf-8")
    with pytest.raises(UserError, match=r"text_encoder_2 cannot be read .*--tokenizer2"):
        load_text_encoder_2(folder, **CPU)


def test_tokens_added_beside_a_vocabulary(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "text_encoder_2")
    known, count = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8"))), 49408  # CLIP's
    edit(folder / "vocab.json", **{f"other {number}": number for number in range(known, count)})
    edit(folder / "added_tokens.json", **{"<zorp>": count})
    assert load_tokenizer(folder, None, clip.TOKENIZER).convert_tokens_to_ids("<zorp>") == count
    edit(folder / "added_tokens.json", **{"<zorp>": 1 << 40})
    with pytest.raises(UserError, match="1099511627776"):
        load_tokenizer(folder, None, clip.TOKENIZER)


def test_a_tokenizer_that_only_other_packages_read(tmp_path: Path) -> None:
    """They would parse whatever it holds in this process."""
    folder = folder_of(tmp_path, "text_encoder_2")
    (folder / "vocab.json").rename(folder / "tokenizer.model")
    with pytest.raises(UserError, match=r"without a tokenizer \(tokenizer.json or vocab.json\)"):
        load_text_encoder_2(folder, tokenizer=folder, **CPU)


CONFIGS = {
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "more layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, but the weights have 5"),
    "width": ({"hidden_size": 1 << 23}, "hidden_size is 8388608, but the weights have 128"),
    "mlp": ({"intermediate_size": 1 << 23}, "intermediate_size is 8388608"),
    "heads": ({"num_attention_heads": 8}, "num_attention_heads times head_dim is 256"),
    "key heads": ({"num_key_value_heads": 1 << 20}, "num_key_value_heads times head_dim"),
    "head size": ({"head_dim": 1 << 20}, "head_dim"),
    "a text": ({"hidden_size": "128"}, "hidden_size is '128'"),
    "no number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "no activation": ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]"),
    "rope": ({"rope_parameters": {"rope_type": "yarn", "factor": "x"}}, "rope_parameters is"),
    "kind of rope": ({"rope_parameters": {"rope_type": "stranger", "rope_theta": 1e4}}, "describes no model that can be built"),
    "bias": ({"attention_bias": "no"}, "attention_bias is 'no'"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_are_not_of_the_weights(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, "text_encoder")
    edit(folder / "config.json", **CONFIGS[name][0])
    with pytest.raises(UserError, match=CONFIGS[name][1]):
        check_text_encoder_files(folder, TOY / "text_encoder_2")


def test_layers_of_a_stranger(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "text_encoder", "config_layers")
    with pytest.raises(UserError, match="num_hidden_layers is 1000000000"):
        check_text_encoder_files(folder, TOY / "text_encoder_2")


@pytest.mark.parametrize("end", [None, [49407, 2], -1, "x"])
def test_end_tokens_of_a_configuration_do_not_count(tmp_path: Path, end: object) -> None:
    """The first end token of the tokenizer does."""
    expected = load_text_encoder_2(TOY / "text_encoder_2", **CPU).encode(["a cat"])
    folder = folder_of(tmp_path, "text_encoder_2")
    edit(folder / "config.json", eos_token_id=end, bos_token_id=end, pad_token_id=end)
    assert torch.equal(load_text_encoder_2(folder, **CPU).encode(["a cat"]), expected)


@pytest.mark.parametrize("end", [None, ["<|endoftext|>"], 7, {"content": 7}])
def test_end_tokens_of_a_tokenizer(tmp_path: Path, end: object) -> None:
    folder = folder_of(tmp_path, "text_encoder")
    edit(folder / "tokenizer_config.json", eos_token=end, bos_token=end)
    try:
        load_text_encoder_1(folder, **CPU)
    except UserError as error:
        assert "--tokenizer1" in str(error)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "[" * 100_000, '{"a":' * 100_000, "null", "7", '"x"', "[]", "\ud800", " " * (33 << 20)])
def test_json_that_is_none(tmp_path: Path, name: str, content: str) -> None:
    folder = folder_of(tmp_path, "text_encoder")
    (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError):
        load_text_encoder_1(folder, **CPU)


def test_published_tokenizers_keep_their_ids() -> None:
    """The checks change nothing: the same ids as transformers gives for the folder itself."""
    from transformers import AutoTokenizer

    for name, part in (("text_encoder", llm), ("text_encoder_2", clip)):
        theirs = AutoTokenizer.from_pretrained(TOY / name, local_files_only=True)
        checkpoint = type("Checkpoint", (), {"path": TOY / name})()
        texts = ["A photo of a cat, 猫.\nDon't 12345!", "", "  ÄÖÜ 🙂"]
        expected = theirs(texts, add_special_tokens=False)["input_ids"]
        ours = load_tokenizer(None, checkpoint, part.TOKENIZER)
        assert token_ids(ours, texts) == expected and ours.eos_token == theirs.eos_token
