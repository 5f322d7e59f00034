"""Distributions of training timesteps against reference draws, exact fractions and formulas."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from networks.training.loss.timestep_preview import save_timestep_image, show_timesteps, timestep_chart, timestep_shares
from networks.training.loss.timestep_sampling import (
    TimestepSampler,
    TimestepSettings,
    loss_weights,
    noisy_latents,
    timesteps_from_uniform,
)
from utils.errors import UserError

GOLDENS = Path(__file__).resolve().parents[3] / "goldens"
REFERENCE = json.loads((GOLDENS / "timesteps.json").read_text(encoding="utf-8"))
DRAWS = 200_000


def sampler(seed: int = 0, **settings) -> TimestepSampler:
    return TimestepSampler(TimestepSettings(**settings), torch.Generator().manual_seed(seed))


def settings_of(row: dict) -> dict:
    return {name: row[name] for name in TimestepSettings.__dataclass_fields__ if name in row}


def row_name(row: dict) -> str:
    return "-".join(str(value) for value in settings_of(row).values())


def assert_fractions(found: torch.Tensor, expected: torch.Tensor, reference_draws: float) -> None:
    tolerance = 5 * (expected * (1 - expected) * (1 / DRAWS + 1 / reference_draws)).sqrt() + 1e-4
    assert ((found - expected).abs() <= tolerance).all(), (found - expected) / tolerance


@pytest.mark.parametrize("row", REFERENCE["rows"], ids=row_name)
def test_distribution_is_the_reference(row):
    settings = settings_of(row)
    t = sampler(**settings).sample(DRAWS).double()
    sigma = settings["timestep_sampling"] == "sigma"
    values = t * 1000 if sigma else t
    found = torch.histogram(values, torch.tensor(row["bin_edges"], dtype=torch.float64)).hist / DRAWS
    counts = torch.tensor(row["counts"], dtype=torch.float64) / row["samples"]
    low, high = settings.get("min_timestep", 0), settings.get("max_timestep", 1000)
    if sigma:
        # The reference took the range as one of table indices, which count down from 1000; ours is one of timesteps.
        counts = counts.roll((low - (1000 - high)) // 50)
    assert_fractions(found, counts, row["samples"])
    if "exact_fraction_per_bin" in row:
        assert_fractions(found, torch.tensor(row["exact_fraction_per_bin"], dtype=torch.float64), math.inf)
    assert low <= (t * 1000).min() + 1e-4 and (t * 1000).max() <= high + 1e-4


def test_range_of_the_sigma_sampler_is_one_of_timesteps():
    t = sampler(timestep_sampling="sigma", min_timestep=100, max_timestep=103).sample(3000) * 1000
    values, counts = t.round().long().unique(return_counts=True)
    assert values.tolist() == [101, 102, 103] and counts.min() > 850
    torch.testing.assert_close(t, t.round(), atol=1e-4, rtol=0)
    # Small densities are noise, in any range: 68 % of logit_normal(2, 0.1) lies near 0.88 of the way to the low end.
    t = sampler(weighting_scheme="logit_normal", logit_mean=2.0, logit_std=0.1, min_timestep=0, max_timestep=400).sample(4000)
    assert (t.mean() * 1000).item() == pytest.approx(400 * (1 - torch.sigmoid(torch.tensor(2.0)).item()), abs=2)


@pytest.mark.parametrize("name", ["uniform", "sigmoid", "shift", "logsnr", "sigma"])
@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode"])
def test_extremes_of_the_uniform_number_stay_in_range(name, scheme):
    u = torch.tensor([0.0, 5e-324, 0.5, 1 - 2**-53], dtype=torch.float64)
    settings = TimestepSettings(name, 3.0, weighting_scheme=scheme, min_timestep=10, max_timestep=900)
    t = timesteps_from_uniform(u, settings)
    assert t.dtype == torch.float32 and t.isfinite().all() and t.min() >= 0.01 - 1e-6 and t.max() <= 0.9 + 1e-6


def test_sigmoid_scale_and_shift_follow_their_formulas():
    u = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    normal = torch.distributions.Normal(0.0, 1.0).icdf(u)
    t = timesteps_from_uniform(u, TimestepSettings("sigmoid", sigmoid_scale=1.7)).double()
    torch.testing.assert_close(t, 1 / (1 + torch.exp(-1.7 * normal)), atol=1e-6, rtol=0)
    shifted = timesteps_from_uniform(u, TimestepSettings("shift", 5.0, 1.7)).double()
    torch.testing.assert_close(shifted, 5 * t / (1 + 4 * t), atol=1e-6, rtol=0)


def test_samples_come_from_the_given_generator_alone():
    state = torch.get_rng_state()
    first = sampler(seed=7, timestep_sampling="shift").sample(16)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sampler(seed=7, timestep_sampling="shift").sample(16), first)


def test_loss_weights_are_the_reference():
    reference = REFERENCE["loss_weights"]
    for scheme in ("sigma_sqrt", "cosmap"):
        for place in ("", "_off_the_table"):
            found = loss_weights(torch.tensor(reference[f"timesteps{place}"]) / 1000, scheme)
            torch.testing.assert_close(found, torch.tensor(reference[f"values{place}"][scheme]), rtol=1e-4, atol=0)
    assert loss_weights(torch.tensor([0.0]), "sigma_sqrt").item() == pytest.approx(1e6)
    assert all(loss_weights(torch.tensor([0.5, 0.7]), scheme).tolist() == [1, 1] for scheme in ("none", "logit_normal", "mode"))


def test_noisy_latents_are_the_reference():
    example = load_file(GOLDENS / "timesteps_example.safetensors")
    noisy = noisy_latents(example["latent"], example["noise"], example["t"])
    torch.testing.assert_close(noisy, example["noisy"], atol=1e-6, rtol=0)
    torch.testing.assert_close(example["noise"] - example["latent"], example["target"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_timestep": 500, "max_timestep": 500}, "are no range"),
        ({"min_timestep": -1}, "are no range"),
        ({"max_timestep": 1001}, "are no range"),
        ({"max_timestep": math.nan}, "are no range"),
        ({"min_timestep": 10.2, "max_timestep": 10.8}, "none between"),
        ({"discrete_flow_shift": 0}, "--discrete_flow_shift must be above 0"),
        ({"logit_std": -1}, "--logit_std must be above 0"),
        (
            {"timestep_sampling": "sigmoid", "sigmoid_scale": 0.01, "min_timestep": 900, "preserve_distribution_shape": True},
            "has no timestep between",
        ),
    ],
)
def test_impossible_settings_are_user_errors(settings, message):
    with pytest.raises(UserError, match=message):
        TimestepSettings(**settings)


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"discrete_flow_shift": 7.0}, "--discrete_flow_shift 7.0 has no effect with --timestep_sampling sigma"),
        ({"sigmoid_scale": 2.0, "timestep_sampling": "uniform"}, "--sigmoid_scale"),
        ({"weighting_scheme": "mode", "timestep_sampling": "uniform"}, "--weighting_scheme mode"),
        ({"logit_std": 2.0, "timestep_sampling": "shift"}, "--logit_std"),
        ({"preserve_distribution_shape": True}, "--preserve_distribution_shape has no effect without"),
        ({"logit_mean": 1.0, "timestep_sampling": "logsnr"}, None),
        ({"mode_scale": 0.5, "weighting_scheme": "mode"}, None),
        ({"discrete_flow_shift": 7.0, "sigmoid_scale": 2.0, "timestep_sampling": "shift"}, None),
    ],
)
def test_flags_without_effect_are_named(changed, flag):
    sentences = TimestepSettings(**changed).without_effect()
    assert len(sentences) == (flag is not None) and all(flag in sentence for sentence in sentences)


def test_preview_shows_the_distribution():
    draws, loss = timestep_shares(TimestepSettings(timestep_sampling="sigmoid"), 20)
    row = next(row for row in REFERENCE["rows"] if row["timestep_sampling"] == "sigmoid" and "min_timestep" not in row)
    torch.testing.assert_close(draws, torch.tensor(row["exact_fraction_per_bin"], dtype=torch.float64), atol=1e-4, rtol=0)
    assert torch.equal(draws, loss)
    flat, weighted = timestep_shares(TimestepSettings(weighting_scheme="cosmap"), 20)
    torch.testing.assert_close(flat, torch.full((20,), 0.05, dtype=torch.float64), atol=1e-4, rtol=0)
    sigma = torch.arange(1, 1001, dtype=torch.float64) / 1000
    exact = (2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))).view(20, 50).sum(1)
    torch.testing.assert_close(weighted, exact / exact.sum(), atol=1e-4, rtol=0)
    lines = timestep_chart(TimestepSettings(timestep_sampling="uniform", max_timestep=500), bins=10).splitlines()
    assert len(lines) == 11 and [line.count("#") for line in lines[1:]] == [60] * 5 + [0] * 5
    assert lines[1].split()[:3] == ["0-100", "20.0%", "20.0%"]


def test_preview_picture_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    save_timestep_image(TimestepSettings(timestep_sampling="uniform", max_timestep=500), tmp_path / "timesteps.png")
    with Image.open(tmp_path / "timesteps.png") as image:
        assert image.format == "PNG" and image.size == (800, 500) and len(image.convert("L").getcolors()) > 2


def test_without_matplotlib_the_console_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib; or use --show_timesteps console"):
        show_timesteps("image", TimestepSettings(), tmp_path)


def test_logsnr_is_normal():
    t = sampler(timestep_sampling="logsnr", logit_mean=0.6, logit_std=1.5).sample(DRAWS).double()
    logsnr = 2 * torch.log((1 - t) / t)
    assert logsnr.mean().item() == pytest.approx(0.6, abs=0.02) and logsnr.std().item() == pytest.approx(1.5, abs=0.02)


@pytest.mark.parametrize(
    "settings",
    [
        {"timestep_sampling": "uniform"},
        {"timestep_sampling": "sigmoid", "sigmoid_scale": 1.5},
        {"timestep_sampling": "shift", "discrete_flow_shift": 5.0},
        {"timestep_sampling": "logsnr", "logit_std": 2.0},
        {"timestep_sampling": "sigma", "weighting_scheme": "logit_normal"},
        {"timestep_sampling": "sigma", "weighting_scheme": "mode", "mode_scale": 3.0},
    ],
    ids=lambda settings: settings["timestep_sampling"] + settings.get("weighting_scheme", ""),
)
def test_a_preserved_shape_is_what_rejection_leaves(settings):
    whole = sampler(seed=1, **settings).sample(DRAWS).double()
    rejected = whole[(whole >= 0.25) & (whole <= 0.8)]
    cut = sampler(**settings, min_timestep=250, max_timestep=800, preserve_distribution_shape=True).sample(DRAWS).double()
    assert cut.min() > 0.25 - 1e-6 and cut.max() < 0.8 + 1e-6
    edges = torch.linspace(0.2499, 0.8001, 12, dtype=torch.float64)
    expected = torch.histogram(rejected, edges).hist / len(rejected)
    assert_fractions(torch.histogram(cut, edges).hist / DRAWS, expected, len(rejected))


@pytest.mark.parametrize("preserve", [False, True])
def test_buckets_cover_the_distribution_evenly(preserve):
    settings = TimestepSettings(
        "sigmoid", min_timestep=100, max_timestep=900, preserve_distribution_shape=preserve, num_timestep_buckets=8
    )
    stratified = TimestepSampler(settings, torch.Generator().manual_seed(3))
    edges = timesteps_from_uniform(torch.arange(1, 8, dtype=torch.float64) / 8, settings)
    draws = torch.cat([stratified.sample(3) for _ in range(8 * 5)])
    for group in draws.split(8):
        assert sorted(torch.bucketize(group, edges).tolist()) == list(range(8))
    assert len({tuple(torch.bucketize(group, edges).tolist()) for group in draws.split(8)}) > 10


def test_every_epoch_that_is_long_enough_is_covered_evenly():
    stratified = sampler(seed=3, timestep_sampling="uniform", num_timestep_buckets=4)
    for _ in range(5):
        stratified.begin_epoch()
        parts = (4 * stratified.sample(11)).long().bincount(minlength=4)
        assert parts.max() - parts.min() == 1
    epochs = []
    for _ in range(4):  # too short for a cover: together they are one
        stratified.begin_epoch()
        epochs.append((4 * stratified.sample(3)).long())
    assert torch.equal(torch.cat(epochs).bincount(minlength=4), torch.full((4,), 3))


def test_a_stratified_sampler_goes_on_from_its_state():
    first = sampler(seed=3, timestep_sampling="uniform", num_timestep_buckets=5)
    first.sample(7)
    state = first.state_dict()
    second = sampler(seed=4, timestep_sampling="uniform", num_timestep_buckets=5)
    second.load_state_dict(state)
    first.begin_epoch()
    second.begin_epoch()
    assert torch.equal(first.sample(20), second.sample(20))
