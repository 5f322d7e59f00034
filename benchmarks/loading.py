"""Loading and running the published transformer's size from disk: memory and seconds, as Markdown tables.

Writes a checkpoint with the official names and shapes and random weights (25.6 GB in bfloat16), tensor by tensor, and loads it
in processes of their own, which watch their anonymous memory (what no file backs, swapped or not). Beside each load stands the
time that merely reading the file takes; before both the system drops what it holds of the file. The files are
deleted at the end, also after an error. Linux only, as it reads /proc.

    python benchmarks/loading.py
    python benchmarks/loading.py --generate
    python benchmarks/loading.py --hidden_size 512 --double_blocks 1 --single_blocks 2
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.load_memory import MemoryWatch  # noqa: E402
from hunyuan_model.quantization.formats import WeightFormat  # noqa: E402
from hunyuan_model.runtime.loading import load_transformer  # noqa: E402
from hunyuan_model.runtime.settings import RuntimeSettings  # noqa: E402
from hunyuan_model.sampling.flow import flow_sigmas, initial_noise, latent_size, sample_latents  # noqa: E402
from hunyuan_model.transformer.config import TransformerConfig  # noqa: E402
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer  # noqa: E402
from utils.devices import parse_dtype  # noqa: E402
from utils.safetensors_io import save_tensor_stream  # noqa: E402

GB = 1e9
GIB = 1 << 30
READ_BYTES = 16 << 20
POOL_SLICE = 1 << 24
SUFFIXES = (".safetensors", ".pt")
KINDS = ("fp8", "fp8_scaled", "int8")
VALID_TEXT, TEXT_ROWS = 60, 256
LEAST_FREE = 1 << 30  # left over on the disk


# ---------------------------------------------------------------------------------------------------------------------
# The file


def stored_layout(config: TransformerConfig, float8: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every tensor by its official name; ``float8`` as the published file has it: Linear weights of blocks."""
    with torch.device("meta"):
        model = HYVideoDiffusionTransformer(config)

    def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
        in_block = name.startswith(("double_blocks.", "single_blocks."))
        return torch.float8_e4m3fn if float8 and in_block and tensor.ndim == 2 else torch.bfloat16

    return {name: (dtype_of(name, tensor), tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


def write_checkpoint(path: Path, config: TransformerConfig, float8: bool = False) -> None:
    """A checkpoint of random weights, of which no more than a slice is ever in memory.

    Every tensor is a mapping of its own of one small file of random values, so that both formats are written from file pages.
    """
    layout = stored_layout(config, float8)
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


def require_room(folder: Path, config: TransformerConfig, float8: bool) -> int:
    """The size of the checkpoint in bytes; ends the benchmark if the disk cannot hold it."""
    size = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in stored_layout(config, float8).values())
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < size + LEAST_FREE:
        raise SystemExit(f"error: {folder} has {free / GB:.1f} GB free, and the checkpoint takes {size / GB:.1f} GB. Use --folder.")
    return size


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


# ---------------------------------------------------------------------------------------------------------------------
# What the processes of their own do: one line of JSON each


def measure_load(path: Path, kind: str) -> dict[str, float]:
    torch.zeros(1 << 16).to(torch.bfloat16).to(torch.float8_e4m3fn)  # what torch allocates on first use is not the load's
    with MemoryWatch() as watch:
        start = time.perf_counter()
        model = load_transformer(path, device="cpu", dtype=torch.bfloat16, runtime=RuntimeSettings(WeightFormat(kind)))
        seconds = time.perf_counter() - start
    final = sum(tensor.nbytes for tensor in model.state_dict().values())
    return {"seconds": seconds, "final": final, "highest": watch.highest, "above_start": watch.peak}


def measure_generation(path: Path, kind: str, dtype: torch.dtype, side: int, steps: int) -> dict[str, float]:
    """The transformer's part of sampling one picture of ``side`` pixels squared."""
    device = torch.device("cpu")
    with MemoryWatch() as watch:
        start = time.perf_counter()
        model = load_transformer(path, device=device, dtype=dtype, runtime=RuntimeSettings(WeightFormat(kind)))
        loaded = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        config = model.config
        latents = sample_latents(
            model,
            initial_noise(latent_size(side, side, 1), generator),
            torch.randn(1, TEXT_ROWS, config.text_dim, generator=generator),
            (torch.arange(TEXT_ROWS) < VALID_TEXT).long()[None],
            torch.randn(1, config.pooled_dim, generator=generator),
            sigmas=flow_sigmas(steps, shift=7.0),
            guidance_scale=6.0,
            device=device,
            dtype=dtype,
        )
        sampled = time.perf_counter()
    if not latents.isfinite().all():
        raise SystemExit("error: the latents are not finite")
    final = sum(tensor.nbytes for tensor in model.state_dict().values())
    return {"load": loaded - start, "sample": sampled - loaded, "final": final, "highest": watch.highest}


def in_new_process(*arguments: object) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), *map(str, arguments)]
    environment = os.environ | {"TQDM_DISABLE": "1"}
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(ended.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def loading_rows(path: Path, kinds: list[str], rounds: int, threads: int) -> Iterator[str]:
    """A row for each kind: medians of the seconds and of the ratios of the rounds, and the highest peak. Who begins changes."""
    for kind in kinds:
        results, reads = [], []
        for index in range(rounds):
            if index % 2 == 0:
                reads.append(seconds_to_read(path))
            forget(path)
            results.append(in_new_process("--measure_load", path, kind, "--threads", threads))
            if index % 2 == 1:
                reads.append(seconds_to_read(path))
        seconds = statistics.median(result["seconds"] for result in results)
        ratio = statistics.median(result["seconds"] / read for result, read in zip(results, reads))
        peak = max(result["highest"] for result in results)
        beyond = max(result["above_start"] - result["final"] for result in results)
        yield (
            f"| bfloat16 {path.suffix}, {path.stat().st_size / GB:.2f} GB | {kind} | {results[0]['final'] / GB:.2f} "
            f"| {peak / GB:.2f} | {peak / GIB:.2f} | {beyond / GB:+.2f} | {seconds:.1f} | {statistics.median(reads):.1f} "
            f"| {ratio:.2f} |"
        )


def loading_table(args: argparse.Namespace, config: TransformerConfig, folder: Path, report: Callable[[str], None]) -> None:
    report("| file | loaded as | final weights GB | peak GB | peak GiB | beyond final GB | seconds | reading alone | ratio |")
    report("|---|---|---|---|---|---|---|---|---|")
    for suffix in args.formats:
        require_room(folder, config, float8=False)
        path = folder / f"transformer{suffix}"
        write_checkpoint(path, config)
        seconds_to_read(path)  # does not count: whatever is below this system may still be writing
        for row in loading_rows(path, args.kinds, args.rounds, args.threads):
            report(row)
        path.unlink()


def generation_table(args: argparse.Namespace, config: TransformerConfig, folder: Path, report: Callable[[str], None]) -> None:
    require_room(folder, config, float8=True)
    path = folder / "transformer.safetensors"
    write_checkpoint(path, config, float8=True)
    report(
        "| file | sampled | final weights GB | peak GB | peak GiB | seconds of loading | of sampling |\n"
        "|---|---|---|---|---|---|---|"
    )
    forget(path)
    result = in_new_process(
        *("--measure_generation", path, "fp8", "--threads", args.threads),
        *("--dtype", args.dtype, "--side", args.side, "--steps", args.steps),
    )
    report(
        f"| float8 .safetensors, {path.stat().st_size / GB:.2f} GB | {args.side}x{args.side}, {args.steps} steps, {args.dtype} "
        f"| {result['final'] / GB:.2f} | {result['highest'] / GB:.2f} | {result['highest'] / GIB:.2f} "
        f"| {result['load']:.1f} | {result['sample']:.1f} |"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generate", action="store_true", help="draw a picture from a float8 file instead of timing the loading")
    parser.add_argument("--hidden_size", type=int, default=3072, help="width of the transformer, a multiple of 128 (3072)")
    parser.add_argument("--double_blocks", type=int, default=20, help="(20)")
    parser.add_argument("--single_blocks", type=int, default=40, help="(40)")
    parser.add_argument("--formats", nargs="+", choices=SUFFIXES, default=SUFFIXES, help="of the checkpoint (both)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what the weights are loaded as (both)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians are taken (3)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (the system's temporary folder)")
    parser.add_argument("--dtype", default="bfloat16", help="with --generate: what is computed in (bfloat16)")
    parser.add_argument("--side", type=int, default=256, help="with --generate: pixels of the picture (256)")
    parser.add_argument("--steps", type=int, default=2, help="with --generate: of sampling (2)")
    parser.add_argument("--measure_load", nargs=2, metavar=("FILE", "KIND"), help=argparse.SUPPRESS)
    parser.add_argument("--measure_generation", nargs=2, metavar=("FILE", "KIND"), help=argparse.SUPPRESS)
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    if not sys.platform.startswith("linux"):
        parser.error("this benchmark reads /proc and runs on Linux only")
    if args.hidden_size < 128 or args.hidden_size % 128 or min(args.double_blocks, args.single_blocks, args.rounds) < 1:
        parser.error("--hidden_size must be a multiple of 128, and there is at least one block of each kind and one round")
    torch.set_num_threads(args.threads)
    dtype = parse_dtype(args.dtype, "--dtype")
    if args.measure_load:
        print(json.dumps(measure_load(Path(args.measure_load[0]), args.measure_load[1])))
        return
    if args.measure_generation:
        print(
            json.dumps(
                measure_generation(Path(args.measure_generation[0]), args.measure_generation[1], dtype, args.side, args.steps)
            )
        )
        return
    config = TransformerConfig(
        hidden_size=args.hidden_size,
        heads=args.hidden_size // 128,
        mlp_size=4 * args.hidden_size,
        double_depth=args.double_blocks,
        single_depth=args.single_blocks,
    )
    machine = f"{args.threads} threads of {os.cpu_count()} {platform.machine()} cores"
    print(f"torch {torch.__version__}, {machine}, {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.0f} GiB\n")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # through the end of the folder's context
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        table = generation_table if args.generate else loading_table
        table(args, config, Path(folder), lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
