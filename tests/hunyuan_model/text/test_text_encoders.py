"""The text encoders against reference values, against transformers run the long way, and the ways they can be given."""

from __future__ import annotations

import ast
import base64
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from examples.toy.recipe.make_tokenizers import (
    LLAMA_SPECIAL_TOKENS,
    llama_pre_tokenizer,
    write_clip_tokenizer,
    write_llama_tokenizer,
)
from hunyuan_model import load_text_encoder_1, load_text_encoder_2
from hunyuan_model.text.llm import LlamaTextEncoder
from hunyuan_model.text.template import TEMPLATE_BEFORE_PROMPT, apply_prompt_template
from utils.errors import UserError

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
PROMPTS = ["A cat walks on the grass, realistic style.", "", "Ein schöner Hund 犬 läuft; " + "sehr langsam " * 9, "x"]
CPU_FLOAT = {"device": "cpu", "dtype": torch.float32}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "text_io.safetensors")


def word_tokenizer(begin: str, end: str) -> PreTrainedTokenizerFast:
    """A tokenizer small enough for the reference models; its words do not matter to tests that give token ids."""
    words = ["<unk>", begin, end, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "cat", "dog"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end, unk_token="<unk>")


def valid_sequences(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[: int(valid.sum())].tolist() for row, valid in zip(ids, mask)]


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of six layers with the tiny tokenizer, as transformers saves it. Its end does not look like its middle."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return write_llama_tokenizer(folder)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=768, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=1, hidden_act="quick_gelu"
    )
    CLIPTextModel(config).save_pretrained(folder)
    return write_clip_tokenizer(folder)


def llama_states_the_long_way(folder: Path, prompts: Sequence[str]) -> list[torch.Tensor]:
    """Full model, eager attention, everything padded to 256 + crop, hidden_states[-3]: valid rows for each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    crop = len(tokenizer(TEMPLATE_BEFORE_PROMPT)["input_ids"])
    tokens = tokenizer(
        [apply_prompt_template(prompt) for prompt in prompts],
        max_length=256 + crop,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    with torch.no_grad():
        output = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], output_hidden_states=True)
    states = output.hidden_states[-3][:, crop:]
    return [row[: int(mask.sum())] for row, mask in zip(states, tokens["attention_mask"][:, crop:])]


@pytest.fixture(scope="module")
def llama_expected(llama_folder: Path) -> list[torch.Tensor]:
    """What ``PROMPTS`` give, by the long way."""
    return llama_states_the_long_way(llama_folder, PROMPTS)


def assert_states(states: torch.Tensor, mask: torch.Tensor, expected: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    assert mask.dtype == torch.int64
    for row, valid, reference in zip(states, mask, expected, strict=True):
        length = len(reference)
        assert valid.tolist() == [1] * length + [0] * (len(valid) - length)
        assert not row[length:].any()
        assert (row[:length] - reference).abs().max() <= tolerance * reference.abs().max()


def test_llama_hidden_states_match_reference_values(golden: dict[str, torch.Tensor]) -> None:
    encoder = load_text_encoder_1(GOLDENS / "text_llm", **CPU_FLOAT, tokenizer=word_tokenizer("<s>", "</s>"))
    sequences = valid_sequences(golden["llm_input_ids"], golden["llm_attention_mask"])
    states = encoder.hidden_states(sequences)
    for row, sequence, reference in zip(states, sequences, golden["llm_hidden_states.2"]):
        torch.testing.assert_close(row[: len(sequence)], reference[: len(sequence)], atol=2e-5, rtol=1e-4)
    # the published crop of the same states
    valid = golden["llm_embedding_mask"].bool()
    torch.testing.assert_close(states[:, 5:][valid], golden["llm_embedding"][valid], atol=2e-5, rtol=1e-4)


def test_clip_pooled_output_matches_reference_values(golden: dict[str, torch.Tensor]) -> None:
    encoder = load_text_encoder_2(GOLDENS / "text_clip", **CPU_FLOAT, tokenizer=word_tokenizer("<|startoftext|>", "<|endoftext|>"))
    sequences = valid_sequences(golden["clip_input_ids"], golden["clip_attention_mask"])
    torch.testing.assert_close(encoder.pooled(sequences, end=399), golden["clip_embedding"], atol=2e-5, rtol=1e-4)


def test_llama_encode_equals_the_full_model_with_full_padding(llama_folder: Path) -> None:
    encoder = load_text_encoder_1(llama_folder, **CPU_FLOAT)
    prompts = [*PROMPTS, "long " * 400]
    states, mask = encoder.encode(prompts)
    assert states.shape == (len(prompts), 256, 64)
    assert encoder.crop == 127  # of this tokenizer; the real one has 95
    expected = llama_states_the_long_way(llama_folder, prompts)
    assert [len(rows) for rows in expected][1] == 1 and len(expected[-1]) == 256  # only <|eot_id|>; cut
    assert_states(states, mask, expected)


def test_llama_loads_and_computes_only_what_is_used(llama_folder: Path) -> None:
    encoder = load_text_encoder_1(llama_folder, **CPU_FLOAT)
    assert len(encoder.model.layers) == 4
    names = {name.split(".")[0] for name, _ in encoder.model.named_parameters()}
    assert names == {"embed_tokens", "layers"}  # neither head nor norm
    seen = []
    encoder.model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    _, mask = encoder.encode(PROMPTS)
    encoder.encode(PROMPTS)
    longest = int(mask.sum(1).max())
    assert seen == [(1, encoder.crop, 64), (4, longest, 64), (4, longest, 64)]  # the template once


def test_llama_in_bfloat16(llama_folder: Path, llama_expected: list[torch.Tensor]) -> None:
    """Frozen parameters in the dtype asked for; the rotary frequencies stay float32 in every dtype."""
    encoder = load_text_encoder_1(llama_folder, device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert encoder.model.rotary_emb.inv_freq.dtype == torch.float32
    states, _ = encoder.encode(PROMPTS)
    assert states.dtype == torch.bfloat16
    for row, reference in zip(states.float(), llama_expected):
        assert (row[: len(reference)] - reference).std() < 0.06 * reference.std()


def test_llama_fp8_weights(llama_folder: Path) -> None:
    encoder = load_text_encoder_1(llama_folder, **CPU_FLOAT, fp8=True)
    dtypes = {name: parameter.dtype for name, parameter in encoder.model.named_parameters()}
    assert dtypes["layers.0.self_attn.q_proj.weight"] == dtypes["layers.3.mlp.down_proj.weight"] == torch.float8_e4m3fn
    assert dtypes["embed_tokens.weight"] == dtypes["layers.0.input_layernorm.weight"] == torch.float32
    assert sum(dtype == torch.float8_e4m3fn for dtype in dtypes.values()) == 4 * 7
    states, _ = encoder.encode(PROMPTS)
    # the reference: the same weights rounded to float8, computed by the plain float32 model
    full = load_text_encoder_1(llama_folder, **CPU_FLOAT)
    for name, parameter in full.model.named_parameters():
        if dtypes[name] == torch.float8_e4m3fn:
            parameter.copy_(parameter.to(torch.float8_e4m3fn))
    expected, _ = full.encode(PROMPTS)
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(states, load_text_encoder_1(llama_folder, **CPU_FLOAT).encode(PROMPTS)[0], atol=1e-3)


def with_prefix(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The folder's state dict with another prefix; the head always stands one level up."""
    return {
        name.replace("model.", prefix, 1) if name.startswith("model.") else name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model.", "model.language_model."])
def test_llama_prefixes_of_published_files(
    llama_folder: Path, llama_expected: list[torch.Tensor], tmp_path: Path, prefix: str
) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(llama_folder, folder)
    tensors = with_prefix(llama_folder, prefix)
    vision = {"vision_tower.vision_model.embeddings.class_embedding": torch.zeros(4)} if "language" in prefix else {}
    save_file({**tensors, **vision}, folder / "model.safetensors")
    states, mask = load_text_encoder_1(folder, **CPU_FLOAT).encode(PROMPTS)
    assert_states(states, mask, llama_expected)


def test_llama_config_inside_another_model_and_of_either_transformers(
    llama_folder: Path, llama_expected: list[torch.Tensor], tmp_path: Path
) -> None:
    """A LLaVA's config holds the Llama's; transformers 4 wrote rope_theta, transformers 5 writes rope_parameters."""
    config = json.loads((llama_folder / "config.json").read_text(encoding="utf-8"))
    config.pop("rope_parameters", None)
    config.pop("rope_theta", None)
    rope_old, rope_new = {"rope_theta": 500000.0}, {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    for number, rope in enumerate((rope_old, rope_new)):
        folder = tmp_path / str(number)
        shutil.copytree(llama_folder, folder)
        wrapped = {"model_type": "llava", "text_config": config | rope}
        (folder / "config.json").write_text(json.dumps(wrapped), encoding="utf-8")
        encoder = load_text_encoder_1(folder, **CPU_FLOAT)
        assert encoder.model.rotary_emb.inv_freq[1].item() == pytest.approx(500000.0 ** (-2 / 16))
        assert_states(*encoder.encode(PROMPTS), llama_expected)


@pytest.fixture(scope="module")
def llama3_shaped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of Llama-3's head size and constants, so that its shapes tell all of it."""
    folder = tmp_path_factory.mktemp("llama3")
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=520,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return write_llama_tokenizer(folder)


@pytest.fixture(scope="module")
def llama3_expected(llama3_shaped: Path) -> list[torch.Tensor]:
    return llama_states_the_long_way(llama3_shaped, PROMPTS)


def test_llama_prompt_that_melts_into_the_template(llama3_shaped: Path, tmp_path: Path) -> None:
    """Where three line breaks are one token, as in Llama-3, a prompt that begins with one changes the template's last token."""
    folder = tmp_path / "encoder"
    shutil.copytree(llama3_shaped, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["\n\n\n"])
    tokenizer.save(str(folder / "tokenizer.json"))
    encoder = load_text_encoder_1(folder, **CPU_FLOAT)
    prompts = ["\nA cat", "A dog"]
    assert_states(*encoder.encode(prompts), llama_states_the_long_way(folder, prompts))
    shared, _ = encoder.encode(["A cat", "A dog"])
    assert not torch.allclose(shared[0], encoder.encode(prompts)[0][0], atol=1e-2)


def test_llama_single_file_without_config(llama3_shaped: Path, llama3_expected: list[torch.Tensor], tmp_path: Path) -> None:
    single = tmp_path / "llava_llama3.safetensors"
    shutil.copy(llama3_shaped / "model.safetensors", single)
    encoder = load_text_encoder_1(single, **CPU_FLOAT, tokenizer=llama3_shaped)
    assert_states(*encoder.encode(PROMPTS), llama3_expected)


def test_llama_single_file_that_carries_its_tokenizer(
    llama3_shaped: Path, llama3_expected: list[torch.Tensor], tmp_path: Path
) -> None:
    single = tmp_path / "llava_llama3.safetensors"
    stored = (llama3_shaped / "tokenizer.json").read_bytes()
    tensors = load_file(llama3_shaped / "model.safetensors")
    save_file({**tensors, "tokenizer": torch.frombuffer(bytearray(stored), dtype=torch.uint8)}, single)
    encoder = load_text_encoder_1(single, **CPU_FLOAT)
    assert_states(*encoder.encode(PROMPTS), llama3_expected)


def test_llama_single_file_with_config_and_tokenizer_beside_it(llama_folder: Path, llama_expected: list[torch.Tensor]) -> None:
    encoder = load_text_encoder_1(llama_folder / "model.safetensors", **CPU_FLOAT)
    assert_states(*encoder.encode(PROMPTS), llama_expected)


def test_llama_tokenizer_in_the_folder_beside_the_model(llama_folder: Path, tmp_path: Path) -> None:
    """The layout of diffusers: text_encoder/ and tokenizer/ side by side."""
    (tmp_path / "text_encoder").mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(llama_folder / name, tmp_path / "text_encoder" / name)
    write_llama_tokenizer(tmp_path / "tokenizer")
    encoder = load_text_encoder_1(tmp_path / "text_encoder", **CPU_FLOAT)
    assert encoder.crop == 127


def offline(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """A hub that answers like one without network and with an empty cache; returns what it was asked."""
    import huggingface_hub

    asked = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((repo_id, local_files_only))
        assert not any("safetensors" in pattern or "*" in pattern for pattern in allow_patterns)  # never the weights
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_without_tokenizer_and_network_the_error_says_what_to_provide(
    llama3_shaped: Path, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = offline(monkeypatch)
    shutil.copy(llama3_shaped / "model.safetensors", tmp_path / "llm.safetensors")
    shutil.copy(clip_folder / "model.safetensors", tmp_path / "clip_l.safetensors")
    with pytest.raises(UserError, match=r"--tokenizer1 a folder.*tokenizer\.json.*xtuner/llava-llama-3-8b-v1_1-transformers"):
        load_text_encoder_1(tmp_path / "llm.safetensors", **CPU_FLOAT)
    with pytest.raises(UserError, match=r"--tokenizer2 a folder.*openai/clip-vit-large-patch14"):
        load_text_encoder_2(tmp_path / "clip_l.safetensors", **CPU_FLOAT)
    assert [local for _, local in asked] == [True, False, True, False]  # the cache is asked before the network


def test_hub_id_is_taken_from_the_local_cache(llama3_shaped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    snapshot = write_llama_tokenizer(tmp_path / "snapshot")
    asked = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((repo_id, local_files_only))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    shutil.copy(llama3_shaped / "model.safetensors", tmp_path / "llm.safetensors")
    load_text_encoder_1(tmp_path / "llm.safetensors", **CPU_FLOAT, tokenizer="someone/some-llama")
    assert asked == [("someone/some-llama", True)]


@pytest.mark.parametrize("given", ["no/such/folder/at/all", "empty"])
def test_tokenizer_flag_that_leads_nowhere(llama_folder: Path, tmp_path: Path, given: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--tokenizer1"):
        load_text_encoder_1(llama_folder, **CPU_FLOAT, tokenizer=tmp_path / given)


def test_broken_tokenizer_file(llama_folder: Path, tmp_path: Path) -> None:
    folder = write_llama_tokenizer(tmp_path / "broken")
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model"', encoding="utf-8")
    with pytest.raises(UserError, match=r"broken.*--tokenizer1"):
        load_text_encoder_1(llama_folder, **CPU_FLOAT, tokenizer=folder)


def test_tokenizer_of_another_model(llama_folder: Path, clip_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=r"671 tokens.*512.*--tokenizer1"):
        load_text_encoder_1(llama_folder, **CPU_FLOAT, tokenizer=clip_folder)
    assert "does not know <|start_header_id|>" in caplog.text
    with pytest.raises(UserError, match=r"--tokenizer2"):
        load_text_encoder_2(GOLDENS / "text_clip", **CPU_FLOAT, tokenizer=llama_folder)


def clip_pooled_the_long_way(folder: Path, prompts: Sequence[str]) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(list(prompts), max_length=77, padding="max_length", truncation=True, return_tensors="pt")
    model = CLIPTextModel.from_pretrained(folder, attn_implementation="eager").float()
    model.config.eos_token_id = tokenizer.eos_token_id
    ends = (tokens["input_ids"] == tokenizer.eos_token_id).int().argmax(1)
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    return states[torch.arange(len(ends)), ends]


def test_clip_encode_equals_the_model_with_full_padding(clip_folder: Path) -> None:
    prompts = [*PROMPTS, "long " * 400]
    pooled = load_text_encoder_2(clip_folder, **CPU_FLOAT).encode(prompts)
    assert pooled.shape == (len(prompts), 64)
    torch.testing.assert_close(pooled, clip_pooled_the_long_way(clip_folder, prompts), atol=1e-5, rtol=1e-5)


def test_clip_names_of_both_transformers_and_of_a_whole_clip(clip_folder: Path, tmp_path: Path) -> None:
    """Keys with and without text_model., beside a vision tower and projections, with the old position_ids buffer."""
    expected = load_text_encoder_2(clip_folder, **CPU_FLOAT).encode(PROMPTS)
    bare = {name.removeprefix("text_model."): t for name, t in load_file(clip_folder / "model.safetensors").items()}
    old = {f"text_model.{name}": tensor for name, tensor in bare.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    whole = {**old, "text_projection.weight": torch.zeros(8, 64), "vision_model.embeddings.class_embedding": torch.zeros(8)}
    for number, tensors in enumerate((bare, old, whole)):
        path = tmp_path / f"clip_{number}.safetensors"
        save_file(tensors, path)
        encoder = load_text_encoder_2(path, **CPU_FLOAT, tokenizer=clip_folder)
        torch.testing.assert_close(encoder.encode(PROMPTS), expected, atol=0, rtol=0)


def test_clip_folder_of_a_whole_clip(clip_folder: Path, tmp_path: Path) -> None:
    """The published folder holds the vision part too, and its config holds the text part's."""
    from transformers import CLIPConfig

    text = json.loads((clip_folder / "config.json").read_text(encoding="utf-8"))
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 32}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(tmp_path)
    write_clip_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.text_model(**tokens).last_hidden_state
    ends = (tokens["input_ids"] == tokenizer.eos_token_id).int().argmax(1)
    pooled = load_text_encoder_2(tmp_path, **CPU_FLOAT).encode(PROMPTS)
    torch.testing.assert_close(pooled, expected[torch.arange(len(PROMPTS)), ends], atol=1e-5, rtol=1e-5)


def test_clip_end_token_written_in_the_prompt_ends_it(clip_folder: Path) -> None:
    encoder = load_text_encoder_2(clip_folder, **CPU_FLOAT)
    first, second = encoder.encode(["a cat<|endoftext|>a dog", "a cat"])
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_template_is_the_published_one() -> None:
    """Read out of diffusers' source: importing its pipelines takes longer than all of this file's tests."""
    (folder,) = importlib.util.find_spec("diffusers").submodule_search_locations
    source = (Path(folder) / "pipelines" / "hunyuan_video" / "pipeline_hunyuan_video.py").read_text(encoding="utf-8")
    (published,) = (
        ast.literal_eval(statement.value)
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "DEFAULT_PROMPT_TEMPLATE"
    )
    assert apply_prompt_template("a {curly} cat") == published["template"].format("a {curly} cat")
    assert published["crop_start"] == 95


def llama3_tokenizer(vocabulary: Path, text: str) -> PreTrainedTokenizerFast:
    """The published vocabulary (a line for each token: base64 and rank), as far as ``text`` can use it."""
    lines = (line.split() for line in vocabulary.read_text(encoding="utf-8").splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    ranks = {token: rank for token, rank in ranks.items() if len(token) == 1 or token in text.encode("utf-8")}
    letters = bytes_to_unicode()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in ranks:
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = sorted((ranks[left], ranks[right], left, right) for left, right in splits if left in ranks and right in ranks)
        merges += [(spelled[left], spelled[right]) for _, _, left, right in known]
    model = models.BPE({spelled[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = llama_pre_tokenizer()
    tokenizer.add_special_tokens(list(LLAMA_SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def test_crop_of_the_real_tokenizer() -> None:
    """95, as published, comes out of the real vocabulary."""
    spec = importlib.util.find_spec("llama_models")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the Llama-3 vocabulary that llama_models carries")
    vocabulary = Path(next(iter(spec.submodule_search_locations))) / "llama3" / "tokenizer.model"
    model = torch.nn.Module()
    model.config = LlamaConfig(vocab_size=128320)
    assert LlamaTextEncoder(model, llama3_tokenizer(vocabulary, TEMPLATE_BEFORE_PROMPT)).crop == 95
