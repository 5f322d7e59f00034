"""Seconds, memory and use of a GPU at the published model's size, beside diffusers and peft: a Markdown table.

The weights are random and made on the GPU; each row is measured in a process of its own, the most important rows first. A row
is printed as soon as it is measured and appended to --output, as a line of JSON. Called again with the same file the
benchmark continues with the rows that are missing there; those that failed are there as well, with the reason.

A training step is that of a LoRA of rank 32 on all Linear layers of the blocks, under bfloat16 autocast, with AdamW and with
gradient checkpointing on both sides. "model" is the rate of the products and the attention that a step consists of (forward,
and the gradients of the activations; the base is frozen), "done" that with what checkpointing computes again, both as a share
of the rate of a bfloat16 matmul measured on the same GPU before.

    python benchmarks/gpu.py --output gpu.jsonl
    python benchmarks/gpu.py --output gpu.jsonl --minutes 9
    python benchmarks/gpu.py --output gpu.jsonl --report
    python benchmarks/gpu.py --output gpu.jsonl --only clip33 fp8_fast
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils.startup  # noqa: E402, F401  # isort: skip

import torch  # noqa: E402

from benchmarks.gpu_workloads import (  # noqa: E402
    CEILINGS,
    SIZES,
    TINY,
    TINY_SIZES,
    Row,
    copied_bytes,
    predicted_bytes,
    prepared,
    row_flops,
)
from hunyuan_model.transformer.config import TransformerConfig  # noqa: E402

GIB = 1 << 30
PACKAGES = ("torch", "diffusers", "peft", "accelerate", "triton")
PRODUCT_SIDE, PRODUCT_ROUNDS = 8192, 20
COPY_BYTES, COPY_ROUNDS = 1 << 30, 10
WARM_UP = 2
ROW_SECONDS = 420  # no row takes longer unless something hangs


def all_rows() -> list[Row]:
    """Ordered so that a run which is cut off has answered what matters most."""
    rows = [
        Row("product"),
        Row("copy"),
        Row("step"),
        Row("step", who="diffusers"),
        Row("step", weights="fp8_fast"),
        Row("step", weights="bf16", compile=True),
        Row("step", "image540", weights="int8", swap=56),
        Row("step", "clip33", weights="int8", swap=56, offload=True),
        Row("step", "clip33", weights="int8", swap=40),
        Row("step", "image540"),
        Row("step", "image540", who="diffusers"),
        Row("step", weights="int8"),
        Row("step", weights="fp8"),
        Row("step", who="diffusers", weights="fp8"),
        Row("step", weights="fp8_fast", compile=True),
        Row("step", swap=20),
        Row("step", swap=40),
        Row("step", swap=56),
        Row("step", who="diffusers", swap=56),
        Row("step", offload=True),
        Row("step", "clip65", weights="int8", swap=40, offload=True),
        Row("step", "clip65"),
        Row("step", "clip65", who="diffusers"),
    ]
    for size in SIZES:
        rows += [Row("forward", size), Row("forward", size, who="diffusers")]
    for size in SIZES:
        for work in ("step", "forward"):
            rows += [Row(work, size, weights=weights) for weights in ("bf16", "fp8", "int8", "fp8_fast")]
            rows += [Row(work, size, who="diffusers", weights=weights) for weights in ("bf16", "fp8")]
            rows += [Row(work, size, weights=weights, compile=True) for weights in ("bf16", "int8", "fp8_fast")]
            rows += [Row(work, size, weights="int8", swap=swap) for swap in (20, 40, 56)]
            rows += [Row(work, size, who="diffusers", weights="fp8", swap=56)]
        rows += [Row("step", size, weights="int8", swap=swap, offload=True) for swap in (0, 20, 40, 56)]
    return list(dict.fromkeys(rows))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring: in a process of its own for each row


def timed(run: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_product(device: torch.device, side: int) -> dict[str, float]:
    """Operations per second of a bfloat16 matmul."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(WARM_UP):
        left @ right
    seconds = statistics.median(timed(lambda: left @ right, device) for _ in range(PRODUCT_ROUNDS))
    return {"seconds": seconds, "rate": 2.0 * side**3 / seconds}


def measure_copy(device: torch.device, size: int) -> dict[str, float]:
    """Bytes per second from page-locked host memory to the GPU."""
    source = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=device)
    target.copy_(source)
    seconds = statistics.median(timed(lambda: target.copy_(source, non_blocking=True), device) for _ in range(COPY_ROUNDS))
    return {"seconds": seconds, "bytes_rate": size / seconds}


def measure(row: Row, device: torch.device, steps: int, tiny: bool) -> dict[str, float]:
    if row.work == "product":
        return measure_product(device, 64 if tiny else PRODUCT_SIDE)
    if row.work == "copy":
        return measure_copy(device, 1 << 16 if tiny else COPY_BYTES)
    config = TINY if tiny else TransformerConfig()
    size = (TINY_SIZES if tiny else SIZES)[row.size]
    run = prepared(row, config, size, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    first = timed(run, device)
    for _ in range(WARM_UP - 1):
        run()
    seconds = statistics.median(timed(run, device) for _ in range(steps))
    model, done = row_flops(row, config, size)
    result = {"seconds": seconds, "first": first, "model_rate": model / seconds, "done_rate": done / seconds}
    if row.who == "ours":
        result["predicted"] = predicted_bytes(row, config, size)
    if device.type == "cuda":
        result["peak"] = torch.cuda.max_memory_allocated(device)
        result["reserved"] = torch.cuda.max_memory_reserved(device)
    return result


def measure_or_say_why_not(row: Row, device: torch.device, steps: int, tiny: bool) -> dict[str, Any]:
    try:
        return measure(row, device, steps, tiny)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # of whatever library: the other rows are to be measured
        traceback.print_exc()
        reason = (str(error).strip().splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {reason}"[:160]}


def in_new_process(row: Row, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--row", json.dumps(asdict(row)), "--device", args.device]
    command += ["--steps", str(args.steps), *(["--tiny"] if args.tiny else [])]
    try:
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} s"}
    if ended.returncode:
        return {"error": f"the process ended with status {ended.returncode}"}
    return json.loads(ended.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# The table


HEADER = "| | seconds | first | peak GiB | predicted GiB | reserved GiB | model | done |\n|---|---|---|---|---|---|---|---|"


def line_of(name: str, result: dict[str, Any], rate: float | None) -> str:
    if "error" in result:
        return f"| {name} | {result['error'].replace('|', '/')} | | | | | | |"
    if "rate" in result:
        return f"| {name} | {result['seconds']:.4f} | | | | | {result['rate'] / 1e12:.3g} TFLOP/s | |"
    if "bytes_rate" in result:
        return f"| {name} | {result['seconds']:.4f} | | | | | {result['bytes_rate'] / 1e9:.3g} GB/s | |"
    memory = [f"{result[key] / GIB:.2f}" if key in result else "" for key in ("peak", "predicted", "reserved")]
    shares = [f"{result[key] / rate:.0%}" if rate else "" for key in ("model_rate", "done_rate")]
    return f"| {name} | {result['seconds']:.3f} | {result['first']:.1f} | {' | '.join((*memory, *shares))} |"


def ratios(results: dict[str, dict[str, Any]]) -> Iterable[str]:
    """How many times faster ours is than diffusers at equal settings, and fp8_fast and compile than without.

    Of block swap, how long a step takes against the larger of computing without it and of nothing but copying.
    """
    rate = results.get(Row("copy").name, {}).get("bytes_rate")
    seconds = {name: result["seconds"] for name, result in results.items() if "seconds" in result}

    def compare(what: str, faster: str, slower: str) -> Iterable[str]:
        if faster in seconds and slower in seconds:
            yield f"- {what}: {seconds[slower] / seconds[faster]:.2f} times faster"

    for row in all_rows():
        if row.work in CEILINGS or row.who != "ours":
            continue
        changed = functools.partial(lambda row, **changes: Row(**(asdict(row) | changes)).name, row)
        if not row.compile and not row.offload:
            theirs = "fp8" if row.weights == "int8" else row.weights  # the same memory; it knows no scales
            yield from compare(f"{row.name}, than diffusers", row.name, changed(who="diffusers", weights=theirs))
        if row.weights == "fp8_fast":
            yield from compare(f"{row.name}, than bf16", row.name, changed(weights="bf16"))
        if row.swap and rate and {row.name, changed(swap=0)} <= seconds.keys():
            alone, copying = seconds[changed(swap=0)], copied_bytes(row, TransformerConfig()) / rate
            larger = max(alone, copying)
            parts = f"{alone:.2f} s of computing, {copying:.2f} s of copying"
            yield f"- {row.name}: {seconds[row.name] / larger:.2f} times the larger of {parts}"
        if row.compile:
            yield from compare(f"{row.name}, than without", row.name, changed(compile=False))


def hardware(device: torch.device) -> str:
    packages = []
    for package in PACKAGES:
        try:
            packages.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    what = f"{platform.machine()} CPU"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        what = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
    return f"{what}; {', '.join(packages)}; Python {platform.python_version()}"


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """By row name; the last line of each counts, and a line that was cut off does not."""
    results = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        results[entry["name"]] = entry["result"]
    return results


def run_rows(rows: list[Row], args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Measure what is missing in the file, until the time is up."""
    ends = time.monotonic() + args.minutes * 60
    results = read_results(args.output)
    if args.output.exists() and not args.output.read_bytes().endswith(b"\n"):
        args.output.write_bytes(args.output.read_bytes() + b"\n")  # what was cut off is a line of its own
    for row in rows:
        if row.name in results and not args.again:
            continue
        left = ends - time.monotonic()
        result = in_new_process(row, args, min(left, ROW_SECONDS)) if left > 1 else None
        if result is None or (left < ROW_SECONDS and "not done after" in result.get("error", "")):
            # What the end of the time cuts off is not at fault: the next call measures it.
            say(f"\nThe time is up: {sum(row.name not in results for row in rows)} rows are missing.")
            break
        results[row.name] = result
        with open(args.output, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": row.name, "row": asdict(row), "result": result}) + "\n")
        say(line_of(row.name, result, results.get(Row("product").name, {}).get("rate")))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.jsonl"), help="file that rows are appended to (gpu.jsonl)")
    parser.add_argument("--minutes", type=float, default=60, help="after which no row begins, and one under way is given up (60)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose names hold all of these")
    parser.add_argument("--again", action="store_true", help="measure rows that are in the file already once more")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--report", action="store_true", help="print the table of what the file holds, and ratios")
    parser.add_argument("--steps", type=int, default=5, help="of which the median is taken, after two that do not count (5)")
    parser.add_argument("--device", default="cuda", help="(cuda)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the benchmark itself; also with --device cpu")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.list:
        print("\n".join(row.name for row in all_rows()))
        return
    rows = [row for row in all_rows() if row.work in CEILINGS or all(text in row.name for text in args.only or ())]
    if args.report:
        results = read_results(args.output)
        rate = results.get(Row("product").name, {}).get("rate")
        print("\n".join([HEADER, *(line_of(name, result, rate) for name, result in results.items()), "", *ratios(results)]))
        return
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here")
    if device.type == "cpu" and not args.tiny:
        parser.error("the published size takes a GPU; use --tiny to try the benchmark itself on the CPU")
    if args.row:
        print(json.dumps(measure_or_say_why_not(Row(**json.loads(args.row)), device, args.steps, args.tiny)))
        return
    print(f"{hardware(device)}\n\n{HEADER}", flush=True)
    run_rows(rows, args, functools.partial(print, flush=True))


if __name__ == "__main__":
    main()
