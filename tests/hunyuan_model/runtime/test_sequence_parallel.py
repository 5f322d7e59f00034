"""Several processes compute a video together as one does alone: the same numbers, few bytes, and a refusal where they cannot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from allocations import peak_bytes
from safetensors.torch import save_file
from small_transformer import CONFIG, CPU, add_lora, make_inputs, make_transformer
from torch import distributed, nn

from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime.compilation import CompileSettings
from hunyuan_model.runtime.loading import load_transformer
from hunyuan_model.runtime.memory import BatchSize, sampling_activations
from hunyuan_model.runtime.sequence_parallel import agreed, check_sequence_parallel, enable_sequence_parallel, part_sizes
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.sampling.generation import SamplingSettings, generate_latents
from hunyuan_model.transformer.config import TransformerConfig, rope_dims_for
from utils.errors import UserError

SIX_HEADS = replace(CONFIG, hidden_size=96, heads=6, head_dim=16, rope_dims=rope_dims_for(16), double_depth=2, single_depth=2)
TOLERANCE = 1e-5


def test_parts_are_of_about_the_same_size() -> None:
    assert part_sizes(118800, 8) == [14850] * 8
    assert part_sizes(11, 4) == [3, 3, 3, 2]
    with pytest.raises(UserError, match="3 tokens is too small for 4 processes"):
        part_sizes(3, 4)


def test_heads_are_split_evenly_or_the_run_is_refused() -> None:
    published = TransformerConfig()
    for processes in (1, 2, 3, 4, 6, 8, 12, 24):
        check_sequence_parallel(processes, published)
    with pytest.raises(UserError, match=r"5 processes .* 24 attention heads.* one process, 2, 3, 4, 6, 8, 12, 24, or as many"):
        RuntimeSettings(sequence_parallel=5).check(CPU, config=published)


def test_training_is_refused() -> None:
    with pytest.raises(UserError, match="only where nothing is trained"):
        RuntimeSettings(sequence_parallel=2, gradient_checkpointing=True)


@pytest.mark.parametrize("processes", [2, 8])
def test_memory_is_what_is_predicted(processes: int, monkeypatch) -> None:
    """With as many tokens as make everything else small, and without the other processes."""
    monkeypatch.setattr(distributed, "get_world_size", lambda: processes)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "all_to_all_single", lambda output, *_: output.zero_())
    monkeypatch.setattr("hunyuan_model.transformer.cpu_kernels.SLICE_VALUES", 2**12)
    config = replace(SIX_HEADS, hidden_size=256, heads=8, head_dim=32, mlp_size=1024, rope_dims=rope_dims_for(32))
    inputs = make_inputs(lengths=(5,), size=(4, 48, 48), config=config)
    transformer = enable_for(make_transformer(config=config), processes)
    with torch.no_grad():
        counted = peak_bytes(lambda: transformer(*inputs))
    predicted = sampling_activations(config, BatchSize(1, (4, 48, 48), 5), torch.float32, processes=processes)
    assert 0.85 < predicted / counted < 1.15


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_compute_what_one_computes(processes: int, tmp_path: Path) -> None:
    save_file(make_transformer(config=SIX_HEADS).state_dict(), tmp_path / "model.safetensors")
    torch.multiprocessing.spawn(compare, (processes, tmp_path), nprocs=processes)


def compare(index: int, processes: int, folder: Path) -> None:
    """In each process, with the others and without them."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=index, world_size=processes)
    together = enable_for(make_transformer(config=SIX_HEADS), processes)
    uneven = {"size": (3, 2, 10)}, {"lengths": (5, 2, 0), "size": (1, 4, 14)}, {"lengths": (4, 4)}
    outputs_are_the_same(make_transformer(config=SIX_HEADS), together, "plain", *uneven)
    with pytest.raises(RuntimeError, match="no backward pass"):
        add_lora(together)
        together(*make_inputs(config=SIX_HEADS))
    if processes == 2:
        everything = RuntimeSettings(WeightFormat.INT8, blocks_to_swap=2, img_in_txt_in_offloading=True, split_attn=True)
        for runtime in (everything, RuntimeSettings(compile=CompileSettings(backend="eager"))):
            load = partial(load_transformer, folder / "model.safetensors", device=CPU, dtype=torch.float32)
            alone, together = load(runtime=runtime), load(runtime=replace(runtime, sequence_parallel=processes))
            networks = add_lora(alone), add_lora(together)  # which hold what they hook in
            outputs_are_the_same(alone, together, f"{runtime.weights}, compiled: {bool(runtime.compile)}", *uneven[:2])
            del networks
        sampled_videos_are_the_same(processes)
    distributed.destroy_process_group()


def enable_for(transformer: nn.Module, processes: int) -> nn.Module:
    enable_sequence_parallel(transformer, processes)
    return transformer


def outputs_are_the_same(alone: nn.Module, together: nn.Module, name: str, *sizes: dict) -> None:
    """For inputs of these sizes; and the bytes that are sent are those of the formula."""
    index, processes = distributed.get_rank(), distributed.get_world_size()
    for size in sizes:
        inputs = make_inputs(config=SIX_HEADS, **size)
        with torch.no_grad(), counted_bytes() as sent:
            expected, found = alone(*inputs), together(*inputs)
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        assert error <= TOLERANCE, f"{name}, {size}: {error}"
        same_everywhere(found)
        batch, tokens, text = len(found), found[0, 0].numel() // 4, max(size.get("lengths", (5, 2)))
        others, own = processes - 1, part_sizes(tokens, processes)[index]
        # q, k and v of its own image tokens go to the others, and what it attended of theirs and of the text.
        values = (3 * others * own + tokens - own + others * text) * SIX_HEADS.hidden_size // processes
        values *= SIX_HEADS.double_depth + SIX_HEADS.single_depth
        values += others * own * 64  # of the velocity
        assert sum(sent) == batch * values * torch.float32.itemsize
        if index == 0:
            print(f"{processes} processes, {name}, {tokens} tokens: off by {error:.1e}, {sum(sent)} bytes sent")


def sampled_videos_are_the_same(processes: int) -> None:
    """Guided in one batch and in two passes, from a start, and with a step cache about which the processes do not agree."""
    alone = make_transformer(config=SIX_HEADS)
    together = enable_for(make_transformer(config=SIX_HEADS), processes)
    _, _, states, mask, pooled, _ = make_inputs(config=SIX_HEADS)
    text, negative = ([part[one : one + 1] for part in (states, mask, pooled)] for one in (0, 1))
    base = SamplingSettings(seed=1, video_size=(32, 48), video_length=5, infer_steps=5, guidance_scale=4.0)
    start = torch.randn(1, 16, *base.latent_size, generator=torch.Generator().manual_seed(0))
    for more in ({}, {"split_uncond": True}, {"step_cache": 0.5}):
        given = {"device": CPU, "dtype": torch.float32, "negative": negative, "start": start if "split_uncond" in more else None}
        expected, found = (generate_latents(one, text, replace(base, **more), **given) for one in (alone, together))
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max(), more
        same_everywhere(found)

    def decide(_: bool) -> bool:
        return agreed(distributed.get_rank() == 0, CPU)

    with counted_bytes() as sent:
        generate_latents(
            together, text, replace(base, step_cache=0.5, guidance_scale=1.0), device=CPU, dtype=torch.float32, agree=decide
        )
    blocks = SIX_HEADS.double_depth + SIX_HEADS.single_depth
    assert len(sent) == 3 * (4 * blocks + 1), "the first two steps and the last: the main process skips all it may"


def same_everywhere(found: torch.Tensor) -> None:
    """To the bit, or noise and guidance would lead processes different ways."""
    first = found.clone()
    distributed.broadcast(first, 0)
    assert torch.equal(first, found)


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """The bytes that this process sends to others in each all-to-all."""
    plain, counts = distributed.all_to_all_single, []

    def count(output: torch.Tensor, rows: torch.Tensor, received: list[int], sent: list[int]) -> None:
        counts.append(rows.nbytes // len(rows) * (sum(sent) - sent[distributed.get_rank()]))
        plain(output, rows, received, sent)

    distributed.all_to_all_single = count
    try:
        yield counts
    finally:
        distributed.all_to_all_single = plain
