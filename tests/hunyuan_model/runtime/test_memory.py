"""hunyuan_model.runtime.memory: what is predicted, against what is counted while the same thing runs, and against known sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from allocations import peak_bytes, saved_bytes
from torch import Tensor, nn
from variations import slow_but

import hunyuan_model
from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime.gradient_checkpointing import enable_gradient_checkpointing
from hunyuan_model.runtime.memory import (
    ActivationBytes,
    BatchSize,
    loss_bytes,
    sampling_activations,
    table_bytes,
    training_activations,
    weight_bytes,
)
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.transformer.config import TransformerConfig, rope_dims_for
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from networks.lora import create_network

FULL = TransformerConfig()
WITHIN = 0.15
BF16, FP32 = torch.bfloat16, torch.float32
CHECKPOINTING = RuntimeSettings(gradient_checkpointing=True)


def config(hidden: int = 128, doubles: int = 2, singles: int = 3, mlp: int = 512) -> TransformerConfig:
    return TransformerConfig(
        hidden_size=hidden,
        heads=hidden // 32,
        head_dim=32,
        double_depth=doubles,
        single_depth=singles,
        mlp_size=mlp,
        text_dim=64,
        pooled_dim=48,
        rope_dims=rope_dims_for(32),
    )


@dataclass(frozen=True)
class Case:
    """A model, a batch, and how it is computed.

    Attributes:
        lengths: of the captions; all full if None.
        modulation: whether that is trained too, so that gates have gradients.
        keeps: whether checkpointing keeps the results of attention.
    """

    config: TransformerConfig
    batch: BatchSize
    dtype: torch.dtype
    checkpointing: bool
    rank: int = 4
    lengths: tuple[int, ...] | None = None
    modulation: bool = False
    keeps: bool = False

    def __str__(self) -> str:
        size = "x".join(map(str, (self.batch.samples, *self.batch.size, self.batch.text_tokens)))
        how = "again but attention" if self.keeps else "again" if self.checkpointing else "kept"
        depth = f"{self.config.double_depth}+{self.config.single_depth}of{self.config.hidden_size}and{self.config.mlp_size}"
        return f"{depth}-{size}-{str(self.dtype).removeprefix('torch.')}-{how}-rank{self.rank}{'-modulation' * self.modulation}"


CASES = [
    Case(config(), BatchSize(1, (1, 32, 48), 64), BF16, checkpointing=True),
    Case(config(), BatchSize(1, (1, 32, 48), 64), BF16, checkpointing=True, modulation=True),
    Case(config(), BatchSize(1, (1, 32, 48), 64), BF16, checkpointing=False),
    Case(config(), BatchSize(1, (2, 32, 24), 200), FP32, checkpointing=True, rank=16),
    Case(config(), BatchSize(1, (2, 32, 24), 16), FP32, checkpointing=False, rank=1),
    Case(config(), BatchSize(3, (1, 16, 32), 64), BF16, checkpointing=False, rank=16, lengths=(64, 5, 30)),
    Case(config(), BatchSize(2, (1, 24, 32), 64), BF16, checkpointing=True),
    Case(config(), BatchSize(1, (1, 32, 48), 64), BF16, checkpointing=True, keeps=True),
    Case(config(hidden=192, doubles=4, singles=1, mlp=384), BatchSize(1, (1, 32, 32), 32), BF16, checkpointing=True, keeps=True),
    Case(config(hidden=96, doubles=1, singles=12, mlp=576), BatchSize(2, (1, 24, 24), 48), FP32, checkpointing=True, keeps=True),
    Case(config(hidden=192, doubles=4, singles=1, mlp=384), BatchSize(1, (1, 32, 32), 32), BF16, checkpointing=True),
    Case(config(hidden=96, doubles=1, singles=5, mlp=576), BatchSize(2, (1, 24, 24), 48), FP32, checkpointing=True),
    Case(config(hidden=96, doubles=1, singles=5, mlp=576), BatchSize(2, (1, 24, 24), 48), BF16, checkpointing=False),
]


@dataclass
class Built:
    """A case with everything that runs it."""

    case: Case
    transformer: nn.Module
    network: nn.Module
    inputs: tuple[Tensor, ...]

    @property
    def weights(self) -> list[Tensor]:
        return [*self.transformer.parameters(), *self.network.parameters()]

    def loss(self) -> Tensor:
        return self.transformer(*self.inputs).float().mean()

    def step(self) -> None:
        self.loss().backward()

    def predicted(self) -> ActivationBytes:
        values = sum(parameter.numel() for parameter in self.network.parameters())
        runtime = RuntimeSettings(gradient_checkpointing=self.case.checkpointing, keep_attention=self.case.keeps)
        return training_activations(self.case.config, self.case.batch, self.case.dtype, runtime, values)


def build(case: Case) -> Built:
    torch.manual_seed(0)
    transformer = HYVideoDiffusionTransformer(case.config).to(case.dtype).requires_grad_(False).eval()
    if case.checkpointing:
        enable_gradient_checkpointing(transformer, keep_attention=case.keeps)
    options = {"include_patterns": r"['.*mod.*']"} if case.modulation else {}
    network = create_network(1.0, case.rank, 1.0, None, None, transformer, **options)
    network.apply_to(None, transformer)
    network.train()
    samples, text = case.batch.samples, case.batch.text_tokens
    lengths = torch.tensor(case.lengths or (text,) * samples)
    inputs = (
        torch.randn(samples, 16, *case.batch.size, dtype=case.dtype),
        torch.rand(samples) * 1000,
        torch.randn(samples, text, case.config.text_dim, dtype=case.dtype),
        torch.arange(text) < lengths[:, None],
        torch.randn(samples, case.config.pooled_dim, dtype=case.dtype),
        torch.rand(samples) * 1000,
    )
    return Built(case, transformer, network, inputs)


def close(predicted: float, counted: float) -> bool:
    return abs(predicted - counted) <= WITHIN * counted


@pytest.mark.parametrize("case", slow_but(CASES, *CASES[1:6], CASES[8], CASES[11]), ids=str)
def test_training_takes_what_is_predicted(case: Case) -> None:
    built = build(case)
    predicted, table = built.predicted(), table_bytes(case.config, case.batch)
    if not case.checkpointing:
        assert close(predicted.inputs + predicted.kept + table, saved_bytes(built.loss, built.weights))
    else:
        # At the peak fewer may be left, where that is in the backward pass of the double blocks.
        inputs = (case.config.double_depth + case.config.single_depth + 1) * case.config.hidden_size * case.dtype.itemsize
        inputs *= case.batch.tokens(case.config)
        assert close(inputs + table, saved_bytes(built.loss, [*built.weights, *built.inputs]))
    built.step()  # gradients and tables are there before what is counted begins
    assert close(predicted.device, peak_bytes(built.step))


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[7]], ids=str)
def test_sampling_takes_what_is_predicted(case: Case, monkeypatch) -> None:
    monkeypatch.setattr(
        "hunyuan_model.transformer.cpu_kernels.SLICE_VALUES", 2**13
    )  # of these small tensors a slice would be the whole
    built = build(case)
    with torch.no_grad():
        built.loss()
        counted = peak_bytes(built.loss)
    assert close(sampling_activations(case.config, case.batch, case.dtype), counted)


@pytest.mark.parametrize("weights", WeightFormat)
@pytest.mark.parametrize("blocks", [0, 1, 4])
def test_weights_lie_where_they_are_expected(tiny_model, weights, blocks) -> None:
    runtime = RuntimeSettings(weights, blocks_to_swap=blocks, img_in_txt_in_offloading=blocks == 4)
    model = hunyuan_model.load_transformer(tiny_model.dit, device="cpu", dtype=BF16, runtime=runtime)
    predicted = weight_bytes(model.config, BF16, runtime)
    slots = model.block_swap._slots if blocks else []
    assert predicted.slots == pytest.approx(sum(slot.memory.nbytes for slot in slots), abs=1024)
    pieces = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in model.parameters()}
    by_piece = {}
    for weight in model.parameters():
        by_piece.setdefault(weight.untyped_storage().data_ptr(), []).append(weight)
    shared = sum(pieces[address] for address, weights in by_piece.items() if len(weights) > 1)
    alone = sum(weights[0].nbytes for weights in by_piece.values() if len(weights) == 1)
    assert predicted.resident == pytest.approx(alone, abs=0)
    assert predicted.host == pytest.approx(shared, rel=0.02)


def test_the_published_model_has_its_known_sizes() -> None:
    assert weight_bytes(FULL, BF16, RuntimeSettings()).resident == 2 * 12_821_012_544
    quantized = weight_bytes(FULL, BF16, RuntimeSettings(WeightFormat.FP8))
    assert quantized.resident == 2 * 12_821_012_544 - 9_059_696_640
    assert quantized.dequantized == 2 * 3072 * 21504
    swapped = weight_bytes(FULL, BF16, RuntimeSettings(WeightFormat.FP8, blocks_to_swap=58))
    assert 1.5e9 < swapped.resident + swapped.slots < 1.7e9 and 15.8e9 < swapped.host < 16e9


def test_sizes_of_a_batch() -> None:
    picture, clip = BatchSize(2, (1, 68, 120), 100), BatchSize(1, (9, 68, 120), 100)
    assert (picture.image_tokens(FULL), picture.tokens(FULL)) == (2040, 2 * 2140)
    assert clip.image_tokens(FULL) == 9 * 2040
    assert BatchSize(1, (1, 4, 4), 0).tokens(FULL) == 4 + 1  # a caption keeps one row
    assert table_bytes(FULL, picture) == (2040 + 100) * 64 * 2 * 4
    assert loss_bytes(FULL, picture) == 8 * 4 * 2 * 16 * 68 * 120


@pytest.mark.parametrize("keeps", [False, True])
def test_what_is_offloaded_leaves_the_device(keeps: bool) -> None:
    runtime = replace(CHECKPOINTING, keep_attention=keeps)
    clip = BatchSize(1, (9, 68, 120), 256)
    on_device = training_activations(FULL, clip, BF16, runtime)
    on_host = training_activations(FULL, clip, BF16, replace(runtime, gradient_checkpointing_cpu_offload=True))
    inputs, log_sum_exps = 60 * 2 * 3072 * clip.tokens(FULL), 60 * 4 * 24 * clip.tokens(FULL)
    assert on_host.host_inputs == inputs + (inputs + log_sum_exps if keeps else 0)
    assert on_device.host_inputs == 0
    assert on_device.attention == pytest.approx(6.9e9 if keeps else 0, rel=0.02)
    assert on_host.attention < 0.03 * inputs
    assert on_host.inputs < 0.1 * on_device.inputs
    assert (on_host.kept, on_host.working) == (on_device.kept, on_device.working)


def test_a_dequantized_weight_counts_where_it_is_larger_than_temporary_activations() -> None:
    tiny = BatchSize(1, (1, 4, 4), 8)
    dequantized = weight_bytes(FULL, BF16, RuntimeSettings(WeightFormat.FP8)).dequantized
    with_copy, without = (training_activations(FULL, tiny, BF16, CHECKPOINTING, 0, copy) for copy in (dequantized, 0))
    assert with_copy.working > dequantized > without.working
