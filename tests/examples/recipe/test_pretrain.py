"""Pretraining: each stage learns, can be stopped and continued to the bit, and writes what the scripts load."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from examples.toy import world
from examples.toy.recipe import pretrain, pretrain_text, pretrain_transformer, pretrain_vae
from examples.toy.recipe.muon import Muon
from examples.toy.recipe.training_loop import Recipe, Run
from examples.toy.world import to_pixels
from hunyuan_model import load_text_encoder_1, load_text_encoder_2, load_transformer, load_vae
from hunyuan_model.vae.model import SCALING_FACTOR

pytestmark = pytest.mark.slow  # nobody needs the recipe to use the model

RECIPE = Recipe(steps=12, learning_rate=1e-2, muon_rate=1e-2, warm_up=2)


class _Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)


def _line_losses(module):
    def losses(step):
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        return {"loss": (module.layer(x)[:, 0] - x.sum(1)).square().mean()}

    return losses


def _line_run(folder, recipe=RECIPE):
    module = _Line()
    return Run("line", module, recipe, _line_losses(module), folder)


def test_a_stopped_run_continues_to_the_bit(tmp_path):
    whole = _line_run(tmp_path / "whole")
    assert whole.go()
    stopped = _line_run(tmp_path / "stopped")
    stopped.losses = _stop_at(stopped.losses, step=5)
    with pytest.raises(KeyboardInterrupt):
        stopped.go()
    assert not stopped.finished
    continued = _line_run(tmp_path / "stopped")
    assert continued.step == 5 and continued.go()
    for name, value in whole.averaged().items():
        assert torch.equal(value, continued.averaged()[name])
    assert torch.equal(whole.module.layer.weight, continued.module.layer.weight)


def _stop_at(losses, step):
    def stopping(now):
        if now == step:
            raise KeyboardInterrupt
        return losses(now)

    return stopping


def test_the_vae_begins_with_a_straight_path_and_learns(tmp_path):
    vae = pretrain_vae.new_vae()
    losses = pretrain_vae.VAELosses(vae)
    run = Run("vae", vae, Recipe(steps=12, learning_rate=1e-3, warm_up=3), losses, tmp_path)
    with torch.no_grad():
        before = losses(0)["psnr"]
    run.go()
    with torch.no_grad():
        assert losses(0)["psnr"] > before + 2.0


def test_normalised_latents_are_white_and_decode_to_the_same_pictures():
    vae = pretrain_vae.new_vae()
    x = to_pixels(world.draw_batch(world.generator(1), 4, 5).clips)
    with torch.no_grad():
        before = vae.decode(vae.encode(x).mean)
        pretrain_vae.normalise_latents(vae)
        assert torch.allclose(vae.decode(vae.encode(x).mean), before, atol=1e-3)
        latents = vae.encode(to_pixels(world.draw_batch(world.generator(2), 64, 1, wander=1.0).clips)).mean * SCALING_FACTOR
    values = latents.transpose(0, 1).flatten(1)  # (16, numbers)
    assert values.mean(1).abs().max() < 0.35
    sizes = torch.linalg.eigvalsh(torch.cov(values))
    assert 0.6 < sizes.max() < 2.0 and sizes.median() < 1.2


def test_muon_updates_are_orthogonal():
    torch.manual_seed(0)
    for shape in ((12, 40), (40, 12), (8, 3, 3, 3, 3)):
        weight = nn.Parameter(torch.zeros(shape))
        optimizer = Muon([weight], lr=1.0)
        weight.grad = torch.randn(shape)
        optimizer.step()
        sizes = torch.linalg.svdvals(weight.detach().flatten(1)) / max(1.0, shape[0] / weight[0].numel()) ** 0.5
        assert sizes.min() > 0.5 and sizes.max() < 1.3, (shape, sizes)
        assert (weight.grad * weight.detach()).sum() < 0


def test_readers_learn_and_unknown_words_have_an_answer_of_their_own(tmp_path):
    tokenizers = pretrain_text.write_tokenizers(tmp_path / "llama", tmp_path / "clip")
    for tokenizer, mark in zip(tokenizers, ("Ġ", "</w>")):
        for word in world.vocabulary():
            tokens = [token.replace(mark, "") for token in tokenizer.tokenize(f"a {word} a")]
            assert word in tokens, tokens
        assert len(tokenizer.tokenize("zorp")) > 1
    readers = pretrain_text.Readers(*tokenizers)
    losses = pretrain_text.ReadingLosses(readers, *tokenizers)
    run = Run("text", readers, Recipe(steps=8, learning_rate=1e-3, warm_up=2), losses, tmp_path)
    before = losses(10**6)["loss"]
    run.go()
    assert losses(10**6)["loss"] < before
    attributes = world.Attributes("ring", "red", "blue", "up")
    caption, answers = pretrain_text.random_caption(world.generator(3), attributes, invented_share=1.0)
    assert "ring" not in caption and answers[0] == len(world.SHAPES)


@pytest.fixture
def small_recipes(monkeypatch):
    """The same stages, a few steps each and with few clips."""
    for stage in (pretrain_vae, pretrain_text, pretrain_transformer):
        monkeypatch.setattr(stage, "RECIPE", dataclasses.replace(stage.RECIPE, steps=2, warm_up=1, earlier_ends=()))
    monkeypatch.setattr(pretrain_vae, "PICTURE_STEPS", 1)
    monkeypatch.setattr(pretrain_transformer, "CLIPS_OF", {1: 8, 9: 8})
    monkeypatch.setattr(pretrain_transformer, "PICTURES_FIRST", (1, 9))
    monkeypatch.setattr(pretrain_transformer, "CLIPS_FROM", 100)
    monkeypatch.setattr(pretrain_transformer, "BATCH_SIZE", 4)


def test_all_stages_write_what_the_library_loads(tmp_path, small_recipes, monkeypatch, capsys):
    command = ["pretrain", "--output", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*command, "--minutes", "1e-9"])
    pretrain.main()
    assert "run the same command again to continue" in capsys.readouterr().out
    assert not (tmp_path / "model" / "dit.safetensors").exists()
    monkeypatch.setattr("sys.argv", command)
    pretrain.main()
    model = tmp_path / "model"
    placed = {"device": "cpu", "dtype": torch.float32}
    transformer, vae = load_transformer(model / "dit.safetensors", **placed), load_vae(model / "vae", **placed)
    states, mask = load_text_encoder_1(model / "text_encoder", **placed).encode(["a red circle on a blue background"])
    pooled = load_text_encoder_2(model / "text_encoder_2", **placed).encode(["a red circle on a blue background"])
    with torch.no_grad():
        velocity = transformer(torch.randn(1, 16, 3, 8, 8), torch.tensor([500.0]), states, mask, pooled, torch.tensor([6000.0]))
        assert velocity.shape == (1, 16, 3, 8, 8)
        assert vae.decode(velocity).shape == (1, 3, 9, 64, 64)
