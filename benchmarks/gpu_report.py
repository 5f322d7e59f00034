"""The table of ``gpu.py``, and what its rows say beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.gpu_operations import COPY, MATMUL
from benchmarks.gpu_workloads import Row, copied_bytes
from hunyuan_model.transformer.config import TransformerConfig

Results = Mapping[str, dict[str, Any]]
WITHOUT = {"keep": "without keep", "unfused": "with fused kernels", "compile": "without compile"}
NOT_RUN = {"not run": "out of time"}


def report(names: Mapping[str, list[str]], results: Results) -> str:
    """Markdown; ``names`` are the rows of each group."""
    lines = [f"GPU: {results.get('versions', {}).get('device', 'not known yet')}", "", "| | |", "|---|---|"]
    for group, rows in names.items():
        lines.append(f"| **{group}** | |")
        lines += [line_of(name, results.get(name, NOT_RUN), results) for name in rows]
    return "\n".join([*lines, "", *ratios(results), "", *profiles(results)]) + "\n"


def line_of(name: str, result: dict[str, Any], results: Results) -> str:
    """A line of the table; rates also as shares of the matmul's."""
    if result == NOT_RUN:
        return f"| {name} | not run |"
    texts = [f"{key.replace('_', ' ')} {shown(value)}" for key, value in result.items() if key != "top"]
    if (most := results.get(MATMUL, {}).get("tflops")) and "model_tflops" in result:
        texts += [f"{kind} {result[f'{kind}_tflops'] / most:.0%} of matmul" for kind in ("model", "done")]
    return f"| {name} | {', '.join(texts).replace('|', '/')} |"


def shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return " ".join(map(shown, value)) if isinstance(value, list) else str(value)


def profiles(results: Results) -> Iterator[str]:
    for name, result in results.items():
        if "top" in result:
            yield f"- {name}, kernels that take longest (ms, calls): " + "; ".join(
                f"`{kernel}` {milliseconds} {calls}" for kernel, milliseconds, calls in result["top"]
            )


def ratios(results: Results) -> Iterator[str]:
    """How much faster each way is than the one that it is compared with, and what arithmetic says beside what was measured."""
    rows = {name: row for name in results if (row := row_called(name)) is not None and "seconds" in results[name]}

    def seconds(row: Row) -> float | None:
        result = results.get(row.name, {})
        return result.get("at_full_depth", result.get("seconds"))

    for name, row in rows.items():
        others = {}
        if row.who == "ours":
            others["diffusers"] = replace(row, who="diffusers")
        if row.weights == "fp8_fast":
            others["bf16"] = replace(row, weights="bf16")
        others |= {what: replace(row, **{option: False}) for option, what in WITHOUT.items() if getattr(row, option)}
        for what, other in others.items():
            if (slower := seconds(other)) is not None:
                yield f"- {name}: {slower / seconds(row):.2f} times as fast as {what}"
        result = results[name]
        if not row.short and (guess := results.get(replace(row, short=True).name, {}).get("at_full_depth")):
            yield f"- {name}: {result['seconds']:.3g} s, extrapolated {guess:.3g} s, {guess / result['seconds']:.2f} times that"
        if "peak_gib" in result and "planned_gib" in result:
            yield f"- {name}: planned {result['planned_gib'] / result['peak_gib']:.2f} times the peak"
        without = seconds(replace(row, swap=0, offload=False))
        if row.swap and row.who == "ours" and without and (rate := results.get(COPY, {}).get("to_device_gb_s")):
            copying = copied_bytes(row, TransformerConfig()) / rate / 1e9
            larger, parts = max(without, copying), f"{without:.3g} s of computing, {copying:.3g} s of copying"
            yield f"- {name}: {result['seconds'] / larger:.2f} times the larger of {parts}"


def row_called(name: str) -> Row | None:
    """The other way round of ``Row.name``."""
    depth, *parts = name.split(", ")
    if depth not in ("short", "full"):
        return None
    work, size, who, weights, *rest = parts
    swap = next((int(text.removeprefix("swap ")) for text in rest if text.startswith("swap ")), int("group offloading" in rest))
    options = {option: option in rest for option in ("offload", "keep", "unfused", "compile")}
    return Row(size, weights, work, who, depth == "short", swap, **options)
