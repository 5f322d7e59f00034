"""Sharded weights: several processes hold a part of each weight, and compute what one with all of them computes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_transformer import CPU, add_lora, make_inputs, make_transformer
from torch import Tensor, nn

from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.quantization.linear import dequantized_weight
from hunyuan_model.runtime.compilation import CompileSettings
from hunyuan_model.runtime.loading import load_transformer
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.runtime.sharding import ShardingSettings, whole_weights
from utils.errors import UserError

CHECKPOINTING = {"gradient_checkpointing": True}
CASES = {
    2: [
        RuntimeSettings(),
        RuntimeSettings(**CHECKPOINTING),
        RuntimeSettings(WeightFormat.INT8, **CHECKPOINTING, keep_attention=True),
        RuntimeSettings(WeightFormat.INT8, sharding=ShardingSettings(2, offload=True)),
        RuntimeSettings(WeightFormat.FP8),
        RuntimeSettings(WeightFormat.FP8_SCALED, **CHECKPOINTING, gradient_checkpointing_cpu_offload=True),
    ],
    3: [RuntimeSettings(WeightFormat.INT8, **CHECKPOINTING)],  # no size of the weights is divisible by three
}


def train_and_sample(transformer: nn.Module, network: nn.Module, seed: int) -> list[Tensor]:
    """Outputs and gradients of two passes that accumulate, with a sample before and after; in the end only a late block trains."""
    found = []

    def passed(*inputs: Tensor) -> Tensor:
        found.append(transformer(*inputs))
        return found[-1].square().mean()

    with torch.no_grad():
        passed(*make_inputs(7))
    for number in (seed, seed + 1):
        passed(*make_inputs(number)).backward()
    found += [parameter.grad for parameter in network.parameters()]
    network.zero_grad(set_to_none=True)
    with torch.no_grad():
        passed(*make_inputs(7))
    loras = list(network.loras())
    for lora in loras[: -2 if seed else len(loras)]:  # as dropout would do it: in one process all of them
        lora.multiplier = 0.0
    loss = passed(*make_inputs(seed))
    if loss.requires_grad:
        loss.backward()
    return found + [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def in_process(rank: int, count: int, folder: str) -> None:
    torch.set_num_threads(1)
    path = Path(folder) / "m.safetensors"
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    for runtime in CASES[count]:
        settings = replace(runtime, sharding=None), replace(runtime, sharding=runtime.sharding or ShardingSettings(count))
        one, own = (load_transformer(path, device=CPU, dtype=torch.float32, runtime=each) for each in settings)
        of_one, held = (sum(part(p).nbytes for p in model.parameters()) for model, part in ((one, Tensor.detach), (own, local)))
        assert held / of_one == pytest.approx(1 / count, rel=0.05), "each holds its part"
        for block, other in zip((*one.double_blocks, *one.single_blocks), (*own.double_blocks, *own.single_blocks)):
            assert type(block).__name__ == type(other).__name__, "by which network modules find blocks"
            with whole_weights(other):
                for layer, same in zip(block.modules(), other.modules()):
                    if isinstance(layer, nn.Linear):
                        assert torch.equal(dequantized_weight(layer), dequantized_weight(same))
        expected, found = (train_and_sample(model, add_lora(model), seed=10 * rank) for model in (one, own))
        assert len(expected) == len(found)
        for value, other in zip(expected, found):
            torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-7)
        of_blocks = [p for block in (*own.double_blocks, *own.single_blocks) for p in block.parameters()]
        assert all(hasattr(p, "to_local") for p in of_blocks), "no block is whole between the passes"
    torch.distributed.destroy_process_group()


def local(parameter: Tensor) -> Tensor:
    return parameter.detach().to_local()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo on Windows is tested by nobody here")
@pytest.mark.parametrize("count", list(CASES))
def test_processes_with_shards_compute_what_one_with_whole_weights_does(count: int, tmp_path: Path) -> None:
    save_file(make_transformer().state_dict(), tmp_path / "m.safetensors")
    torch.multiprocessing.spawn(in_process, (count, str(tmp_path)), nprocs=count)


def test_what_shards_exclude_is_refused_in_a_sentence() -> None:
    shared = ShardingSettings(2)
    for given in ({"blocks_to_swap": 1}, {"blocks_to_swap": "auto"}, {"img_in_txt_in_offloading": True}):
        with pytest.raises(UserError, match="fsdp_offload_params"):
            RuntimeSettings(sharding=shared, **given)
    for given in ({"compile": CompileSettings()}, {"split_blocks": (3, 4)}):
        with pytest.raises(UserError, match="does not go with weights that FSDP shares out"):
            RuntimeSettings(sharding=shared, **given)
    with pytest.raises(UserError, match="two processes or more"):
        ShardingSettings(1)
