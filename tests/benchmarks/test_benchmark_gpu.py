"""The benchmark of graphics cards, with a tiny model on the CPU: its rows, what it counts, and going on after a cut."""

import json
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import all_rows, line_of, measure_or_say_why_not, ratios, read_results
from benchmarks.gpu_workloads import SIZES, VALID_TEXT, Row, block_flops, make_inputs, our_transformer
from hunyuan_model.transformer.config import TransformerConfig

CPU = torch.device("cpu")


def measured(row: Row) -> dict:
    return measure_or_say_why_not(row, CPU, steps=1, tiny=True)


def test_rows_have_names_of_their_own_and_the_most_telling_come_first():
    rows = all_rows()
    assert len({row.name for row in rows}) == len(rows)
    assert rows[:2] == [Row("product"), Row("copy")]  # what the others are compared with
    assert rows[2:4] == [Row("step", "clip33"), Row("step", "clip33", who="diffusers")]
    for work in ("step", "forward"):
        for size in SIZES:
            there = [row for row in rows if (row.work, row.size) == (work, size)]
            assert {row.weights for row in there} == {"bf16", "fp8", "int8", "fp8_fast"}
            assert {row.swap for row in there if row.who == "ours"} >= {0, 20, 40, 56}
            assert {row.who for row in there} == {"ours", "diffusers"} and any(row.compile for row in there)
    assert any(row.offload for row in rows)


def test_operations_are_those_of_the_layers():
    config = TransformerConfig(hidden_size=256, heads=2, mlp_size=1024, double_depth=1, single_depth=1)
    inputs = make_inputs(config, (64, 32, 5), CPU)
    counted = 0

    def count(linear: torch.nn.Linear, arguments: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal counted
        counted += 2 * arguments[0][..., 0].numel() * linear.weight.numel()

    model = our_transformer(Row("forward"), config, CPU)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "_blocks." in name and "mod" not in name:
            module.register_forward_hook(count)
    with torch.no_grad():
        model(**inputs)
    products, attention = block_flops(config, (64, 32, 5))
    tokens = 2 * 2 * 4 + VALID_TEXT
    assert products == counted
    assert attention == 2 * 2 * 2 * 2 * tokens**2 * config.head_dim  # blocks, heads, products, multiply and add


@pytest.mark.parametrize(
    "row",
    [
        Row("product"),
        Row("copy"),
        Row("step", "image540"),
        Row("step", "image540", weights="fp8", swap=20),
        Row("forward", "clip33", weights="int8"),
        Row("step", "image540", who="diffusers"),
        Row("forward", "image720", who="diffusers", weights="fp8"),
    ],
    ids=lambda row: row.name,
)
def test_a_row_is_measured(row):
    result = measured(row)
    assert "error" not in result, result
    assert result["seconds"] > 0
    if row.who == "ours" and row.work not in ("product", "copy"):
        assert result["predicted"] > 0
    if row.work not in ("product", "copy"):
        assert result["done_rate"] >= result["model_rate"] > 0


@pytest.mark.parametrize(
    "row", [Row("step", "image540", compile=True), Row("step", "image540", offload=True)], ids=lambda row: row.name
)
def test_compiling_and_offloading_are_plugged_in(row):
    assert "error" not in measured(row)


def test_a_row_that_cannot_be_says_why(monkeypatch):
    assert "fp8_fast multiplies in float8" in measured(Row("step", weights="fp8_fast"))["error"]

    def fails(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(gpu, "measure", fails)
    assert measured(Row("step")) == {"error": "out of memory"}
    assert line_of("a row", {"error": "out of memory"}, 1.0).count("|") == gpu.HEADER.splitlines()[0].count("|")


def test_lines_and_ratios():
    result = {"seconds": 2.0, "first": 9.0, "model_rate": 5e14, "done_rate": 7e14, "peak": 6 << 30, "reserved": 7 << 30}
    result["predicted"] = 5 << 30
    assert line_of("x", result, 1e15) == "| x | 2.000 | 9.0 | 6.00 | 5.00 | 7.00 | 50% | 70% |"
    results = {Row("step").name: result, Row("step", who="diffusers").name: {"seconds": 3.0}}
    results |= {Row("step", compile=True).name: {"seconds": 1.0}, Row("step", weights="fp8_fast").name: {"seconds": 1.25}}
    told = list(ratios(results))
    assert "- clip33, step, ours, bf16, than diffusers: 1.50 times faster" in told
    assert "- clip33, step, ours, bf16, compile, than without: 2.00 times faster" in told
    assert "- clip33, step, ours, fp8_fast, than bf16: 1.60 times faster" in told
    assert len(told) == 3
    # 20 swapped blocks of bfloat16 are more than 6 GB, which come twice but for those of two blocks.
    swapped = {Row("step", swap=20).name: {"seconds": 3.0}, Row("copy").name: {"bytes_rate": 20e9}}
    (line,) = (line for line in ratios({Row("step").name: result} | swapped) if "swap 20" in line)
    assert line.startswith("- clip33, step, ours, bf16, swap 20: 1.50 times the larger of 2.00 s of computing, 0.")


@pytest.fixture
def run(monkeypatch, capsys):
    """``run(*flags)`` -> what the benchmark prints."""

    def call(*flags: object) -> str:
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--steps", "1", *map(str, flags)])
        capsys.readouterr()
        gpu.main()
        return capsys.readouterr().out

    return call


@pytest.mark.slow  # a process for each row
def test_a_run_goes_on_with_what_is_missing_in_its_file(run, tmp_path):
    output = tmp_path / "gpu.jsonl"
    done = Row("step", "image540")
    rows = [row for row in all_rows() if row.name.startswith(done.name)]
    assert done in rows
    lines = [{"name": row.name, "result": {"seconds": 1.0, "first": 2.0, "model_rate": 1.0, "done_rate": 1.0}} for row in rows]
    output.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"name": "cut o', encoding="utf-8")
    printed = run("--tiny", "--output", output, "--only", done.name, "--minutes", 5)
    assert "| bf16 product |" in printed and done.name not in printed
    assert set(read_results(output)) == {Row("product").name, Row("copy").name, *(row.name for row in rows)}
    assert f"| {done.name} | 1.000 | 2.0 |" in run("--output", output, "--report")


def test_the_time_that_is_given_is_kept(run, tmp_path):
    assert f"{len(all_rows())} rows are missing" in run("--tiny", "--output", tmp_path / "gpu.jsonl", "--minutes", 0)
    assert not read_results(tmp_path / "gpu.jsonl")


def test_the_published_size_is_refused_on_the_cpu(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run()
    assert "--tiny" in capsys.readouterr().err
