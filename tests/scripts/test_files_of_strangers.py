"""Files that a stranger may hand out, shown to the scripts: status 2, one sentence, nothing executed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bench import Bench, refused

ROOT = Path(__file__).resolve().parents[2]
STRANGERS, TOY = ROOT / "tests" / "strangers", ROOT / "examples" / "toy"
FOLDERS = {
    "tokenizer_auto_map": ("text_encoder_2", "which is never executed"),
    "tokenizer_redos": ("text_encoder", "may take for ever"),
    "tokenizer_no_unk": ("text_encoder", "WordLevel"),
    "tokenizer_huge_ids": ("text_encoder", "4000000000"),
    "config_layers": ("text_encoder", "num_hidden_layers is 1000000000"),
}


@pytest.mark.parametrize("stranger", FOLDERS)
def test_folders_of_text_encoders(bench: Bench, stranger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part, says = FOLDERS[stranger]
    for name in ("text_encoder", "text_encoder_2"):
        shutil.copytree(TOY / name, bench.folder / name)
    for path in (STRANGERS / stranger).iterdir():
        shutil.copy(path, bench.folder / part / path.name.removesuffix(".txt"))
    monkeypatch.chdir(bench.folder)  # where the code of a stranger would leave its trace
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    encoders = ["--text_encoder1", bench.folder / "text_encoder", "--text_encoder2", bench.folder / "text_encoder_2"]
    toml = bench.media("image", a_png=(TOY / "concept" / "pictures" / "zorp_01_red.png").read_bytes())
    refused(bench.texts(toml, *encoders), says)
    refused(bench.generate(*encoders), says)
    assert not list(bench.folder.rglob("executed*"))


def test_a_dict_that_is_in_itself_is_no_model(bench: Bench) -> None:
    refused(bench.train("--dit", STRANGERS / "self_reference.pt"), "holds no state dict")
    refused(bench.generate("--vae", STRANGERS / "self_reference.pt"), "holds no state dict")
