"""Loading transformers from files of other layouts: seconds and memory beside the official layout, as a Markdown table.

Writes the same sizes with random weights in the names of ComfyUI and of diffusers, as float8 with ComfyUI's scales, and as GGUF,
and loads each in a process of its own, the files being in memory already. Beside the seconds stands what they are of those of the
official file in bfloat16, or in float8 without scales. Needs the package gguf. Linux only, as it reads /proc.

    python benchmarks/loading_layouts.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.loading import GB, measure, print_row, stored_layout  # noqa: E402
from benchmarks.memory_watch import in_new_process  # noqa: E402
from hunyuan_model.checkpoints.layouts import COMFYUI, DIFFUSERS, NameLayout  # noqa: E402
from hunyuan_model.quantization.formats import FP8_DTYPE, is_quantized_name  # noqa: E402
from hunyuan_model.transformer.config import TransformerConfig  # noqa: E402
from utils.safetensors_io import save_tensor_stream  # noqa: E402

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]

# (file, kind of the blocks' weights) -> the file that it is compared with
ROWS = {
    ("official", "plain"): "official",
    ("ComfyUI", "plain"): "official",
    ("diffusers", "plain"): "official",
    ("diffusers", "fp8"): "official",
    ("GGUF Q8_0", "plain"): "official",
    ("GGUF Q8_0", "fp8"): "official",
    ("official float8", "plain"): "official float8",
    ("ComfyUI scaled float8", "plain"): "official float8",
    ("ComfyUI scaled float8", "fp8"): "official float8",
}


def random_like(pools: dict[torch.dtype, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Values of a pool that is as long as the largest tensor so far."""
    count = torch.Size(shape).numel()
    if dtype not in pools or len(pools[dtype]) < count:
        pools[dtype] = torch.empty(count).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).to(dtype)
    return pools[dtype][:count].view(shape)


def renamed(layout: Layout, names: NameLayout) -> Layout:
    """The tensors of a file with these names: the parts of a fused one have as many rows as it has inputs, but the last."""
    parts: Layout = {}
    for name, (dtype, shape) in layout.items():
        module, _, parameter = name.rpartition(".")
        theirs = names.modules(module)
        rows = [layout[f"{module}.weight"][1][1]] * (len(theirs) - 1) if len(theirs) > 1 else []
        for target, count in zip(theirs, [*rows, shape[0] - sum(rows)]):
            parts[f"{target}.{parameter}"] = (dtype, (count, *shape[1:]))
    return parts


def write_safetensors(path: Path, layout: Layout) -> None:
    pools: dict[torch.dtype, Tensor] = {}

    def tensor(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        return torch.tensor(1e-3) if name.endswith("scale_weight") else random_like(pools, dtype, shape)

    save_tensor_stream(path, layout, ((name, tensor(name, *stored)) for name, stored in layout.items()))


def with_scales(layout: Layout) -> Layout:
    """A file of ComfyUI with a scale for each float8 weight."""
    scales = {
        name.removesuffix("weight") + "scale_weight": (torch.float32, ())
        for name, stored in layout.items()
        if stored[0] == FP8_DTYPE
    }
    return renamed(layout, COMFYUI) | renamed_scales(scales) | {"scaled_fp8": (FP8_DTYPE, (2,))}


def renamed_scales(scales: Layout) -> Layout:
    return {f"{COMFYUI.modules(name.rpartition('.')[0])[0]}.scale_weight": stored for name, stored in scales.items()}


def write_gguf(path: Path, layout: Layout) -> None:
    """Linear weights of the blocks as Q8_0, everything else as float32."""
    pools: dict[torch.dtype, Tensor] = {}
    most = max(torch.Size(shape).numel() for name, (_, shape) in layout.items() if is_quantized_name(name))
    blocks = gguf.quants.quantize(
        np.random.default_rng(0).normal(0, 0.02, (1, 1 << 20)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0
    )
    pool = np.resize(blocks.reshape(-1), most // 32 * 34)
    writer = gguf.GGUFWriter(path, "hyvid")
    for name, (_, shape) in layout.items():
        if is_quantized_name(name):
            rows, inputs = shape
            codes = pool[: rows * inputs // 32 * 34].reshape(rows, -1)
            writer.add_tensor(name, codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, random_like(pools, torch.float32, shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_file(path: Path, config: TransformerConfig, file: str) -> None:
    layout = stored_layout(config, "float8" if "float8" in file else "bfloat16")
    if file.startswith("GGUF"):
        write_gguf(path, layout)
    elif file == "ComfyUI scaled float8":
        write_safetensors(path, with_scales(layout))
    else:
        names = {"ComfyUI": COMFYUI, "diffusers": DIFFUSERS}.get(file)
        write_safetensors(path, layout if names is None else renamed(layout, names))


def layouts_table(args: argparse.Namespace, config: TransformerConfig, folder: Path) -> None:
    """A row for each file and kind: medians of seconds, and of their ratios to the file that each is compared with."""
    print_row("file", "blocks stored as", "final weights GB", "beyond final GB", "seconds", "of the official's")
    print_row(*["---"] * 6)
    paths = {file: folder / f"{index}.{'gguf' if 'GGUF' in file else 'safetensors'}" for index, (file, _) in enumerate(ROWS)}
    for file, path in paths.items():
        write_file(path, config, file)
    for (file, kind), reference in ROWS.items():
        results, ratios = [], []
        for _ in range(args.rounds):
            for path in (paths[reference], paths[file]):
                path.read_bytes()  # into memory
            expected = in_new_process(measure, paths[reference], "bfloat16", kind)
            results.append(in_new_process(measure, paths[file], "bfloat16", kind))
            ratios.append(results[-1]["load"] / expected["load"])
        print_row(
            f"{file}, {paths[file].stat().st_size / GB:.2f} GB",
            "bfloat16" if kind == "plain" else kind,
            *(f"{max(result[name] for result in results) / GB:.2f}" for name in ("final", "beyond")),
            f"{statistics.median(result['load'] for result in results):.2f}",
            f"{statistics.median(ratios):.2f}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=3072, help="width of the transformer, a multiple of 128 (3072)")
    parser.add_argument("--double_blocks", type=int, default=1, help="(1)")
    parser.add_argument("--single_blocks", type=int, default=4, help="(4)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the medians are taken (5)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--folder", type=Path, help="of the files (the system's temporary folder)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["TQDM_DISABLE"] = "1"
    config = TransformerConfig(
        hidden_size=args.hidden_size,
        heads=args.hidden_size // 128,
        mlp_size=4 * args.hidden_size,
        double_depth=args.double_blocks,
        single_depth=args.single_blocks,
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        layouts_table(args, config, Path(folder))


if __name__ == "__main__":
    main()
