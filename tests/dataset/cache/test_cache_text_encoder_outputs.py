"""cache_text_encoder_outputs.py: what it writes, what it keeps, what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import cache_text_encoder_outputs
from dataset import load_dataset_config
from dataset.cache.files import read_text
from dataset.cache.names import text_cache_path
from dataset.items import Item, list_items
from hunyuan_model import encode_prompts, load_text_encoder_1, load_text_encoder_2
from hunyuan_model.text.arguments import TextEncoderSettings
from hunyuan_model.text.clip import CLIPTextEncoder
from hunyuan_model.text.llm import LlamaTextEncoder
from utils.errors import UserError
from utils.safetensors_io import read_header

CPU = torch.device("cpu")
SCRIPT = "cache_text_encoder_outputs.py"


def flags(config: Path, model, **changes: object) -> list[str]:
    """Command line for the tiny model; ``changes`` replace or add flags, True stands for a switch."""
    values = {"dataset_config": config, "text_encoder1": model.text_encoder1, "text_encoder2": model.text_encoder2, "device": "cpu"}
    words = []
    for name, value in (values | changes).items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch):
    """The script's main in this process: a status, or the UserError it would print."""

    def run(arguments: list[str]) -> int:
        monkeypatch.setattr("sys.argv", [SCRIPT, *arguments])
        return cache_text_encoder_outputs.main()

    return run


def all_items(config: Path) -> list[Item]:
    return [item for dataset in load_dataset_config(config).datasets for item in list_items(dataset)]


def caption_file(item: Item) -> Path:
    return item.path.with_suffix(".txt")


def test_caches_hold_what_the_encoders_give(tiny_model, tiny_dataset: Path, run_here, capsys) -> None:
    items = all_items(tiny_dataset)
    caption_file(items[0]).write_text("", encoding="utf-8")  # an empty caption is a caption
    caption_file(items[1]).write_text("Ein schöner Hund 犬, " + "sehr langsam " * 40, encoding="utf-8")
    assert run_here(flags(tiny_dataset, tiny_model, batch_size=3)) == 0
    assert "8 captions: 8 encoded, 0 kept, 0 failed" in capsys.readouterr().out

    llm = load_text_encoder_1(tiny_model.text_encoder1, device="cpu", dtype=torch.float32)
    clip = load_text_encoder_2(tiny_model.text_encoder2, device="cpu", dtype=torch.float32)
    for item in all_items(tiny_dataset):
        states, mask = llm.encode([item.caption])
        cached = read_text(text_cache_path(item))
        assert torch.equal(cached.llm_mask, mask[0])
        torch.testing.assert_close(cached.llm, states[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(cached.clip, clip.encode([item.caption])[0], atol=1e-4, rtol=1e-4)
        assert read_header(text_cache_path(item)).metadata["caption1"] == item.caption
    assert read_text(text_cache_path(items[0])).llm_mask.sum() == 1  # what follows the prompt in the template
    written = sorted(path.name for folder in {text_cache_path(item).parent for item in items} for path in folder.iterdir())
    assert written == sorted(f"{item.stem}_hv_te.safetensors" for item in items)  # one for a clip, and nothing else


def test_captions_that_are_cut_are_counted_and_named(tiny_model, tiny_dataset: Path, run_here, capsys, caplog) -> None:
    items = all_items(tiny_dataset)
    caption_file(items[0]).write_text("a red ball " * 300, encoding="utf-8")
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (tiny_model.text_encoder1, tiny_model.text_encoder2)]
    ids = [tokenizer(("a red ball " * 300).strip(), add_special_tokens=False).input_ids for tokenizer in tokenizers]
    counts = f"{len(ids[0]) + 1} of 256 tokens for encoder 1, {len(ids[1]) + 2} of 77 for encoder 2"
    assert run_here(flags(tiny_dataset, tiny_model)) == 0
    table = capsys.readouterr().out.split("dataset  ")[-1]
    assert table.splitlines()[1].split()[-3] == "1" and f"not read: {items[0].path.name} ({counts})" in table
    encode_prompts(
        ["a ball", "a red ball " * 300], TextEncoderSettings(tiny_model.text_encoder1, tiny_model.text_encoder2, torch.float32), CPU
    )
    (warning,) = [record.message for record in caplog.records if "not read" in record.message]
    assert "a red ball a red ball" in warning


def test_states_that_are_no_numbers_are_never_saved(tiny_model, tiny_dataset: Path, tmp_path: Path, run_here, capsys) -> None:
    """One token's embedding is NaN; only the caption with that token fails, in whatever batch it stands."""
    folder = tmp_path / "encoder"
    shutil.copytree(tiny_model.text_encoder1, folder)
    tensors = load_file(folder / "model.safetensors")
    (token,) = AutoTokenizer.from_pretrained(folder)("Q", add_special_tokens=False)["input_ids"]
    (name,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name][token] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    bad, *good = all_items(tiny_dataset)
    caption_file(bad).write_text("Q", encoding="utf-8")

    assert run_here(flags(tiny_dataset, tiny_model, text_encoder1=folder, batch_size=8)) == 1
    assert not text_cache_path(bad).exists()
    assert all(text_cache_path(item).exists() for item in good)
    captured = capsys.readouterr()
    assert "7 encoded, 0 kept, 1 failed" in captured.out
    assert str(bad.path) in captured.err and "NaN" in captured.err


def test_running_out_of_memory_names_the_flags(tiny_model, tiny_dataset: Path, run_here, monkeypatch) -> None:
    def no_memory(self, prompts):
        raise torch.OutOfMemoryError("no memory left")

    for encoder in (LlamaTextEncoder, CLIPTextEncoder):
        monkeypatch.setattr(encoder, "encode", no_memory)
        with pytest.raises(UserError, match=r"captions.*--batch_size.*--fp8_llm"):
            run_here(flags(tiny_dataset, tiny_model))


def test_tokenizer_flags(tiny_model, tiny_dataset: Path, tmp_path: Path, run_here) -> None:
    """Weights in single files, tokenizers elsewhere; a wrong folder is told before a model is loaded."""
    for source, name in ((tiny_model.text_encoder1, "llm"), (tiny_model.text_encoder2, "clip")):
        (tmp_path / name).mkdir()
        for file in ("model.safetensors", "config.json"):
            shutil.copy(source / file, tmp_path / name / file)
    singles = {"text_encoder1": tmp_path / "llm" / "model.safetensors", "text_encoder2": tmp_path / "clip" / "model.safetensors"}
    with pytest.raises(UserError, match=r"--tokenizer1 .*without a tokenizer"):
        run_here(flags(tiny_dataset, tiny_model, **singles, tokenizer1=tmp_path, tokenizer2=tiny_model.text_encoder2))
    given = {"tokenizer1": tiny_model.text_encoder1, "tokenizer2": tiny_model.text_encoder2}
    assert run_here(flags(tiny_dataset, tiny_model, **singles, **given)) == 0
    from_files = [read_text(text_cache_path(item)) for item in all_items(tiny_dataset)]
    assert run_here(flags(tiny_dataset, tiny_model)) == 0
    for single, item in zip(from_files, all_items(tiny_dataset)):
        assert torch.equal(single.llm, read_text(text_cache_path(item)).llm)


def test_batches_hold_captions_of_like_length_from_one_dataset(tiny_dataset: Path) -> None:
    items = all_items(tiny_dataset)
    for given, sizes in ((None, [1, 1, 2, 2, 2]), (16, [2, 6]), (4, [2, 2, 4])):
        batches = cache_text_encoder_outputs.make_batches(items, given)
        assert sorted(map(len, batches)) == sizes
        assert all(len({item.dataset.index for item in batch}) == 1 for batch in batches)
        lengths = [len(item.caption) for batch in batches if batch[0].dataset.index == 0 for item in batch]
        assert lengths == sorted(lengths)
    assert sorted(item.stem for batch in batches for item in batch) == sorted(item.stem for item in items)
