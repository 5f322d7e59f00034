"""One optimizer step: what it waits for, what it learns from, and what it leaves alone."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from variations import slow_but

import hunyuan_model
import hv_train_network
from hunyuan_model.sampling.flow import flow_sigmas, sample_latents
from networks.training import loop
from networks.training.loss.flow_matching import FlowMatching
from networks.training.loss.timestep_sampling import TimestepSampler

READERS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")


class OnHost(torch.Tensor):
    """In host memory also where a GPU computes, as is what is made of it alone: reading it waits for nobody."""


@contextmanager
def counted_reads() -> Iterator[list[str]]:
    """The reads inside of tensors that would be on the GPU, each of which makes the host wait for it."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., object]:
        plain = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *arguments: object, **options: object) -> object:
            if not isinstance(tensor, OnHost):
                found.append(name)
            return plain(tensor, *arguments, **options)

        return read

    with pytest.MonkeyPatch.context() as patch:
        for name in READERS:
            patch.setattr(torch.Tensor, name, watch(name))
        yield found


@pytest.fixture
def each_step(monkeypatch):
    """``each_step(function)`` has every step of a training made by ``function(step, training, batches)``."""
    plain = loop.train_step

    def arrange(function: Callable[..., object]) -> None:
        monkeypatch.setattr(loop, "train_step", lambda training, batches: function(plain, training, batches))

    return arrange


def losses_logged(path: Path) -> list[float]:
    with open(path, encoding="utf-8", newline="") as file:
        return [float(line["loss"]) for line in csv.DictReader(file)]


def weights(network: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Waiting for the device


@pytest.mark.parametrize("batches_of_a_step", slow_but([1, 3], 3))
def test_a_step_waits_for_the_device_once(train, each_step, monkeypatch, batches_of_a_step) -> None:
    """Timesteps are sampled on the host, and the transformer reads the lengths of the texts there."""
    sample = TimestepSampler.sample
    monkeypatch.setattr(TimestepSampler, "sample", lambda sampler, count: sample(sampler, count).as_subclass(OnHost))
    moved = hunyuan_model.transformer.model.HYVideoDiffusionTransformer.forward

    def forward(transformer, x, t, *texts):  # what it is given has come to the GPU, the mask excepted
        texts = [text if place == 1 else text.as_subclass(torch.Tensor) for place, text in enumerate(texts)]
        return moved(transformer, x.as_subclass(torch.Tensor), t.as_subclass(torch.Tensor), *texts)

    monkeypatch.setattr(hunyuan_model.transformer.model.HYVideoDiffusionTransformer, "forward", forward)
    waits: list[list[str]] = []

    def counting(step, training, batches):
        for batch in batches.own.values():
            batch["text_mask"] = batch["text_mask"].as_subclass(OnHost)
        with counted_reads() as found:
            made = step(training, batches)
        waits.append(found)
        return made

    each_step(counting)
    flags = ("--optimizer_type", "SGD", "--gradient_accumulation_steps", batches_of_a_step, "--gradient_checkpointing")
    assert train("--max_train_epochs", 2, *flags).status == 0
    assert len(waits) > 2 and waits == [["tolist"]] * len(waits)


@pytest.mark.gpu
def test_a_gpu_is_waited_for_once_in_a_step(train, each_step) -> None:
    """As torch itself reports, which sees copies and reads that Python does not."""
    waits: list[int] = []

    def counting(step, training, batches):
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as reported:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                made = step(training, batches)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing CUDA operation" in str(one.message) for one in reported))
        return made

    each_step(counting)
    flags = ("--optimizer_type", "SGD", "--gradient_accumulation_steps", 2, "--gradient_checkpointing")
    assert train("--max_train_epochs", 3, *flags).status == 0
    assert len(waits) > 3 and set(waits[2:]) == {1}  # after the first of each size


def test_the_counter_sees_what_would_wait() -> None:
    value = torch.ones(())
    with counted_reads() as found:
        assert value and float(value) == value.item() == value.tolist() == 1
        assert not found.clear() and value.as_subclass(OnHost)
    assert not found


def test_sampling_never_waits_for_the_device(tiny_model) -> None:
    transformer = hunyuan_model.load_transformer(tiny_model.dit, device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with counted_reads() as found:
        latents = sample_latents(
            transformer,
            torch.randn(1, 16, 1, 4, 4, generator=generator),
            torch.randn(1, 9, 64, generator=generator),
            (torch.arange(9) < 5)[None].as_subclass(OnHost),
            torch.randn(1, 48, generator=generator),
            sigmas=flow_sigmas(3, 7.0),
            guidance_scale=6.0,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
    assert latents.isfinite().all() and not found


def test_the_logged_loss_is_the_mean_over_the_items(train, each_step, monkeypatch, tmp_path: Path) -> None:
    plain, steps = FlowMatching.loss_at, []

    def noted(flow_matching, batch, *arguments):
        loss = plain(flow_matching, batch, *arguments)
        steps[-1].append((loss.item(), len(batch["names"])))
        return loss

    def begin(step, training, batches):
        steps.append([])
        return step(training, batches)

    monkeypatch.setattr(FlowMatching, "loss_at", noted)
    each_step(begin)
    flags = ("--gradient_accumulation_steps", 3, "--learning_rate", 1e-2, "--loss_log", tmp_path / "loss.csv")
    assert train("--max_train_epochs", 2, *flags).status == 0
    assert [len(losses) for losses in steps] == [3, 1, 3, 1]
    assert {items for losses in steps for _, items in losses} == {1, 2}
    expected = [sum(loss * items for loss, items in losses) / sum(items for _, items in losses) for losses in steps]
    assert losses_logged(tmp_path / "loss.csv") == pytest.approx(expected, rel=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# Steps that are skipped


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_one_batch_that_is_not_finite_leaves_the_network_as_it_was(train, each_step, monkeypatch, caplog, kind) -> None:
    plain, count, steps = FlowMatching.loss_at, iter(range(1, 99)), []

    def third_is_not_finite(*arguments):
        loss = plain(*arguments)
        if next(count) != 3:
            return loss
        if kind == "loss":
            return loss * torch.nan
        loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    def noting(step, training, batches):
        before = weights(training.network)
        made = step(training, batches)
        steps.append((made, same(before, weights(training.network)), [batch["names"] for batch in batches.own.values()]))
        return made

    monkeypatch.setattr(FlowMatching, "loss_at", third_is_not_finite)
    each_step(noting)
    assert train("--max_train_epochs", 2, "--gradient_accumulation_steps", 2, "--learning_rate", 1e-2).status == 0
    assert [stayed for _, stayed, _ in steps] == [False, True, False, False]
    assert [line for line in caplog.messages if "was skipped" in line] == [f"step 2 was skipped: {steps[1][0].skipped}"]
    skipped, _, (first, second) = steps[1]
    assert f"the {kind} is" in skipped.skipped and all(name in skipped.skipped for name in first)
    assert (second[0] in skipped.skipped) is (kind == "gradient")  # that of any of them may be the cause


def test_under_a_loss_scaler_a_loss_not_finite_is_skipped_and_the_scale_stays(train, each_step, monkeypatch, tmp_path) -> None:
    """A scaler as that of fp16, here on the CPU; a scale that is a power of two changes no digit."""
    make, plain, count, scales = hv_train_network.make_accelerator, FlowMatching.loss_at, iter(range(1, 99)), []
    scaled = False

    def with_scaler(args):
        accelerator = make(args)
        if scaled:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            monkeypatch.setattr(Accelerator, "unscale_gradients", lambda own: own.scaler.unscale_(own._optimizers[0].optimizer))
        return accelerator

    def second_is_not_finite(*arguments):
        return plain(*arguments) * (torch.nan if next(count) == 2 else 1)

    def noting(step, training, batches):
        made = step(training, batches)
        scales.append(training.accelerator.scaler and training.accelerator.scaler.get_scale())
        return made

    monkeypatch.setattr(hv_train_network, "make_accelerator", with_scaler)
    monkeypatch.setattr(FlowMatching, "loss_at", second_is_not_finite)
    each_step(noting)
    flags = ("--max_train_steps", 4, "--learning_rate", 1e-2)
    assert train(*flags, name="plain").status == 0
    scaled, count = True, iter(range(1, 99))
    with warnings.catch_warnings(record=True) as reported:
        warnings.simplefilter("always")
        ended = train(*flags, name="scaled")
    assert ended.status == 0, ended.stderr
    assert not [str(one.message) for one in reported if "lr_scheduler" in str(one.message)]
    assert scales == [None] * 4 + [1024.0] * 4
    first, second = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("plain", "scaled"))
    torch.testing.assert_close(first, second, atol=1e-7, rtol=1e-5)
