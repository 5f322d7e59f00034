"""hv_train_network.py with samples and logs: it trains the same, in the order and at the times that were asked for."""

from __future__ import annotations

import csv
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from networks.training.samples import sampling as training_samples

STEPS = ("--max_train_steps", 7, "--gradient_accumulation_steps", 2, "--learning_rate", "1e-2", "--lr_scheduler", "cosine")
DROPOUTS = ("--network_dropout", "0.2", "--network_args", "rank_dropout=0.2", "module_dropout=0.2")


@pytest.fixture
def sampled(train, tiny_model, tmp_path):
    """``sampled(*flags)``: a training with a picture and a clip as samples when the flags say so."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball --w 32 --h 32 --s 1\na cube --w 32 --h 32 --f 5 --s 1 --d 4\n", encoding="utf-8")
    files = ("--sample_prompts", prompts, "--vae", tiny_model.vae)
    files += ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)

    def run(*flags: object, **options):
        ended = train(*files, *flags, **options)
        assert ended.status == 0, ended.stderr
        return ended

    return run


def losses(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return [row["loss"] for row in csv.DictReader(file)]


def sampled_places(folder: Path) -> list[str]:
    """Places (steps or epochs) and indices of the samples, once each, in the order of the places."""
    return sorted("_".join(path.name.split("_")[1:3]) for path in (folder / "sample").iterdir())


@pytest.mark.parametrize(
    "optimizer", [(), pytest.param(("--optimizer_type", "schedulefree.AdamWScheduleFree"), marks=pytest.mark.slow)]
)
def test_samples_and_logs_change_no_loss_and_no_weight(train, sampled, tmp_path: Path, optimizer) -> None:
    if optimizer:
        pytest.importorskip("schedulefree")
    flags = (*STEPS, *DROPOUTS, *optimizer) if not optimizer else (*STEPS[:6], *DROPOUTS, *optimizer)
    assert train(*flags, "--loss_log", tmp_path / "plain.csv", name="plain").status == 0
    logs = ("--logging_dir", tmp_path / "logs") if not optimizer else ()
    sampled(*flags, "--loss_log", tmp_path / "s.csv", "--sample_at_first", "--sample_every_n_steps", 2, *logs, name="s")
    assert losses(tmp_path / "plain.csv") == losses(tmp_path / "s.csv") and len(losses(tmp_path / "s.csv")) == 7
    first, second = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("plain", "s"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert sampled_places(tmp_path / "out") == [f"{step:06d}_{index:02d}" for step in (0, 2, 4, 6) for index in (0, 1)]


@pytest.mark.slow
def test_epochs_are_sampled_too_and_nothing_twice(sampled, tmp_path: Path) -> None:
    """An epoch has four batches: pictures of two sizes, and a clip."""
    sampled("--max_train_epochs", 3, "--sample_every_n_epochs", 2, "--sample_every_n_steps", 4)
    places = {name[:-3] for name in sampled_places(tmp_path / "out")}
    assert places == {"000004", "e000002", "000012"}


def test_the_last_step_is_sampled_after_the_last_model_is_saved(sampled, tmp_path: Path, monkeypatch) -> None:
    seen = []
    run = training_samples.SampleRound.run
    monkeypatch.setattr(
        training_samples.SampleRound,
        "run",
        lambda *arguments: seen.append(sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))) or run(*arguments),
    )
    sampled("--max_train_steps", 2, "--save_every_n_steps", 1, "--sample_every_n_steps", 1)
    step_1 = "lora-step00000001.safetensors"
    assert seen == [[step_1], [step_1, "lora.safetensors", "lora_comfyui.safetensors"]]


def test_samples_show_what_is_learnt(sampled, tmp_path: Path) -> None:
    """The same prompt and seed give another picture after learning, and the same where nothing was learnt."""
    flags = ("--sample_at_first", "--sample_every_n_steps", 2, "--no_metadata")
    for name, rate in (("learnt", "0.5"), ("not", "1e-30")):
        sampled("--max_train_steps", 2, "--learning_rate", rate, *flags, name=name)
        before, after = (next((tmp_path / "out" / "sample").glob(f"{name}_{step}_01_*.mp4")) for step in ("000000", "000002"))
        assert (before.read_bytes() == after.read_bytes()) == (name == "not")


def test_a_signal_gives_samples_up_and_stops_after_the_next_step(train, sampled, tmp_path: Path, monkeypatch) -> None:
    generate = training_samples.generate_latents

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return generate(*arguments, **options)

    monkeypatch.setattr(training_samples, "generate_latents", interrupted)
    with pytest.raises(AssertionError):
        sampled("--max_train_steps", 5, "--sample_every_n_steps", 2)
    out = tmp_path / "out"
    assert [path.name for path in out.glob("*-state")] == ["lora-step00000003-state"]
    assert not (out / "sample").exists() or not any((out / "sample").iterdir())


def test_tensorboard_has_every_step(sampled, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ("--network_args", "loraplus_lr_ratio=4", "--log_config", "--log_prefix", "my-", "--wandb_api_key", "s3cret")
    sampled(*STEPS, *flags, "--logging_dir", tmp_path / "logs", "--sample_every_n_steps", 3, "--validation_split", 0.3)
    (run,) = (tmp_path / "logs").iterdir()
    assert run.name.startswith("my-")
    events = accumulator.EventAccumulator(str(run / "network_train")).Reload()
    names = {"loss/current", "loss/average", "loss/validation", "grad_norm", "seconds_per_step"}
    tags = events.Tags()
    assert names < set(tags["scalars"]) and len([tag for tag in tags["scalars"] if tag.startswith("lr/")]) == 2
    assert [event.step for event in events.Scalars("loss/current")] == list(range(1, 8))
    low, high = (events.Scalars(tag) for tag in sorted(tag for tag in tags["scalars"] if tag.startswith("lr/")))
    assert {round(max(a.value, b.value) / min(a.value, b.value)) for a, b in zip(low, high) if a.value} == {4}
    assert set(tags["images"]) == {"sample/00", "sample/01"} and len(events.Images("sample/00")) == 2
    stored = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert b"max_train_steps" in stored and b"s3cret" not in stored
