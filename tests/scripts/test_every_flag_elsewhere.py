"""Every flag of the other scripts does what it says: a row for each, with an effect that is measured."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_caches
from flag_effects import (
    as_plain,
    becomes,
    both,
    columns,
    computed_steps,
    computes_in,
    differs,
    dtypes,
    frame,
    frames_per_second,
    holds_prompt,
    keeps_float8,
    keeps_scales,
    latent,
    latents,
    logs,
    narrower,
    pooled,
    prints,
    refused,
    removes,
    seen,
    setting,
    shape,
    states,
    stays,
    swaps,
    warns_of_the_cpu,
    writes,
)
from flag_rows import Bench, Row, check_rows, rows_as_parameters, write_lora, write_other_models
from PIL import Image

CONSOLE = "--debug_mode console"
UNCAPTIONED = "--dataset_config {out}/uncaptioned.toml"

LATENTS = (
    Row("--config_file {data}/batch_size.toml", becomes(seen("encoded"), [1, 1])),
    Row("--dataset_config {out}/other.toml", writes("other/a_0288x0064_hv.safetensors")),
    Row("--batch_size 1", becomes(seen("encoded"), [1, 1])),
    Row("--num_workers 3", both(becomes(seen("threads"), [3, 3]), stays(latents))),
    Row("--skip_existing", becomes(seen("encoded"), [])),
    Row("--missing_caption empty", writes("cache/c_0288x0064_hv.safetensors"), beside=UNCAPTIONED),
    Row("--remove_orphans", removes("cache/gone_0032x0032_hv.safetensors")),
    Row("--vae {data}/other_vae", differs(latents)),
    Row("--vae_dtype bfloat16", becomes(dtypes(latents), {torch.bfloat16})),
    Row("--vae_tiling", differs(latents)),  # of 288 pixels, more than a tile has
    Row("--vae_chunk_size 8", both(stays(latents, within=1e-4), narrower)),
    Row("--vae_spatial_tile_sample_min_size 32", differs(latents)),
    Row("--device cpu", becomes(warns_of_the_cpu, False)),
    Row("--device cuda", refused("torch finds no CUDA device")),
    Row("--debug_mode image", both(writes("cache/debug/a_0288x0064_hv.png"), becomes(seen("encoded"), []))),
    Row("--console_width 40", becomes(columns, {40}), beside=CONSOLE),
    Row("--console_back RED", prints("\x1b[48;2;205;0;0m"), beside=CONSOLE),
    Row("--console_num_images 1", becomes(lambda run: run.done.output.count("-> 288x64"), 1), beside=CONSOLE),
)

TEXTS = (
    Row("--config_file {data}/batch_size.toml", becomes(seen("captions"), [1, 1])),
    Row("--dataset_config {out}/other.toml", writes("other/a_hv_te.safetensors")),
    Row("--batch_size 1", becomes(seen("captions"), [1, 1])),
    Row("--num_workers 3", both(becomes(seen("threads"), [3, 3]), stays(states), stays(pooled))),
    Row("--skip_existing", becomes(seen("captions"), [])),
    Row("--missing_caption empty", writes("cache/c_hv_te.safetensors"), beside=UNCAPTIONED),
    Row("--remove_orphans", removes("cache/gone_hv_te.safetensors")),
    Row("--text_encoder1 {data}/other_text_encoder", both(differs(states), stays(pooled))),
    Row("--text_encoder2 {data}/other_text_encoder_2", both(stays(states), differs(pooled))),
    Row("--tokenizer1 {data}/tokenizer1", both(differs(states), stays(pooled))),
    Row("--tokenizer2 {data}/tokenizer2", both(stays(states), differs(pooled))),
    Row(
        "--text_encoder_dtype bfloat16", both(becomes(dtypes(states), {torch.bfloat16}), becomes(dtypes(pooled), {torch.bfloat16}))
    ),
    Row("--fp8_llm", both(keeps_float8("text encoder 1"), differs(states, by_at_most=0.2), stays(pooled))),
    Row("--device cpu", becomes(warns_of_the_cpu, False)),
    Row("--device cuda", refused("torch finds no CUDA device")),
)

other_latent, other_frame = differs(latent), differs(frame)
LORA = "--lora_weight {data}/rank3.safetensors"
IMAGES = "--output_type images"

GENERATION = (
    # Models
    Row("--config_file {data}/flow_shift.toml", becomes(setting("flow_shift"), "1")),
    Row("--dit {data}/other.safetensors", other_latent),
    Row("--dit_dtype bfloat16", both(computes_in(torch.bfloat16, "transformer"), differs(latent, by_at_most=0.2))),
    Row("--fp8", both(keeps_float8("transformer"), differs(latent, by_at_most=0.2))),
    Row("--fp8_scaled", both(keeps_scales("transformer"), differs(latent, by_at_most=0.2)), beside="--fp8"),
    Row("--fp8_fast", refused("--fp8_fast multiplies in float8"), beside="--fp8"),
    Row("--blocks_to_swap 1", both(stays(latent), swaps("single_blocks.0", "single_blocks.1", "single_blocks.3"))),  # 1 + two slots
    Row("--img_in_txt_in_offloading", both(stays(latent), swaps("img_in", "txt_in"))),
    Row("--no_pinned_swap_memory", both(stays(latent), becomes(seen("pinned"), {False})), beside="--blocks_to_swap 1"),
    Row("--vae {data}/other_vae", other_frame, beside=IMAGES),
    Row("--vae_dtype bfloat16", both(computes_in(torch.bfloat16, "vae"), other_frame), beside=IMAGES),
    Row("--vae_chunk_size 8", both(stays(frame, within=1), narrower), beside=IMAGES),
    Row("--vae_spatial_tile_sample_min_size 32", other_frame, beside=IMAGES),
    Row("--text_encoder1 {data}/other_text_encoder", other_latent),
    Row("--text_encoder2 {data}/other_text_encoder_2", other_latent),
    Row("--tokenizer1 {data}/tokenizer1", other_latent),
    Row("--tokenizer2 {data}/tokenizer2", other_latent),
    Row("--text_encoder_dtype bfloat16", both(computes_in(torch.bfloat16, "text encoder 1", "text encoder 2"), other_latent)),
    Row("--fp8_llm", both(keeps_float8("text encoder 1"), differs(latent, by_at_most=0.2))),
    Row("--device cpu", both(becomes(warns_of_the_cpu, False), stays(latent))),
    Row("--device cuda", refused("torch finds no CUDA device")),
    Row("--attn_mode sdpa", stays(latent)),  # another name of the default
    Row("--attn_mode flash", refused("attention mode flash needs a CUDA device")),
    Row("--attn_mode xformers", refused("attention mode xformers needs a CUDA device")),
    Row("--attn_mode sageattn", refused("attention mode sageattn needs a CUDA device")),
    Row("--split_attn", stays(latent)),  # of one sample there is nothing to split
    # Speed
    Row("--compile", both(becomes(seen("compiled"), {"default"}), stays(latent, within=1e-4))),
    Row(
        "--compile_mode max-autotune-no-cudagraphs",
        becomes(seen("compiled"), {"max-autotune-no-cudagraphs"}),
        beside="--compile",
    ),
    Row("--tf32", both(logs("--tf32: no effect on cpu"), stays(latent))),
    Row("--cudnn_benchmark", both(logs("--cudnn_benchmark: no effect on cpu"), stays(latent))),
    # LoRA
    Row(LORA, both(becomes(setting("lora"), "rank3.safetensors"), other_latent)),
    Row("--lora_multiplier 0", both(other_latent, as_plain), beside=LORA),
    Row("--save_merged_model {out}/merged.safetensors", both(writes("merged.safetensors"), removes("*_latent.*")), beside=LORA),
    # What to draw
    Row("--prompt another", both(becomes(setting("prompt"), "another"), other_latent)),
    Row("--video_size 48 32", becomes(shape, (16, 1, 6, 4))),
    Row("--video_length 5", becomes(shape, (16, 2, 4, 8))),
    Row("--fps 12", becomes(frames_per_second, 12), beside="--output_type video"),
    Row("--infer_steps 3", both(becomes(computed_steps, 3), other_latent)),
    Row("--seed 6", both(becomes(setting("seed"), "6"), other_latent)),
    Row("--embedded_cfg_scale 1", both(becomes(seen("guidance"), {1000.0}), other_latent)),
    Row("--flow_shift 1", both(becomes(seen("timesteps"), [1000.0, 500.0]), other_latent)),
    Row("--step_cache 1000", both(becomes(computed_steps, 3), other_latent), beside="--infer_steps 5"),
    Row("--step_cache_check", both(becomes(computed_steps, 3 + 5), stays(latent)), beside="--infer_steps 5 --step_cache 1000"),
    # Output
    Row("--save_path {out}/elsewhere", writes("elsewhere/*_latent.safetensors")),
    Row("--output_type images", both(writes("*/00000.png"), removes("*_latent.safetensors"))),
    Row("--latent_path {data}/x_latent.safetensors", both(becomes(seen("timesteps"), []), writes("x/00000.png")), beside=IMAGES),
    Row("--no_metadata", becomes(holds_prompt, False), beside=IMAGES),
)

CONVERSION = (
    Row("--input {data}/one_module.safetensors", becomes(lambda run: len(run.tensors("converted.safetensors")), 2)),
    Row("--output {out}/other.safetensors", both(writes("other.safetensors"), removes("converted.safetensors"))),
    Row(
        "--target default",  # refused without it: the file has the other layout already
        becomes(lambda run: {name[:10] for name in run.tensors("converted.safetensors")}, {"lora_unet_"}),
        beside="--input {data}/converted.safetensors",
    ),
)


@dataclass(frozen=True)
class Table:
    """The rows of a script, and the flags of all its runs."""

    base: str
    rows: tuple[Row, ...]


ENCODERS = "--text_encoder1 {model}/text_encoder --text_encoder2 {model}/text_encoder_2"
TABLES = {
    "cache_latents": Table("--dataset_config {out}/dataset.toml --num_workers 2 --vae {model}/vae", LATENTS),
    "cache_text_encoder_outputs": Table("--dataset_config {out}/dataset.toml --num_workers 2 " + ENCODERS, TEXTS),
    "hv_generate_video": Table(
        "--dit {model}/dit.safetensors --vae {model}/vae --save_path {out} --output_type latent "
        "--prompt ball --seed 5 --video_size 32 64 --video_length 1 --infer_steps 2 " + ENCODERS,
        GENERATION,
    ),
    "convert_lora": Table("--input {data}/rank3.safetensors --output {out}/converted.safetensors --target other", CONVERSION),
}


@pytest.fixture(scope="module")
def bench(tiny_model, tmp_path_factory) -> Callable[[str], Bench]:
    """``bench("cache_latents")`` runs that script; what the rows need is there."""
    data = tmp_path_factory.mktemp("data")
    write_data(data, tiny_model)
    benches: dict[str, Bench] = {}

    def find(script: str) -> Bench:
        if script not in benches:
            made = tmp_path_factory.mktemp(script)
            options: dict[str, Any] = {"data": data, "model": tiny_model.dit.parent}
            if script.startswith("cache_"):
                first = Bench(script, TABLES[script].base, made / "first", lambda out: write_datasets(data, out), **options).run("")
                assert first.done
                options["prepare"] = lambda out: write_datasets(data, out, first.out / "cache")
            benches[script] = Bench(script, TABLES[script].base, made / "runs", **options)
        return benches[script]

    shutil.copy(find("hv_generate_video").run("").file("*_latent.safetensors"), data / "x_latent.safetensors")
    shutil.copy(find("convert_lora").run("").file("converted.safetensors"), data)
    return find


def write_data(data: Path, model) -> None:
    """Two pictures with captions, one without, and every file that a row names."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 288, 3), np.uint8)
    for stem, folder, noise in zip("abc", ("media", "media", "uncaptioned"), pixels):
        (data / folder).mkdir(exist_ok=True)
        Image.fromarray(noise).save(data / folder / f"{stem}.png")
    (data / "media" / "a.txt").write_text("a red ball", encoding="utf-8")
    (data / "media" / "b.txt").write_text("two blue cubes on the grass", encoding="utf-8")
    (data / "batch_size.toml").write_text("batch_size = 1\n", encoding="utf-8")
    (data / "flow_shift.toml").write_text("flow_shift = 1.0\n", encoding="utf-8")
    write_other_models(model, data)
    write_lora(model.dit, data / "rank3.safetensors")
    one_module = {"include_patterns": "['double_blocks.0.img_attn_qkv']", "exclude_patterns": "['.*']"}
    write_lora(model.dit, data / "one_module.safetensors", **one_module)


def write_datasets(data: Path, out: Path, caches: Path | None = None) -> None:
    """Dataset TOMLs over the pictures, and ``caches`` in the cache directory beside one that belongs to nothing."""
    for name, media, cache in (("dataset", "media", "cache"), ("other", "media", "other"), ("uncaptioned", "uncaptioned", "cache")):
        (out / f"{name}.toml").write_text(
            f"[[datasets]]\nresolution = [288, 64]\nbatch_size = 2\nimage_directory = '{data / media}'\n"
            f"caption_extension = '.txt'\ncache_directory = '{out / cache}'\n",
            encoding="utf-8",
        )
    if caches is not None:
        shutil.copytree(caches, out / "cache")
        write_caches(out / "cache", {"gone": (1, 4, 4)})


@pytest.mark.parametrize("script", TABLES)
def test_every_flag_has_a_row_and_every_row_a_flag(script: str) -> None:
    check_rows(script, TABLES[script].rows)


@pytest.mark.parametrize("row", rows_as_parameters(LATENTS))
def test_cache_latents(bench: Callable[[str], Bench], row: Row) -> None:
    bench("cache_latents").check(row)


@pytest.mark.parametrize("row", rows_as_parameters(TEXTS))
def test_cache_text_encoder_outputs(bench: Callable[[str], Bench], row: Row) -> None:
    bench("cache_text_encoder_outputs").check(row)


@pytest.mark.parametrize("row", rows_as_parameters(GENERATION))
def test_hv_generate_video(bench: Callable[[str], Bench], row: Row) -> None:
    bench("hv_generate_video").check(row)


@pytest.mark.parametrize("row", rows_as_parameters(CONVERSION))
def test_convert_lora(bench: Callable[[str], Bench], row: Row) -> None:
    bench("convert_lora").check(row)
