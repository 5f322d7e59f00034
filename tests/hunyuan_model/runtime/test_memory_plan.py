"""What a run needs, what would make it fit, and how that is said."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu_table import gpu_table, training_plan
from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime.compilation import CompileSettings
from hunyuan_model.runtime.memory import BatchSize
from hunyuan_model.runtime.memory_plan import MemoryPlan
from hunyuan_model.runtime.memory_report import advice, explain_batch_out_of_memory, plan_table, verdict
from hunyuan_model.runtime.sharding import ShardingSettings
from hunyuan_model.transformer.config import TransformerConfig
from networks.training import preflight
from utils.devices import explain_out_of_memory
from utils.errors import UserError

GB = 10**9
PICTURE, CLIP = (544, 960, 1), (544, 960, 33)
PLENTY = 10**15


@pytest.fixture(scope="module")
def picture() -> MemoryPlan:
    """A LoRA of rank 32 for the published model on a GPU, one picture of 960x544 a batch, no flags."""
    return training_plan(PICTURE)


@pytest.fixture(scope="module")
def clip() -> MemoryPlan:
    return training_plan(CLIP)


def test_the_full_model_needs_what_is_known_of_it(picture: MemoryPlan, clip: MemoryPlan) -> None:
    need = picture.need()
    assert need.weights == 2 * 12_821_012_544
    assert picture.network_values == 117_964_800
    assert need.network == need.gradients == 4 * 117_964_800
    assert need.optimizer == 8 * 117_964_800
    assert need.on_host == 0
    # Pictures of 960x544 take 2040 tokens, clips of 33 frames nine times as many; the captions come on top.
    assert clip.need().activations / need.activations == pytest.approx((9 * 2040 + 256) / (2040 + 256), rel=0.02)


def test_quantized_weights_and_swapping_save_what_they_promise(picture: MemoryPlan) -> None:
    quantized = picture.changed(weights=WeightFormat.FP8)
    assert picture.need().on_device - quantized.need().on_device == pytest.approx(9_059_696_640, rel=0.03)
    swapped = quantized.with_blocks(40)
    assert swapped.need().host_weights == pytest.approx(9.1e9, rel=0.01)
    assert quantized.need().on_device - swapped.need().on_device == pytest.approx(8.2e9, rel=0.01)


def test_sharded_weights_are_counted_once_over_all_devices(picture: MemoryPlan) -> None:
    sharded = picture.changed(sharding=ShardingSettings(8))
    assert sharded.need().weights == pytest.approx(picture.need().weights / 8, rel=1e-6)
    double, single = 36 * 3072**2, 15 * 3072**2  # weights of the Linear layers, each two bytes
    rest = picture.need().weights - 2 * (20 * double + 40 * single)
    assert sharded.need().swap_slots == pytest.approx(2 * 3 * double + rest, rel=0.01)
    kept = picture.changed(sharding=ShardingSettings(8, offload=True)).need()
    assert kept.weights == 0 and kept.host_weights == sharded.need().weights
    flags, _ = sharded.until_it_fits(GB)
    assert "--int8_base" in flags and "fsdp_offload_params: true in the config of accelerate" in flags
    assert not any("swap" in flag or "offloading" in flag for flag in flags)


def test_a_lora_beside_the_weights_is_counted(picture: MemoryPlan) -> None:
    sampling = replace(picture, trains=False, network_values=None)
    merged, injected = sampling.need(), replace(sampling, injected_bytes=3 * GB).need()
    assert injected.network - merged.network == 3 * GB
    assert injected.on_device - merged.on_device >= 3 * GB  # and what it computes


@pytest.mark.parametrize("gigabytes", [8, 16, 24])
def test_auto_swaps_as_few_blocks_as_fit(picture: MemoryPlan, gigabytes: int) -> None:
    plan = picture.changed(gradient_checkpointing=True, weights=WeightFormat.INT8, blocks_to_swap="auto").resolved(gigabytes * GB)
    count = plan.runtime.blocks_to_swap
    assert plan.need().on_device <= gigabytes * GB
    assert count == 0 or plan.with_blocks(count - 1).need().on_device > gigabytes * GB


def test_attention_is_kept_where_memory_is_left(clip: MemoryPlan) -> None:
    plan = clip.changed(gradient_checkpointing=True, weights=WeightFormat.INT8, keep_attention="auto")

    def kept(plan: MemoryPlan, free: int | None, free_main: int | None = None) -> bool:
        return plan.resolved(free, free_main).runtime.keep_attention

    need = plan.changed(keep_attention=True).need()
    assert need.attention == need.on_device - plan.need().on_device - (need.kernels - plan.need().kernels)
    assert kept(plan, PLENTY) and kept(plan, need.on_device * 5 // 4)
    assert not kept(plan, need.on_device) and not kept(plan, None)
    offloaded = plan.changed(gradient_checkpointing_cpu_offload=True)
    assert kept(offloaded, PLENTY, PLENTY) and not kept(offloaded, PLENTY, 10 * GB) and not kept(offloaded, PLENTY)
    on_cpu = replace(offloaded, device=torch.device("cpu"))
    assert kept(on_cpu, PLENTY) and not kept(on_cpu, need.on_device)
    assert not kept(plan.changed(compile=CompileSettings()), PLENTY)
    assert not kept(plan.changed(gradient_checkpointing=False), PLENTY)
    # What swapping leaves: it takes what it needs first.
    assert not kept(plan.changed(blocks_to_swap="auto"), 16 * GB)
    assert advice(plan.resolved(PLENTY)).startswith("give --keep_attention off next, which saves about 7.")


@pytest.mark.parametrize(("device", "free", "count"), [("cuda", GB, 58), ("cuda", PLENTY, 0), ("cuda", None, 0), ("cpu", GB, 0)])
def test_auto_swaps_all_it_can_where_nothing_suffices_and_none_without_need(picture: MemoryPlan, device, free, count) -> None:
    assert replace(picture, device=torch.device(device)).blocks_that_fit(free) == count


def test_what_to_give_next_follows_from_what_is_given(picture: MemoryPlan, clip: MemoryPlan) -> None:
    plan, seen = picture, []
    while (remedy := plan.next_remedy()) is not None:
        text, better, saves = remedy
        assert saves == plan.need().on_device - better.need().on_device > 0
        plan = better
        seen.append(text)
    assert seen[:3] == ["--gradient_checkpointing", "--int8_base", "--blocks_to_swap 15"]
    assert "--blocks_to_swap 58" in seen and len(seen) == len(set(seen))
    assert advice(plan) == "use fewer frames or a smaller resolution: every flag that saves memory is in use"
    assert "give batch_size = 2 in the" in advice(replace(plan, batch=replace(plan.batch, samples=4)))
    # Of a clip the block inputs are large enough to come before the weights.
    long = clip.changed(gradient_checkpointing=True, weights=WeightFormat.FP8)
    assert advice(long).startswith("give --gradient_checkpointing_cpu_offload next, which saves about 6.")


@pytest.mark.parametrize("gigabytes", [6, 16, 40])
@pytest.mark.parametrize("size", [PICTURE, CLIP], ids=["picture", "clip"])
def test_what_is_named_makes_it_fit(picture, clip, size, gigabytes) -> None:
    flags, plan = (picture if size is PICTURE else clip).until_it_fits(gigabytes * GB)
    assert plan.need().on_device <= gigabytes * GB or plan.next_remedy() is None
    assert len({flag.split()[0] for flag in flags}) == len(flags), "a flag is named twice"


def test_the_table_has_parts_sum_and_verdict(picture: MemoryPlan) -> None:
    table = plan_table(picture, 24 * GB, 64 * GB)
    assert table.startswith("memory on cuda for the largest batch, 1 x 960x544 (2296 tokens):")
    assert "weights of the transformer" in table and "25.6 GB" in table
    assert " of 24.0 GB free" in table and "are missing: give --gradient_checkpointing" in table
    assert "It fits." in plan_table(picture, 200 * GB, None)
    assert "free" not in plan_table(picture, None, None)
    assert "without the trained network" in plan_table(replace(picture, network_values=None), 24 * GB, None)
    swapped = picture.with_blocks(58)
    assert "RAM holds 24.9 GB more." in plan_table(swapped, 200 * GB, 64 * GB)
    assert "but only 16.0 GB are free" in plan_table(swapped, 200 * GB, 16 * GB)
    assert verdict(picture, GB).endswith("and use fewer frames or a smaller resolution.")


def test_on_the_cpu_everything_is_in_main_memory(picture: MemoryPlan) -> None:
    plan = replace(picture, device=torch.device("cpu")).with_blocks(58)
    need, table = plan.need(), plan_table(plan, 32 * GB, 32 * GB)
    assert table.startswith("RAM for the largest batch") and need.kernels == 0
    assert f"{(need.on_device + need.on_host) / GB:.1f} GB of 32.0 GB free" in table
    assert f"{(need.on_device + need.on_host - 32 * GB) / GB:.1f} GB are missing" in table


def test_a_large_sample_counts_where_it_needs_more_than_a_step(picture: MemoryPlan) -> None:
    plan = picture.changed(gradient_checkpointing=True)
    small, large = BatchSize(1, (1, 32, 32), 256), BatchSize(1, (33, 90, 160), 256)
    assert replace(plan, sample=small).need() == plan.need()
    more = replace(plan, sample=large).need()
    assert more.sampling > GB and more.on_device > plan.need().on_device


def test_running_out_of_memory_names_the_batch_and_what_to_give(picture: MemoryPlan) -> None:
    def batch(samples: int, frames: int, *names: str) -> dict[str, object]:
        return {"latents": torch.zeros(samples, 16, frames, 4, 4), "text_states": torch.zeros(samples, 8, 3), "names": [*names]}

    with (
        pytest.raises(UserError) as caught,
        explain_batch_out_of_memory(picture, [batch(2, 1, "a", "b"), batch(1, 9, "c")], "training on"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert str(caught.value).startswith("out of memory while training on 1 x 32x32x33 (c); give --int8_base next")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=str,
)
def test_what_counts_as_out_of_memory(error: Exception) -> None:
    with pytest.raises(UserError, match="out of memory while testing; use less"), explain_out_of_memory("testing", "use less"):
        raise error


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="multiplied"), explain_out_of_memory("testing", "use less"):
        raise RuntimeError("shapes cannot be multiplied")


def test_of_a_gpu_is_said_what_is_free_and_what_was_used(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300_000_000, 24 * GB))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 22_500_000_000)
    with pytest.raises(UserError) as caught, explain_out_of_memory("testing", lambda: "use less", torch.device("cuda", 0)):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "(0.3 of 24.0 GB are free on the GPU, and this process used up to 22.5 GB); use less." in str(caught.value)


def test_training_swaps_what_auto_finds(train, monkeypatch, caplog) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(preflight, "free_device_memory", lambda device: 0)
    monkeypatch.setattr(MemoryPlan, "blocks_that_fit", lambda plan, free: 3 if free == [0] else 0)
    ended = train("--max_train_steps", 1, "--blocks_to_swap", "auto")
    assert ended.status == 0
    assert "--blocks_to_swap auto: 3" in caplog.text and "5 of 6 blocks" in caplog.text
    assert "for the largest batch, 2 x 32x32 (30 tokens):" in ended.stdout
    monkeypatch.undo()
    assert train("--max_train_steps", 1, "--blocks_to_swap", "auto").status == 0 and "--blocks_to_swap auto: 0" in caplog.text


def test_generation_takes_auto(call_script, tiny_model, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    flags = ("--dit", tiny_model.dit, "--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
    drawing = ("--prompt", "a", "--video_size", 32, 32, "--video_length", 1, "--infer_steps", 1, "--output_type", "latent")
    ended = call_script("hv_generate_video", *flags, *drawing, "--save_path", tmp_path, "--blocks_to_swap", "auto")
    assert ended.status == 0 and "--blocks_to_swap auto: 0" in caplog.text


def test_the_table_of_gpus_has_a_row_for_each(picture: MemoryPlan) -> None:
    small, middle, large = gpu_table(picture, (4, 24, 200)).splitlines()[2:]
    assert small.startswith("| 4 GB | too small") and "none needed" in large
    assert "`--gradient_checkpointing --int8_base" in middle


def test_a_config_without_single_blocks_has_a_plan() -> None:
    config = TransformerConfig(hidden_size=128, heads=1, double_depth=3, single_depth=0, mlp_size=512)
    plan = training_plan(PICTURE, rank=1)
    plan = replace(plan, config=config, network_values=None)
    assert plan.need().on_device > plan.changed(gradient_checkpointing=True).need().on_device


GPUS = tuple(torch.device("cuda", index) for index in range(3))


def split(plan: MemoryPlan, *counts: int | str) -> MemoryPlan:
    others = GPUS[1:] if counts == ("auto",) else GPUS[1 : len(counts)]
    return replace(plan.changed(split_blocks="auto" if counts == ("auto",) else counts), device=GPUS[0], others=others)


def test_the_parts_of_a_split_are_those_of_the_whole(clip: MemoryPlan) -> None:
    whole = clip.changed(gradient_checkpointing=True, keep_attention=False, weights=WeightFormat.INT8)
    for counts in ((20, 40), (35, 25), (1, 58, 1)):
        plan = split(whole, *counts)
        needs, one, together = plan.needs(), whole.need(), plan.need()
        assert together.weights == one.weights and plan.devices == GPUS[: len(counts)]
        assert together.network == pytest.approx(one.network, abs=8) and together.optimizer == pytest.approx(one.optimizer, abs=8)
        # Each device keeps the inputs of its blocks, and what one of them keeps for its backward pass.
        value = clip.batch.tokens(clip.config) * 2 * clip.config.hidden_size
        assert [round(need.block_inputs / value) for need in needs] == [count + 1 for count in counts]
        assert all(need.on_device < one.on_device for need in needs)
    _, singles = split(whole, 20, 40).needs()
    quantized, modulation = 3072 * (4 * 3072 + 2 * 12288), 3072 * 3 * 3072  # numbers of a single block
    assert singles.weights == pytest.approx(40 * (quantized * (1 + 2 / 64) + modulation * 2) + 38e6, rel=0.01)


def test_a_split_swaps_on_each_gpu(picture: MemoryPlan) -> None:
    plan = split(picture, 20, 40).with_blocks(28)
    first, last = plan.needs()
    assert first.host_weights > 0 and last.host_weights > 0 and first.swap_slots > last.swap_slots > 0
    unswapped = split(picture, 20, 40).need()
    saved = unswapped.on_device - plan.need().on_device
    assert saved == pytest.approx(plan.need().host_weights - first.swap_slots - last.swap_slots, rel=0.01)


@pytest.mark.parametrize("free", [(12, 12), (24, 24), (12, 24), (24, 8), (12, 12, 12), (None, None)], ids=str)
def test_auto_splits_so_that_the_tightest_gpu_has_most_room(clip: MemoryPlan, free) -> None:
    free = [there and there * GB for there in free]
    plan = split(clip.changed(gradient_checkpointing=True, weights=WeightFormat.INT8, keep_attention="auto"), "auto")
    plan = replace(plan, others=GPUS[1 : len(free)])
    counts = plan.resolved(free).runtime.split_blocks
    assert sum(counts) == 60 and len(counts) == len(free) and min(counts) >= 1
    best, known = split(plan.changed(keep_attention=False), *counts), [there or 0 for there in free]
    for first in range(1, 60) if len(free) == 2 else ():
        assert split(best, first, 60 - first).room(known) <= best.room(known)
    if len(free) == 3:
        assert (
            max(best.needs(), key=lambda need: need.on_device).on_device
            < split(best, counts[0], 60 - counts[0]).needs()[1].on_device
        )


def test_auto_splits_and_swaps_what_does_not_fit(clip: MemoryPlan) -> None:
    plan = clip.changed(gradient_checkpointing=True, blocks_to_swap="auto", split_blocks="auto")
    plan = replace(plan, device=GPUS[0], others=GPUS[1:2]).resolved([14 * GB, 14 * GB])
    count = plan.runtime.blocks_to_swap
    assert plan.room([14 * GB, 14 * GB]) >= 0 > plan.with_blocks(count - 1).room([14 * GB, 14 * GB])


def test_eight_gpus_are_split_in_a_moment(clip: MemoryPlan) -> None:
    started = time.monotonic()
    plan = replace(clip, device=GPUS[0], others=GPUS[1:2] * 7)
    assert sum(plan.changed(gradient_checkpointing=True).balanced_split([12 * GB] * 8)) == 60
    assert time.monotonic() - started < 20


def test_the_table_of_a_split_has_a_column_for_each_gpu(picture: MemoryPlan) -> None:
    plan = split(picture.changed(gradient_checkpointing=True, weights=WeightFormat.INT8), 20, 40)
    lines = plan_table(plan, [24 * GB, 12 * GB], 64 * GB).splitlines()
    assert lines[0].startswith("memory on cuda:0 and cuda:1 for the largest batch")
    assert lines[1].split() == ["cuda:0", "cuda:1"]
    assert next(line for line in lines if "weights of the transformer" in line).split()[-4:] == ["9.9", "GB", "7.0", "GB"]
    assert lines[-2].split() == ["free", "24.0", "GB", "12.0", "GB"] and lines[-1].strip() == "It fits."
    short = plan_table(plan, [24 * GB, 8 * GB], 64 * GB).splitlines()[-1]
    assert "are missing on cuda:1: give --blocks_to_swap" in short
    assert advice(plan).endswith("on each GPU") and advice(plan).startswith("give --blocks_to_swap 14 next")


def test_running_out_of_memory_reports_every_gpu_of_a_split(picture: MemoryPlan, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((device.index + 1) * GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 22_500_000_000)
    with pytest.raises(UserError) as caught, explain_batch_out_of_memory(split(picture, 20, 40), [], "training on"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "(1.0 of 24.0 GB are free on cuda:0, and this process used up to 22.5 GB; 2.0 of 24.0 GB are free on cuda:1" in str(
        caught.value
    )
