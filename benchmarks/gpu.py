"""What a GPU does with the published model's size, in ten minutes: lines of JSON, and a Markdown table beside them.

The weights are random and made on the GPU. The groups of rows are ordered so that each minute answers most: the machine itself,
whether results stay the same with all that saves memory, single operations, steps of a model with 2+4 blocks (whose time at full
depth is extrapolated), steps at full depth, the VAE, and then diffusers with peft, compilation and longer clips. Each group has a
process of its own and a share of the time. A row is printed and written as soon as it is measured. Called again with the same
--output the benchmark continues with what was not run; to measure a row once more, delete its line there.

A training step is that of a LoRA of rank 32 on all Linear layers of the blocks, under bfloat16 autocast, with AdamW and with
gradient checkpointing on both sides. "model" is the rate of the products and the attention that a step consists of (forward,
and the gradients of the activations; the base is frozen), "done" that with what checkpointing computes again.

    python benchmarks/gpu.py --output gpu.jsonl
    python benchmarks/gpu.py --output gpu.jsonl --only short full --minutes 5
    python benchmarks/gpu.py --output gpu.jsonl --report
    python benchmarks/gpu.py --tiny --device cpu            (a rehearsal)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils.startup  # noqa: E402, F401  # isort: skip

import torch  # noqa: E402

from benchmarks.gpu_operations import decode, equality, hardware, operations, versions  # noqa: E402
from benchmarks.gpu_report import NOT_RUN, line_of, report  # noqa: E402
from benchmarks.gpu_workloads import Bench, Models, Row  # noqa: E402
from utils.cli.arguments import non_negative_float, positive_int  # noqa: E402
from utils.devices import pick_device  # noqa: E402
from utils.errors import UserError  # noqa: E402

MINUTES = 9.5
ENDED = {"error": "the process ended here"}
NO_KERNEL = ("No available kernel", "No viable backend")  # as torch says it of attention on GPUs and on the CPU

SHORT = [
    *(Row(size, weights, short=True) for weights in ("bf16", "int8", "fp8_fast", "fp8") for size in ("image", "clip33")),
    Row("clip33", "int8", short=True, keep=True),
    Row("clip33", "int8", short=True, unfused=True),
]
FULL = [
    Row("image", "int8"),
    Row("clip33", "int8"),
    Row("image", "int8", swap=40, offload=True),
    Row("clip33", "int8", swap=40, offload=True),
    Row("image", "int8", swap=56),
    Row("clip33", "int8", swap=56),
]
REST = [
    *(Row(size, short=True, who="diffusers") for size in ("image", "clip33")),
    *(Row("clip33", weights, short=True, compile=True) for weights in ("bf16", "int8")),
    *(Row(size, short=True, work="forward") for size in ("image", "clip33")),
    *(Row(size, short=True, work="forward", who="diffusers") for size in ("image", "clip33")),
    Row("clip33", "fp8", short=True, who="diffusers"),
    Row("clip33", "int8", swap=56, offload=True),
    Row("image720", "int8"),
    Row("clip65", "int8", swap=40, offload=True),
    Row("clip33"),
    Row("clip33", who="diffusers"),
    Row("image", "fp8_fast"),
    Row("clip33", "fp8_fast"),
    Row("clip33", "fp8_fast", compile=True),
]


class Group(NamedTuple):
    """Rows that one process measures; of the whole time in proportion to ``seconds``."""

    name: str
    seconds: float
    make: Callable[[Bench], dict[str, Callable[[], dict[str, Any]]]]


def of_models(rows: list[Row], bench: Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    models = lru_cache(partial(Models, bench))  # made with the first row: who only asks for names may have no GPU
    return {row.name: partial(measured_or_dropped, models, row) for row in rows}


def measured_or_dropped(models: Callable[[], Models], row: Row) -> dict[str, Any]:
    try:
        return models().measure(row)
    except BaseException:
        models().drop()
        raise


GROUPS = (
    Group("hardware", 20, hardware),
    Group("equality", 40, equality),
    Group("operations", 90, operations),
    Group("short", 100, partial(of_models, SHORT)),
    Group("full", 150, partial(of_models, FULL)),
    Group("decode", 60, decode),
    Group("rest", 110, partial(of_models, REST)),
)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring, in the process of a group


def measured(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``measure`` finds, or why it could not be."""
    try:
        return measure()
    except UserError as error:
        return {"skipped": str(error)[:160]}
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # of whatever library: the other rows are to be measured
        if any(text in str(error) for text in NO_KERNEL):
            return {"skipped": "no such kernel here"}
        traceback.print_exc()
        reason = (str(error).strip().splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {reason}"[:160]}


def measure_group(group: Group, bench: Bench, path: Path, ends: float) -> None:
    """The rows of ``group`` that are missing in ``path``, until ``time.monotonic()`` is ``ends`` or whoever waits is gone."""
    rows, results, parent = group.make(bench), read_results(path), os.getppid()
    for name in missing(rows, results):
        if time.monotonic() > ends or os.getppid() != parent:
            return
        append(path, name, ENDED)  # the last line counts
        result = measured(rows[name])
        append(path, name, result)
        results = read_results(path)
        path.with_suffix(".md").write_text(report(all_names(bench), results), encoding="utf-8")
        print(line_of(name, result, results), flush=True)
        if bench.device.type == "cuda":
            torch.cuda.synchronize()  # ends the process where an error has made the GPU useless for it


# ---------------------------------------------------------------------------------------------------------------------
# The file


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """By row name; the last line of each counts, and a line that was cut off or is damaged does not."""
    results = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            match json.loads(line):
                case {"name": str(name), "result": dict(result)}:
                    results[name] = result
    return results


def append(path: Path, name: str, result: dict[str, Any]) -> None:
    cut_off = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")  # which is a line of its own
    with open(path, "a", encoding="utf-8") as file:
        file.write(("\n" if cut_off else "") + json.dumps({"name": name, "result": result}) + "\n")


def missing(names: Any, results: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name in names if results.get(name, NOT_RUN) == NOT_RUN]


def all_names(bench: Bench) -> dict[str, list[str]]:
    """The rows of each group."""
    return {group.name: list(group.make(bench)) for group in GROUPS}


# ---------------------------------------------------------------------------------------------------------------------
# The groups, one process after the other


def run_groups(groups: list[Group], args: argparse.Namespace, bench: Bench) -> None:
    ends = time.monotonic() + 60 * args.minutes
    whole = sum(group.seconds for group in groups)
    forget_ended(args.output)
    for group in (*groups, *groups):  # what did not fit into its share has what is left in the end
        share = min(ends, time.monotonic() + 60 * args.minutes * group.seconds / whole)
        while (left := missing(group.make(bench), read_results(args.output))) and time.monotonic() < share:
            # A process that ended early is followed by another one, for the rows after; not one that began none.
            if finished(group, args, share) or missing(left, read_results(args.output)) == left:
                break


def finished(group: Group, args: argparse.Namespace, ends: float) -> bool:
    """Whether the process of ``group`` came to its own end, or to that of its time."""
    seconds = ends - time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--group", group.name, "--group_seconds", str(seconds)]
    command += ["--output", str(args.output), "--device", args.device, "--steps", str(args.steps)]
    try:
        return subprocess.run([*command, *(["--tiny"] if args.tiny else [])], timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        forget_ended(args.output)
        return True


def forget_ended(path: Path) -> None:
    """Rows that an end of the time cut off are to be run again."""
    for name, result in read_results(path).items():
        if result == ENDED:
            append(path, name, NOT_RUN)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.jsonl"), help="lines of JSON; the table is beside it (gpu.jsonl)")
    parser.add_argument("--minutes", type=non_negative_float, default=MINUTES, help=f"for all that is asked for ({MINUTES})")
    names = [group.name for group in GROUPS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="GROUP", help=", ".join(names))
    parser.add_argument("--report", action="store_true", help="print the table of what the file holds, ratios and profiles")
    parser.add_argument(
        "--steps", type=positive_int, default=2, help="of which the median is taken, after one that does not count (2)"
    )
    parser.add_argument("--device", default="cuda", help="(cuda)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the benchmark itself; also with --device cpu")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--group_seconds", type=float, help=argparse.SUPPRESS)
    return parser


def checked(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Bench]:
    """The flags, and what is measured with. Ends with a sentence where one of them cannot be."""
    args = parser.parse_args()
    if args.output.suffix == ".md":
        parser.error(f"--output {args.output} would be replaced by the table; use a name that ends with .jsonl")
    if args.report:
        if not args.output.is_file():
            parser.error(f"--output {args.output} is no file; give the one that a benchmark wrote")
        return args, Bench(torch.device("cpu"), args.tiny)
    try:
        bench = Bench(pick_device(args.device), args.tiny, args.steps)
        if bench.device.type == "cpu" and not args.tiny:
            parser.error("the published size takes a GPU; use --tiny to try the benchmark itself on the CPU")
        open(args.output, "a", encoding="utf-8").close()
    except (UserError, OSError) as error:
        parser.error(str(error))
    return args, bench


def same_machine(parser: argparse.ArgumentParser, path: Path, bench: Bench) -> None:
    """Ends where ``path`` holds results of another GPU or of a rehearsal, which would stand for those of this one."""
    found, earlier = versions(bench), read_results(path).get("versions", {})
    if "device" not in earlier:
        append(path, "versions", found)
    elif differing := [key for key in ("device", "model") if found.get(key) != earlier.get(key)]:
        parser.error(
            f"--output {path} holds results of {earlier['device']}{', of a tiny model' if 'model' in earlier else ''}: "
            f"another {' and '.join(differing)} than here; give another file"
        )


def main() -> None:
    started, parser = time.monotonic(), build_parser()
    args, bench = checked(parser)
    if args.report:
        print(report(all_names(bench), read_results(args.output)))
        return
    if args.tiny and bench.device.type == "cpu":
        torch.set_num_threads(1)  # which only wait for each other on tensors as small as these
    if args.group:
        group = next(group for group in GROUPS if group.name == args.group)
        measure_group(group, bench, args.output, started + args.group_seconds)
        return
    same_machine(parser, args.output, bench)
    run_groups([group for group in GROUPS if group.name in args.only], args, bench)
    left = missing([name for names in all_names(bench).values() for name in names], read_results(args.output))
    print(f"\n{len(left)} rows were not run. The table: {args.output.with_suffix('.md')}")


if __name__ == "__main__":
    main()
