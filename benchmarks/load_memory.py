"""How much memory loading a transformer takes, and how long: a Markdown table.

Writes random transformers to a temporary folder and loads each one in a process of its own, which watches its anonymous
memory (what no file backs; pages of the mapped checkpoint are the system's to drop). "Above the start" is the peak while
loading minus the value before; "final" is the size of the loaded weights. Linux only, as it reads /proc.

    python benchmarks/load_memory.py --gigabytes 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hunyuan_model.quantization.formats import WeightFormat  # noqa: E402
from hunyuan_model.runtime.loading import load_transformer  # noqa: E402
from hunyuan_model.runtime.settings import RuntimeSettings  # noqa: E402
from hunyuan_model.transformer.config import TransformerConfig, rope_dims_for  # noqa: E402
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer  # noqa: E402
from utils.devices import parse_dtype  # noqa: E402

SAMPLE_SECONDS = 0.001
MIB = 1 << 20

# (dtype in the file, dtype asked for, how the blocks' weights are stored)
CASES = (
    ("bfloat16", "bfloat16", "plain"),
    ("bfloat16", "float32", "plain"),
    ("bfloat16", "bfloat16", "fp8"),
    ("bfloat16", "bfloat16", "int8"),
    ("float32", "bfloat16", "plain"),
    ("float32", "bfloat16", "fp8"),
    ("float32", "bfloat16", "int8"),
)
BLOCKS = {"plain": "", "fp8": ", blocks float8", "fp8_scaled": ", blocks float8 with scales", "int8": ", blocks int8"}


@dataclass(frozen=True)
class Result:
    """Of one load, in MiB and seconds."""

    file: float
    final: float
    above_start: float
    largest_tensor: float
    seconds: float


def anonymous_memory() -> int:
    """Bytes of this process that no file backs, in memory or swapped out."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return sum(int(status.partition(f"{line}:")[2].split()[0]) for line in ("RssAnon", "VmSwap")) * 1024


class MemoryWatch:
    """Context that samples anonymous memory in a thread.

    Attributes:
        highest: the most it saw, in bytes.
        peak: the same above the start.
    """

    def __enter__(self) -> MemoryWatch:
        self._start = anonymous_memory()
        self.highest = self._start
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.highest = max(self.highest, anonymous_memory())

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self.highest = max(self.highest, anonymous_memory())

    @property
    def peak(self) -> int:
        return self.highest - self._start


def config_of_size(parameters: float) -> TransformerConfig:
    """A transformer with about this many parameters: two double blocks, and as many single ones as it takes."""
    hidden = 2048 if parameters > 4e8 else 512
    rest = 2 * 36 * hidden**2 + 35 * hidden**2 + 2 * 4096 * hidden
    return TransformerConfig(
        hidden_size=hidden,
        heads=hidden // 128,
        head_dim=128,
        rope_dims=rope_dims_for(128),
        mlp_size=4 * hidden,
        double_depth=2,
        single_depth=max(1, round((parameters - rest) / (15 * hidden**2))),
    )


def write_transformer(path: Path, gigabytes: float, dtype: torch.dtype) -> None:
    """A transformer of random weights, about ``gigabytes`` (10^9 bytes) on disk."""
    with torch.device("meta"):
        model = HYVideoDiffusionTransformer(config_of_size(gigabytes * 1e9 / dtype.itemsize))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty(tensor.shape, dtype=dtype).normal_(0, 0.02, generator=generator)
        for name, tensor in model.state_dict().items()
    }
    if path.suffix == ".safetensors":
        save_file(weights, str(path))
    else:
        torch.save({"module": weights}, path)


def measure(path: Path, dtype: torch.dtype, weights: str = "plain") -> Result:
    """Load ``path`` in this process, watching its memory; ``weights`` is one of BLOCKS."""
    torch.zeros(1 << 16).to(torch.bfloat16).to(torch.float8_e4m3fn)  # what torch allocates on first use is not the load's
    with MemoryWatch() as watch:
        start = time.perf_counter()
        model = load_transformer(path, device="cpu", dtype=dtype, runtime=RuntimeSettings(WeightFormat(weights)))
        seconds = time.perf_counter() - start
    sizes = [tensor.nbytes for tensor in model.state_dict().values()]
    return Result(path.stat().st_size / MIB, sum(sizes) / MIB, watch.peak / MIB, max(sizes) / MIB, seconds)


def measure_in_new_process(path: Path, dtype: str, weights: str = "plain") -> Result:
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(path), "--dtype", dtype, "--weights", weights]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8").stdout
    return Result(**json.loads(output.splitlines()[-1]))


def table(gigabytes: float, folder: Path, report: Callable[[str], None] = print) -> None:
    """Every case for .safetensors and .pt, one file on disk at a time."""
    report("| file | loaded as | file MiB | final MiB | peak above the start MiB | beyond final MiB | seconds |")
    report("|---|---|---|---|---|---|---|")
    for suffix in (".safetensors", ".pt"):
        for stored in dict.fromkeys(case[0] for case in CASES):
            path = folder / f"transformer{suffix}"
            write_transformer(path, gigabytes, parse_dtype(stored, "dtype"))
            for _, dtype, weights in (case for case in CASES if case[0] == stored):
                result = measure_in_new_process(path, dtype, weights)
                loaded = dtype + BLOCKS[weights]
                report(
                    f"| {stored} {suffix} | {loaded} | {result.file:.0f} | {result.final:.0f} | {result.above_start:.0f} "
                    f"| {result.above_start - result.final:+.0f} | {result.seconds:.1f} |"
                )
            path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of each checkpoint on disk, in 10^9 bytes (2)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written meanwhile (the system's temporary folder)")
    parser.add_argument("--measure", type=Path, help="load only this file, in this process, and print the result as JSON")
    parser.add_argument("--dtype", default="bfloat16", help="with --measure: dtype of the weights (bfloat16)")
    parser.add_argument(
        "--weights", choices=tuple(BLOCKS), default="plain", help="with --measure: how the blocks' weights are stored"
    )
    args = parser.parse_args()
    if not sys.platform.startswith("linux"):
        parser.error("this benchmark reads /proc and runs on Linux only")
    torch.set_num_threads(2)
    if args.measure:
        print(json.dumps(asdict(measure(args.measure, parse_dtype(args.dtype, "--dtype"), args.weights))))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        table(args.gigabytes, Path(folder))
    print(f"\ntorch {torch.__version__}, two threads, the file in the page cache")


if __name__ == "__main__":
    main()
