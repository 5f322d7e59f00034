"""Loading and running transformers from disk, at the published size or smaller: memory and seconds, as Markdown tables.

Writes a checkpoint with the official names and shapes and random weights (25.6 GB in bfloat16), tensor by tensor, and loads it
in processes of their own, which watch their anonymous memory (what no file backs, swapped or not). Beside each load stands the
time that merely reading the file takes; before both the system drops what it holds of the file. The files are
deleted at the end, also after an error. Linux only, as it reads /proc.

    python benchmarks/loading.py
    python benchmarks/loading.py --generate
    python benchmarks/loading.py --hidden_size 2048 --double_blocks 2 --single_blocks 8 --stored float32 --kinds plain int8
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.memory_watch import MemoryWatch, in_new_process  # noqa: E402
from hunyuan_model.quantization.formats import FP8_DTYPE, WeightFormat  # noqa: E402
from hunyuan_model.runtime.loading import load_transformer  # noqa: E402
from hunyuan_model.runtime.settings import RuntimeSettings  # noqa: E402
from hunyuan_model.sampling.flow import flow_sigmas, initial_noise, latent_size, sample_latents  # noqa: E402
from hunyuan_model.transformer.config import TransformerConfig  # noqa: E402
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer  # noqa: E402
from utils.safetensors_io import save_tensor_stream  # noqa: E402

GB = 1e9
READ_BYTES = 16 << 20
POOL_SLICE = 1 << 24
SUFFIXES = (".safetensors", ".pt")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float8": FP8_DTYPE}
KINDS = ("plain", "fp8", "fp8_scaled", "int8")
VALID_TEXT, TEXT_ROWS = 60, 256
LEAST_FREE = 1 << 30  # left over on the disk


def stored_layout(config: TransformerConfig, stored: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every tensor by its official name; in "float8" files those are float8 that the published one has so."""
    with torch.device("meta"):
        model = HYVideoDiffusionTransformer(config)

    def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
        in_block = name.startswith(("double_blocks.", "single_blocks."))
        return DTYPES["bfloat16"] if stored == "float8" and not (in_block and tensor.ndim == 2) else DTYPES[stored]

    return {name: (dtype_of(name, tensor), tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


def write_checkpoint(path: Path, config: TransformerConfig, stored: str) -> None:
    """A checkpoint of random weights, of which no more than a slice is ever in memory.

    Every tensor is a mapping of its own of one small file of random values, so that both formats are written from file pages.
    """
    layout = stored_layout(config, stored)
    size = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout.values())
    status = os.statvfs(path.parent)
    if (free := status.f_bavail * status.f_frsize) < size + LEAST_FREE:
        raise SystemExit(f"error: the disk has {free / GB:.1f} GB free, and the checkpoint takes {size / GB:.1f} GB. Use --folder.")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        pools = {}
        for dtype in {dtype for dtype, _ in layout.values()}:
            pools[dtype] = Path(folder) / f"{dtype.itemsize}.bin"
            _write_pool(pools[dtype], max(torch.Size(shape).numel() for kind, shape in layout.values() if kind == dtype), dtype)

        def mapped(name: str) -> Tensor:
            dtype, shape = layout[name]
            storage = torch.UntypedStorage.from_file(str(pools[dtype]), False, torch.Size(shape).numel() * dtype.itemsize)
            return torch.empty(0, dtype=dtype).set_(storage).view(shape)

        if path.suffix == ".safetensors":
            save_tensor_stream(path, layout, ((name, mapped(name)) for name in layout))
        else:
            torch.save({"module": {name: mapped(name) for name in layout}}, path)


def _write_pool(path: Path, count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        for start in range(0, count, POOL_SLICE):
            values = torch.empty(min(POOL_SLICE, count - start)).normal_(0, 0.02, generator=generator)
            file.write(values.to(dtype).view(torch.uint8).numpy())


def forget(path: Path) -> None:
    """Have the system drop what it holds of the file in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # what is not on disk yet cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def seconds_to_read(path: Path) -> float:
    """Of reading the file from its beginning to its end into one small buffer."""
    buffer = bytearray(READ_BYTES)
    forget(path)
    with open(path, "rb", buffering=0) as file:
        start = time.perf_counter()
        while file.readinto(buffer):
            pass
        return time.perf_counter() - start


def measure(path: Path, dtype: str, kind: str, side: int = 0, steps: int = 0) -> dict[str, float]:
    """Load ``path``, and sample a picture of ``side`` pixels squared where that is not 0: seconds, and bytes of memory."""
    torch.zeros(1 << 16).to(torch.bfloat16).to(FP8_DTYPE)  # what torch allocates on first use is not the load's
    with MemoryWatch() as watch:
        start = time.perf_counter()
        model = load_transformer(path, device="cpu", dtype=DTYPES[dtype], runtime=RuntimeSettings(WeightFormat(kind)))
        loaded = time.perf_counter()
        if side:
            sample(model, DTYPES[dtype], side, steps)
        sampled = time.perf_counter()
    final = sum(tensor.nbytes for tensor in model.state_dict().values())
    seconds = {"load": loaded - start, "sample": sampled - loaded}
    return seconds | {"final": final, "highest": watch.highest, "beyond": watch.above_start - final}


def sample(model: HYVideoDiffusionTransformer, dtype: torch.dtype, side: int, steps: int) -> None:
    """The transformer's part of sampling one picture."""
    generator = torch.Generator().manual_seed(0)
    latents = sample_latents(
        model,
        initial_noise(latent_size(side, side, 1), generator),
        torch.randn(1, TEXT_ROWS, model.config.text_dim, generator=generator),
        (torch.arange(TEXT_ROWS) < VALID_TEXT).long()[None],
        torch.randn(1, model.config.pooled_dim, generator=generator),
        sigmas=flow_sigmas(steps, shift=7.0),
        guidance_scale=6.0,
        device=torch.device("cpu"),
        dtype=dtype,
    )
    if not latents.isfinite().all():
        raise SystemExit("error: the latents are not finite")


def print_row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def loading_table(args: argparse.Namespace, config: TransformerConfig, folder: Path) -> None:
    """A row for each file and kind: medians of the seconds and of the ratios of the rounds, and the highest peak."""
    columns = ("file", "loaded as", "final weights GB", "peak GB", "beyond final GB", "seconds", "reading alone", "ratio")
    print_row(*columns)
    print_row(*["---"] * len(columns))
    for suffix in args.formats:
        for stored in args.stored:
            path = folder / f"transformer{suffix}"
            write_checkpoint(path, config, stored)
            seconds_to_read(path)  # does not count: whatever is below this system may still be writing
            for kind in args.kinds:
                results, reads = [], []
                for _ in range(args.rounds):
                    reads.append(seconds_to_read(path))
                    forget(path)
                    results.append(in_new_process(measure, path, args.dtype, kind))
                print_row(
                    f"{stored} {suffix}, {path.stat().st_size / GB:.2f} GB",
                    args.dtype if kind == "plain" else f"{args.dtype}, {kind}",
                    *(f"{max(result[name] for result in results) / GB:.2f}" for name in ("final", "highest", "beyond")),
                    f"{statistics.median(result['load'] for result in results):.1f}",
                    f"{statistics.median(reads):.1f}",
                    f"{statistics.median(result['load'] / read for result, read in zip(results, reads)):.2f}",
                )
            path.unlink()


def generation_table(args: argparse.Namespace, config: TransformerConfig, folder: Path) -> None:
    """One row: from a float8 file to a picture."""
    path = folder / "transformer.safetensors"
    write_checkpoint(path, config, "float8")
    columns = ("file", "sampled", "final weights GB", "peak GB", "seconds of loading", "of sampling")
    print_row(*columns)
    print_row(*["---"] * len(columns))
    forget(path)
    result = in_new_process(measure, path, args.dtype, "fp8", args.side, args.steps)
    print_row(
        f"float8 .safetensors, {path.stat().st_size / GB:.2f} GB",
        f"{args.side}x{args.side}, {args.steps} steps, {args.dtype}",
        *(f"{result[name] / GB:.2f}" for name in ("final", "highest")),
        *(f"{result[name]:.1f}" for name in ("load", "sample")),
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generate", action="store_true", help="sample a picture from a float8 file instead of timing the loading")
    parser.add_argument("--hidden_size", type=int, default=3072, help="width of the transformer, a multiple of 128 (3072)")
    parser.add_argument("--double_blocks", type=int, default=20, help="(20)")
    parser.add_argument("--single_blocks", type=int, default=40, help="(40)")
    parser.add_argument("--formats", nargs="+", choices=SUFFIXES, default=SUFFIXES, help="of the checkpoint (both)")
    parser.add_argument("--stored", nargs="+", choices=tuple(DTYPES), default=["bfloat16"], help="in the file (bfloat16)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS[1:], help="of the blocks' weights (all but plain)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the other weights (bfloat16)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians are taken (3)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (the system's temporary folder)")
    parser.add_argument("--side", type=int, default=256, help="with --generate: pixels of the picture (256)")
    parser.add_argument("--steps", type=int, default=2, help="with --generate: of sampling (2)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    os.environ["TQDM_DISABLE"] = "1"
    config = TransformerConfig(
        hidden_size=args.hidden_size,
        heads=args.hidden_size // 128,
        mlp_size=4 * args.hidden_size,
        double_depth=args.double_blocks,
        single_depth=args.single_blocks,
    )
    print(f"torch {torch.__version__}, {args.threads} threads of {os.cpu_count()} {platform.machine()} cores\n")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # through the end of the folder's context
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        (generation_table if args.generate else loading_table)(args, config, Path(folder))


if __name__ == "__main__":
    main()
