"""Block swap: the same numbers to the bit, weights that are copied in time and stay while they are read, and what is refused."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable

import pytest
import torch
from small_transformer import (
    CONFIG,
    CPU,
    DEPTH,
    GOLDENS,
    MOST,
    add_lora,
    blocks_of,
    make_inputs,
    make_transformer,
    move_around_blocks,
    same,
    train_and_sample,
)
from torch import nn

from hunyuan_model.checkpoints.loading import load_weights
from hunyuan_model.checkpoints.reading import open_checkpoint
from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime.gradient_checkpointing import enable_gradient_checkpointing
from hunyuan_model.runtime.loading import load_transformer
from hunyuan_model.runtime.offload.block_swap import (
    SLOTS,
    SwappedParts,
    SwapSettings,
    block_sizes,
    check_blocks_to_swap,
    enable_block_swap,
    max_blocks_to_swap,
    streamed_blocks,
)
from hunyuan_model.runtime.offload.transfers import DirectTransfers
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from networks.lora import LoRAModule
from networks.merging import merge_patch, read_lora_files
from utils.errors import UserError


class PoisoningTransfers(DirectTransfers):
    """The worst that a copy may do: overwrite its target with NaN at once, and be done only when it is waited for."""

    def __init__(self, device: torch.device = CPU) -> None:
        super().__init__(device)
        self.copies: list[torch.Tensor] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: None) -> Callable[[], object]:
        target.fill_(255)  # NaN in every dtype
        self.copies.append(source)
        return lambda: target.copy_(source)

    def wait(self, arrival: Callable[[], object]) -> None:
        arrival()


def swapped_run(monkeypatch: pytest.MonkeyPatch, settings: SwapSettings, fp8: bool = False, **network_args: str):
    """``train_and_sample`` under the worst transfers, and these."""
    transfers = PoisoningTransfers()
    monkeypatch.setattr("hunyuan_model.runtime.offload.block_swap.make_transfers", lambda *_: transfers)
    transformer = make_transformer(fp8)
    enable_block_swap(transformer, settings, CPU)
    if settings.recomputed:
        enable_gradient_checkpointing(transformer)
    return train_and_sample(transformer, add_lora(transformer, **network_args)), transfers


@pytest.fixture(scope="module")
def plain_run():
    """``train_and_sample`` without swapping, by (float8, checkpointing)."""
    runs: dict[tuple[bool, bool], list[torch.Tensor]] = {}

    def run(fp8: bool, checkpointing: bool) -> list[torch.Tensor]:
        if (fp8, checkpointing) not in runs:
            transformer = make_transformer(fp8)
            if checkpointing:
                enable_gradient_checkpointing(transformer)
            runs[fp8, checkpointing] = train_and_sample(transformer, add_lora(transformer))
            assert all(tensor.isfinite().all() for tensor in runs[fp8, checkpointing])
        return runs[fp8, checkpointing]

    return run


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
@pytest.mark.parametrize(
    ("swapped", "fp8"),
    [pytest.param(1, False, marks=pytest.mark.slow), (3, False), pytest.param(MOST, False, marks=pytest.mark.slow), (MOST, True)],
    ids=lambda value: {True: "float8", False: "float32"}[value] if isinstance(value, bool) else None,
)
def test_outputs_and_gradients_are_the_same_to_the_bit(monkeypatch, plain_run, swapped, fp8, checkpointing):
    found, transfers = swapped_run(monkeypatch, SwapSettings(swapped, recomputed=checkpointing), fp8)
    assert same(found, plain_run(fp8, checkpointing))
    assert transfers.copies


def test_gradients_where_only_late_blocks_learn(monkeypatch):
    late = {"exclude_patterns": "['.*']", "include_patterns": "['single_blocks.2.linear1', 'single_blocks.3.*']"}
    transformer = make_transformer()
    enable_gradient_checkpointing(transformer)
    expected = train_and_sample(transformer, add_lora(transformer, **late))
    found, _ = swapped_run(monkeypatch, SwapSettings(MOST, recomputed=True), **late)
    assert same(found, expected)


def test_weights_that_were_overwritten_are_refused_by_autograd():
    transformer = make_transformer()
    enable_block_swap(transformer, SwapSettings(MOST, recomputed=True), CPU)  # but nothing computes the blocks again
    add_lora(transformer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        transformer(*make_inputs()).square().mean().backward()


def test_classes_names_and_parameters_stay():
    transformer = make_transformer()
    names, parameters = list(transformer.state_dict()), list(transformer.parameters())
    values = [parameter.clone() for parameter in parameters]
    enable_block_swap(transformer, SwapSettings(3, embedders=True), CPU)
    transformer(*make_inputs())
    assert list(transformer.state_dict()) == names
    assert [id(parameter) for parameter in transformer.parameters()] == [id(parameter) for parameter in parameters]
    assert {type(block).__name__ for block in blocks_of(transformer)} == {"MMDoubleStreamBlock", "MMSingleStreamBlock"}
    assert same([parameter.detach() for parameter in transformer.parameters()], values)


def test_what_can_be_trained_stays_on_the_device():
    def trained(swapped: int) -> list[torch.Tensor]:
        transformer = make_transformer()
        own = [
            block.get_parameter(name)
            for block in transformer.single_blocks
            for name in ("linear1.bias", "modulation.linear.weight")
        ]
        for parameter in own:
            parameter.requires_grad_(True)
        transformer.double_blocks[1].register_buffer("extra", torch.ones(1))
        where = [parameter.data_ptr() for parameter in own]
        enable_block_swap(transformer, SwapSettings(swapped, recomputed=True), CPU)
        enable_gradient_checkpointing(transformer)
        optimizer = torch.optim.SGD(own, lr=0.1)
        for seed in range(2):
            transformer(*make_inputs(seed)).square().mean().backward()
            optimizer.step()
        assert [parameter.data_ptr() for parameter in own] == where
        return [*(parameter.detach() for parameter in own), *(parameter.grad for parameter in own)]

    assert same(trained(0), trained(MOST))


def test_what_becomes_trainable_too_late_is_refused():
    transformer = make_transformer()
    enable_block_swap(transformer, SwapSettings(MOST), CPU)
    transformer.single_blocks[3].linear1.bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        transformer(*make_inputs())


# Which blocks, and how many


def test_streamed_blocks_are_spread_evenly():
    assert streamed_blocks([1] * 60, 0) == ()
    assert streamed_blocks([1] * 60, 1) == (9, 29, 49)
    assert streamed_blocks(block_sizes(TransformerConfig()), 58) == tuple(range(60))
    for depth in range(3, 31):
        for swapped in range(1, depth - SLOTS + 1):
            streamed = streamed_blocks([7] * depth, swapped)
            assert len(streamed) == swapped + SLOTS and set(streamed) <= set(range(depth))
            steps = {later - earlier for earlier, later in itertools.pairwise(streamed)}
            assert max(steps) - min(steps) <= 1


def test_of_large_blocks_fewer_come():
    sizes = block_sizes(TransformerConfig())
    assert sizes == [36 * 3072**2] * 20 + [15 * 3072**2] * 40
    for swapped in range(1, 59):
        streamed = streamed_blocks(sizes, swapped)
        assert len(streamed) == len(set(streamed)) == swapped + SLOTS
        double, single = (sum(sizes[block] for block in streamed if (block < 20) == first) for first in (True, False))
        saved = double + single - SLOTS * max(sizes[block] for block in streamed)
        assert saved >= swapped * sizes[-1]
        if 12 < swapped <= 46:  # as much to copy in the time of each block, until all of the small ones come
            assert abs(double / 20 - single / 40) <= sizes[0] / 20


def test_more_blocks_than_there_are_is_refused_with_the_maximum():
    full = TransformerConfig()
    assert max_blocks_to_swap(full) == 58
    check_blocks_to_swap(58, full)
    with pytest.raises(UserError, match=r"--blocks_to_swap 59 .* 20 double and 40 single .* Use at most 58\."):
        check_blocks_to_swap(59, full)
    with pytest.raises(UserError, match=rf"Use at most {MOST}\."):
        enable_block_swap(make_transformer(), SwapSettings(MOST + 1), CPU)
    small = TransformerConfig(double_depth=1, single_depth=1)
    with pytest.raises(UserError, match=r"Use at most 0\."):
        check_blocks_to_swap(1, small)


# The schedule: what is copied, when, and what may be overwritten


class Recorder(DirectTransfers):
    """Writes down what a device would do: ("copy", slot, block, after) and ("wait", block), between what blocks read."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.lines: list[tuple] = []
        self.blocks: dict[int, int] = {}  # by the address of their memory

    def mark(self) -> int:
        return len(self.lines)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: int) -> int:
        block = self.blocks[source.data_ptr()]
        self.lines.append(("copy", target.data_ptr(), block, after))
        target.copy_(source)
        return block

    def wait(self, arrival: int) -> None:
        self.lines.append(("wait", arrival))

    def copied(self, since: int = 0) -> list[int]:
        return [line[2] for line in self.lines[since:] if line[0] == "copy"]


def watched_transformer(monkeypatch: pytest.MonkeyPatch, settings: SwapSettings) -> tuple[nn.Module, Recorder]:
    """A transformer with a LoRA in every block whose every reading of its weights is written down."""
    recorder = Recorder()
    monkeypatch.setattr("hunyuan_model.runtime.offload.block_swap.make_transfers", lambda *_: recorder)
    transformer = make_transformer()

    class Read(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, block):
            ctx.save_for_backward(weight)
            ctx.block = block
            recorder.lines.append(("read", block))
            return nn.functional.linear(x, weight, bias)

        @staticmethod
        def backward(ctx, gradient):
            (weight,) = ctx.saved_tensors
            recorder.lines.append(("read", ctx.block))
            return gradient @ weight, None, None, None

    def reading(linear: nn.Linear, block: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: Read.apply(x, linear.weight, linear.bias, block)

    for index, block in enumerate(blocks_of(transformer)):
        for linear in block.modules():
            if isinstance(linear, nn.Linear):
                linear.forward = reading(linear, index)
    enable_block_swap(transformer, settings, CPU)
    if settings.blocks:
        for index, one in transformer.block_swap._weights.items():
            recorder.blocks[one.memory.data_ptr()] = index
    if settings.recomputed:
        enable_gradient_checkpointing(transformer)
    add_lora(transformer)
    return transformer, recorder


def require_right_order(recorder: Recorder, streamed: tuple[int, ...]) -> None:
    """Nothing is read before its copy was waited for; no copy may start before what it overwrites was read for the last time."""
    holds: dict[int, int] = {}  # slot -> block
    ready: set[int] = set()
    last_read: dict[int, int] = {}  # by slot
    for place, line in enumerate(recorder.lines):
        if line[0] == "copy":
            _, slot, block, after = line
            assert last_read.get(slot, -1) < after <= place
            ready.discard(holds.get(slot, -1))
            holds[slot] = block
        elif line[0] == "wait":
            assert line[1] in holds.values()
            ready.add(line[1])
        elif line[1] in streamed:
            assert line[1] in ready, f"block {line[1]} is read, but what is there is {holds}"
            last_read[next(slot for slot, block in holds.items() if block == line[1])] = place


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
@pytest.mark.parametrize("swapped", [1, 3, MOST])
def test_no_copy_overwrites_what_is_still_read(monkeypatch, swapped, checkpointing):
    transformer, recorder = watched_transformer(monkeypatch, SwapSettings(swapped, recomputed=checkpointing))
    for seed in range(2):
        transformer(*make_inputs(seed)).square().mean().backward()
    with torch.no_grad():
        transformer(*make_inputs(2))
    (transformer(*make_inputs(3)) + transformer(*make_inputs(4))).square().mean().backward()
    streamed = streamed_blocks(block_sizes(CONFIG), swapped)
    assert len([line for line in recorder.lines if line[0] == "read"]) > 200
    require_right_order(recorder, streamed)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
def test_blocks_come_ahead_of_their_turn_and_the_last_ones_are_used_again(monkeypatch, checkpointing):
    transformer, recorder = watched_transformer(monkeypatch, SwapSettings(MOST, recomputed=checkpointing))
    copies, starts = [], []
    for seed in range(3):
        starts.append(len(recorder.lines))
        loss = transformer(*make_inputs(seed)).square().mean()
        starts.append(len(recorder.lines))
        loss.backward()
    ends = [*starts[1:], len(recorder.lines)]
    for start, end in zip(starts, ends, strict=True):
        copies.append([line[2] for line in recorder.lines[start:end] if line[0] == "copy"])
    upwards, downwards = list(range(DEPTH)), list(reversed(range(DEPTH)))
    assert copies[0] == upwards
    assert copies[1] == copies[3] == copies[5] == downwards[SLOTS:]
    assert copies[2] == copies[4] == upwards[SLOTS:]

    first_reads = [place for place, line in enumerate(recorder.lines) if line[0] == "wait"]  # the beginning of every turn
    turns = {place: recorder.lines[place][1] for place in first_reads}
    for (before, _), (place, block) in itertools.pairwise(turns.items()):
        copied = max(at for at, line in enumerate(recorder.lines[:place]) if line[0] == "copy" and line[2] == block)
        assert copied < before, f"block {block} was asked for when it was needed, not a block earlier"


def test_sampling_begins_anew_with_what_is_on_its_way(monkeypatch):
    transformer, recorder = watched_transformer(monkeypatch, SwapSettings(MOST))
    with torch.no_grad():
        transformer(*make_inputs())
        assert recorder.copied() == [*range(DEPTH), 0]
        start = len(recorder.lines)
        transformer(*make_inputs())
    assert recorder.copied(start) == [*range(1, DEPTH), 0]


# Embedders


@pytest.mark.parametrize("fp8", [False, True], ids=["float32", "float8"])
def test_embedders_are_on_the_device_only_while_they_compute(monkeypatch, plain_run, fp8):
    transformer = make_transformer(fp8)
    enable_block_swap(transformer, SwapSettings(embedders=True), CPU)
    embedders = [parameter for name in ("img_in", "txt_in") for parameter in getattr(transformer, name).parameters()]
    on_host = [parameter.data_ptr() for parameter in embedders]
    assert len({parameter.untyped_storage().data_ptr() for parameter in transformer.txt_in.parameters()}) == 1
    seen: list[int] = []
    transformer.txt_in.input_embedder.register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.data_ptr()))
    assert same(train_and_sample(transformer, add_lora(transformer)), plain_run(fp8, False))
    assert seen and not set(seen) & set(on_host)
    assert on_host == [parameter.data_ptr() for parameter in embedders]


def test_gradients_inside_an_embedder():
    def gradients(settings: SwapSettings) -> list[torch.Tensor]:
        transformer = make_transformer()
        enable_block_swap(transformer, settings, CPU)
        torch.manual_seed(2)
        lora = LoRAModule(CONFIG.text_dim, CONFIG.hidden_size, 2, 2.0)
        nn.init.normal_(lora.lora_up.weight)
        lora.attach(transformer.txt_in.input_embedder)
        transformer(*make_inputs()).square().mean().backward()
        return [parameter.grad for parameter in lora.parameters()]

    assert same(gradients(SwapSettings()), gradients(SwapSettings(MOST, embedders=True)))


# Loading


@pytest.mark.parametrize("weights", WeightFormat)
@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
def test_loading_into_host_memory(weights, merged):
    path = GOLDENS / "dit.safetensors"
    patch = merge_patch(read_lora_files([GOLDENS / "lora.safetensors"]), path) if merged else None
    options = {"device": "cpu", "dtype": torch.float32, "patch": patch}
    runtime = RuntimeSettings(weights, blocks_to_swap=3, img_in_txt_in_offloading=True)
    expected = load_transformer(path, **options, runtime=RuntimeSettings(weights))
    swapped = load_transformer(path, **options, runtime=runtime)
    assert same([*expected.state_dict().values()], [*swapped.state_dict().values()])
    assert [parameter.dtype for parameter in swapped.parameters()] == [parameter.dtype for parameter in expected.parameters()]
    assert not any(parameter.requires_grad for parameter in swapped.parameters()) and not swapped.training
    pieces = [{weight.untyped_storage().data_ptr() for weight in block.parameters()} for block in blocks_of(swapped)]
    inputs = make_inputs(config=swapped.config)
    with torch.no_grad():
        assert torch.equal(swapped(*inputs), expected(*inputs))
    assert [len(piece) for piece in pieces] == [1] * len(pieces)  # five blocks, of which three are swapped: all take turns
    assert all(address % mmap.PAGESIZE == 0 for piece in pieces for address in piece)


def test_what_is_kept_on_the_host_is_never_copied_to_the_device():
    path = GOLDENS / "dit.safetensors"
    whole = load_transformer(path, device="cpu", dtype=torch.float32)
    with torch.device("meta"):
        transformer = HYVideoDiffusionTransformer(whole.config)
    host = SwappedParts(transformer, SwapSettings(1, embedders=True), torch.device("meta"))
    load_weights(transformer, open_checkpoint(path, "--dit"), device="meta", dtype_of=lambda _: torch.float32, host=host)
    for name, parameter in transformer.named_parameters():
        streamed = name.startswith(("single_blocks.", "img_in.", "txt_in."))
        assert parameter.device.type == ("cpu" if streamed else "meta"), name
        assert not streamed or torch.equal(parameter, whole.get_parameter(name))


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
def test_on_a_gpu(pinned, checkpointing):
    device = torch.device("cuda")

    def run(settings: SwapSettings) -> list[torch.Tensor]:
        transformer = make_transformer()
        move_around_blocks(transformer, device, but=streamed_blocks(block_sizes(CONFIG), settings.blocks))
        enable_block_swap(transformer, settings, device)
        if checkpointing:
            enable_gradient_checkpointing(transformer)
        network = add_lora(transformer).to(device)
        found = []
        for seed in range(3):
            inputs = make_inputs(seed, size=(4, 16, 16), device=device)
            found.append(transformer(*inputs))
            found[-1].square().mean().backward()
            with torch.no_grad():
                found.append(transformer(*inputs))
        return [*found, *(parameter.grad for parameter in network.parameters())]

    settings = SwapSettings(MOST, embedders=True, pinned=pinned, recomputed=checkpointing)
    assert same(run(SwapSettings()), run(settings))
