"""The benchmark of GPUs, with a tiny model on the CPU: its rows, what it counts, and going on after a cut."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import GROUPS, MINUTES, all_names, measured, missing, of_models, read_results
from benchmarks.gpu_operations import COPY, MATMUL
from benchmarks.gpu_report import NOT_RUN, line_of, ratios, report, row_called
from benchmarks.gpu_workloads import (
    VALID_TEXT,
    Bench,
    Model,
    Models,
    Row,
    block_flops,
    extrapolated,
    make_inputs,
    our_transformer,
    row_flops,
    tokens_of,
)
from hunyuan_model.transformer.config import TransformerConfig
from networks.training.optim import optimizers

ROOT = Path(gpu.__file__).resolve().parent.parent
CPU = torch.device("cpu")
BENCH = Bench(CPU, tiny=True, steps=1)


def test_the_groups_fit_into_the_time_and_their_rows_have_names_of_their_own():
    assert sum(group.seconds for group in GROUPS) == 60 * MINUTES
    names = [name for rows in all_names(BENCH).values() for name in rows]
    assert len(set(names)) == len(names)
    rows = {name: row_called(name) for name in names}
    assert all(row.name == name for name, row in rows.items() if row is not None)
    assert {row.weights for row in rows.values() if row and row.short} == {"bf16", "fp8", "int8", "fp8_fast"}


def test_what_is_measured_are_the_published_sizes():
    whole, short = Bench(CPU).config(), Bench(CPU).config(short=True)
    assert whole == TransformerConfig() and (short.double_depth, short.single_depth) == (2, 4)
    assert [tokens_of(Bench(CPU).sizes[size]) for size in ("image", "clip33")] == [2100, 18420]
    # 3 s around blocks of 0.2 and 0.1 s
    depths = [3 + 0.2 * 1 + 0.1 * 2, 3 + 0.2 * 2 + 0.1 * 4, 3 + 0.2 * 20 + 0.1 * 40]
    assert extrapolated(depths[0], depths[1], Bench(CPU).times_short) == pytest.approx(depths[2])


def test_operations_are_those_of_the_layers():
    config = TransformerConfig(hidden_size=256, heads=2, mlp_size=1024, double_depth=1, single_depth=1)
    inputs = make_inputs(config, (64, 32, 5), CPU)
    counted = 0

    def count(linear: torch.nn.Linear, arguments: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal counted
        counted += 2 * arguments[0][..., 0].numel() * linear.weight.numel()

    model = our_transformer(Row(work="forward"), config, CPU)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "_blocks." in name and "mod" not in name:
            module.register_forward_hook(count)
    with torch.no_grad():
        model(**inputs)
    products, attention = block_flops(config, (64, 32, 5))
    tokens = 2 * 2 * 4 + VALID_TEXT
    assert products == counted
    assert attention == 2 * 2 * 2 * 2 * tokens**2 * config.head_dim  # blocks, heads, products, multiply and add
    done, kept = (row_flops(Row(keep=keep), config, (64, 32, 5))[1] for keep in (False, True))
    assert done - kept == attention


@pytest.mark.slow
@pytest.mark.parametrize("group", [group for group in GROUPS if group.name in ("hardware", "equality", "operations", "decode")])
def test_a_group_is_measured(group):
    results = {name: measured(measure) for name, measure in group.make(BENCH).items()}
    assert not {name: result for name, result in results.items() if "error" in result}
    assert all(result["agrees"] and result["to_the_bit"] for result in results.values() if "agrees" in result)
    skipped = {name for name, result in results.items() if "skipped" in result}
    assert all(name.startswith(("float8 product", "waits", "attention, cudnn", "attention, efficient", "new")) for name in skipped)
    if group.name == "hardware":
        assert results[MATMUL]["tflops"] > 0 and results[COPY]["to_device_gb_s"] > 0


def test_it_trains_with_the_optimizer_of_training(monkeypatch):
    monkeypatch.setattr(optimizers, "FUSED_DEVICES", ("cpu",))
    for who in ("ours", "diffusers"):
        model = Model(Row("image", short=True, who=who), BENCH.config(short=True), CPU)
        assert model._optimizer.defaults["fused"]


@pytest.mark.slow
def test_rows_of_one_model_use_it_again():
    rows = [Row("image", "int8", short=True), Row("clip33", "int8", short=True), Row("image", "int8", swap=40, offload=True)]
    models, used = Models(BENCH), []
    for row in rows:
        result = models.measure(row)
        used.append(models._model)
        assert result["done_tflops"] >= result["model_tflops"] > 0 and result["planned_gib"] > 0
        assert (result.keys() >= {"at_full_depth", "kernels", "top"}) == row.short
    assert used[0] is used[1] is not used[2]
    assert [len(blocks) for blocks in (used[0].transformer.double_blocks, used[0].transformer.single_blocks)] == [2, 4]
    with used[0].half_of_the_blocks():
        assert [len(blocks) for blocks in (used[0].transformer.double_blocks, used[0].transformer.single_blocks)] == [1, 2]


@pytest.mark.parametrize(
    "row",
    [
        Row("image", short=True, keep=True),
        pytest.param(Row("image", short=True, compile=True), marks=pytest.mark.slow),
        Row("image", short=True, work="forward"),
        pytest.param(Row("image", "fp8", short=True, who="diffusers"), marks=pytest.mark.slow),
    ],
    ids=lambda row: row.name,
)
def test_each_way_is_plugged_in(row):
    assert measured(of_models([row], BENCH)[row.name])["at_full_depth"]


def test_a_row_that_cannot_be_says_why():
    assert (
        "fp8_fast multiplies in float8"
        in measured(of_models([Row("image", "fp8_fast")], BENCH)["full, step, image, ours, fp8_fast"])["skipped"]
    )

    def fails(error: Exception) -> dict:
        raise error

    assert measured(lambda: fails(torch.OutOfMemoryError("CUDA out of memory."))) == {"error": "out of memory"}
    assert measured(lambda: fails(ModuleNotFoundError("no", name="peft"))) == {"skipped": "peft is not installed"}


def test_the_report():
    result = {
        "seconds": 2.0,
        "model_tflops": 500.0,
        "done_tflops": 700.0,
        "peak_gib": 6.0,
        "planned_gib": 5.4,
        "top": [["gemm", 1.5, 3]],
    }
    results = {MATMUL: {"tflops": 1000.0}, "versions": {"device": "GPU of a kind, 80 GiB"}, Row().name: result}
    assert "seconds 2, model tflops 500, done tflops 700, peak gib 6, planned gib 5.4, model 50% of matmul, done 70%" in line_of(
        Row().name, result, results
    )
    results |= {Row(who="diffusers").name: {"seconds": 3.0}, Row(compile=True).name: {"seconds": 1.0}}
    results |= {Row(weights="fp8_fast").name: {"seconds": 1.25}, Row(short=True).name: {"seconds": 0.2, "at_full_depth": 2.2}}
    # 20 swapped blocks of bfloat16 are more than 6 GB, which come twice but for those of two blocks.
    results |= {Row(swap=20).name: {"seconds": 3.0}, COPY: {"to_device_gb_s": 20.0}}
    found = list(ratios(results))
    assert "- full, step, clip33, ours, bf16: 1.50 times as fast as diffusers" in found
    assert "- full, step, clip33, ours, bf16, compile: 2.00 times as fast as without compile" in found
    assert "- full, step, clip33, ours, fp8_fast: 1.60 times as fast as bf16" in found
    assert "- full, step, clip33, ours, bf16: 2 s, extrapolated 2.2 s, 1.10 times that" in found
    assert "- full, step, clip33, ours, bf16: planned 0.90 times the peak" in found
    (swapped,) = (line for line in found if "swap 20" in line)
    assert swapped.startswith("- full, step, clip33, ours, bf16, swap 20: 1.50 times the larger of 2 s of computing, 0.")
    assert len(found) == 6
    text = report({"full": [Row().name, "another"]}, results)
    assert text.startswith("GPU: GPU of a kind, 80 GiB\n") and "| another | not run |" in text and "`gemm` 1.5 3" in text


@pytest.fixture
def run(monkeypatch, capsys):
    """``run(*flags)`` -> what the benchmark prints."""

    def call(*flags: object) -> str:
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--steps", "1", *map(str, flags)])
        capsys.readouterr()
        gpu.main()
        return capsys.readouterr().out

    return call


def write(path: Path, results: dict[str, dict]) -> None:
    path.write_text("".join(json.dumps({"name": name, "result": result}) + "\n" for name, result in results.items()))


def test_a_group_goes_on_with_what_is_missing_in_the_file(run, tmp_path):
    output, names = tmp_path / "gpu.jsonl", all_names(BENCH)["decode"]
    write(output, {names[0]: {"seconds": 1.0}, names[1]: NOT_RUN})
    with open(output, "a") as file:
        file.write('{"name": "cut o')
    printed = run("--tiny", "--output", output, "--group", "decode", "--group_seconds", 100)
    assert [name for name in names if f"| {name} |" in printed] == names[1:]
    assert list(read_results(output)) == names and not missing(names, read_results(output))
    assert read_results(output)[names[0]] == {"seconds": 1.0}
    assert f"| {names[1]} | seconds" in output.with_suffix(".md").read_text()


def test_processes_that_end_are_followed_by_others(run, tmp_path, monkeypatch):
    """One breaks down in the second row, one takes too long in the third."""
    output, names = tmp_path / "gpu.jsonl", all_names(BENCH)["decode"]
    runs = iter([(names[:1], 1), (names[2:2], None), (names[2:3], 0)])

    def process(command: list[str], timeout: float) -> subprocess.CompletedProcess:
        assert command[command.index("--group") + 1] == "decode" and 0 < timeout <= 60
        done, status = next(runs)
        for name in done:
            gpu.append(output, name, {"seconds": 1.0})
        if status:
            gpu.append(output, names[1], gpu.ENDED)
        elif status is None:
            gpu.append(output, names[2], gpu.ENDED)
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(gpu.subprocess, "run", process)
    write(output, {names[3]: {"seconds": 1.0}})
    run("--tiny", "--output", output, "--only", "decode", "--minutes", 1)
    assert not list(runs)
    results = read_results(output)
    assert results[names[0]] == results[names[2]] == {"seconds": 1.0} and missing(names, results) == [names[1]]


def test_the_time_that_is_given_is_kept(run, tmp_path):
    whole = sum(map(len, all_names(BENCH).values()))
    assert f"{whole - 1} rows were not run" in run("--tiny", "--output", tmp_path / "gpu.jsonl", "--minutes", 0)
    (line,) = (tmp_path / "gpu.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "versions"


def test_a_process_that_begins_no_row_is_not_started_for_ever(run, tmp_path, monkeypatch):
    commands = []

    def process(command: list[str], timeout: float) -> subprocess.CompletedProcess:
        assert len(commands) < 2, "once, and once in the end"
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(gpu.subprocess, "run", process)
    run("--tiny", "--output", tmp_path / "gpu.jsonl", "--only", "decode", "--minutes", 1)
    assert len(commands) == 2


def test_a_group_ends_with_the_process_that_waits_for_it(tmp_path, monkeypatch):
    parents = iter([7, 7, 1])
    monkeypatch.setattr(gpu.os, "getppid", lambda: next(parents))
    group = gpu.Group("one", 1, lambda bench: dict.fromkeys(("first", "second"), dict))
    gpu.measure_group(group, BENCH, tmp_path / "gpu.jsonl", float("inf"))
    assert read_results(tmp_path / "gpu.jsonl") == {"first": {}}


def test_a_damaged_file_gives_what_is_whole_in_it(tmp_path):
    path = tmp_path / "gpu.jsonl"
    assert read_results(path) == {}
    path.write_bytes(b"")
    assert read_results(path) == {}
    entry = json.dumps({"name": "a", "result": {"ms": 1.0}}).encode()
    path.write_bytes(
        b"\n".join([b"\xff\x00", b"7", b"null", b"{}", b"[]", b'{"name": 1, "result": {}}', entry, b'{"name": "b", "result": 2}'])
    )
    assert read_results(path) == {"a": {"ms": 1.0}}


def test_the_table_is_printed_where_there_is_no_gpu(run, tmp_path):
    write(tmp_path / "gpu.jsonl", {"versions": {"device": "GPU of a kind"}})
    assert "GPU: GPU of a kind\n" in run("--device", "cuda", "--report", "--output", tmp_path / "gpu.jsonl")


def test_results_of_a_rehearsal_do_not_stand_for_those_of_a_gpu(run, tmp_path, capsys):
    path = tmp_path / "gpu.jsonl"
    run("--tiny", "--output", path, "--minutes", 0)
    run("--tiny", "--output", path, "--minutes", 0)  # goes on
    write(path, read_results(path) | {"versions": {"device": "GPU of a kind"}})
    with pytest.raises(SystemExit, match="2"):
        run("--tiny", "--output", path, "--minutes", 0)
    assert "results of GPU of a kind: another device and model than here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "0"], "at least 1"),
        (["--minutes", "nan"], "finite"),
        (["--output", "gpu.md"], "replaced by the table"),
        (["--output", "."], "Is a directory"),
        (["--output", "gone/gpu.jsonl"], "gone/gpu.jsonl"),
        (["--output", "gone.jsonl", "--report"], "is no file"),
        (["--device", "gpu"], "use cpu, cuda"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_flags_that_cannot_be_are_a_sentence(flags, words, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run("--tiny", *flags)
    assert words in capsys.readouterr().err


def test_the_published_size_is_refused_on_the_cpu(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--output", tmp_path / "gpu.jsonl")
    assert "--tiny" in capsys.readouterr().err and not (tmp_path / "gpu.jsonl").exists()


FEW_PACKAGES = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {others}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
OTHERS = [
    "av",
    "voluptuous",
    "toml",
    "accelerate",
    "transformers",
    "diffusers",
    "peft",
    "bitsandbytes",
    "PIL",
    "cv2",
    "gguf",
    "lycoris",
    "psutil",
    "huggingface_hub",
]


def with_few_packages(code: str) -> str:
    """What Python prints where torch, einops, safetensors, tqdm and pytest are all there is."""
    command = [sys.executable, "-c", FEW_PACKAGES.format(others=OTHERS) + code]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_few_packages_suffice_for_the_benchmark():
    row, theirs = Row("image", short=True), Row("image", short=True, who="diffusers")
    printed = with_few_packages(
        "import torch; from benchmarks.gpu import *; torch.set_num_threads(1); bench = Bench(torch.device('cpu'), True, 1)\n"
        f"for name, measure in of_models([{row!r}, {theirs!r}], bench).items(): print(measured(measure))"
    ).splitlines()
    assert "at_full_depth" in printed[-2] and printed[-1] == "{'skipped': 'diffusers is not installed'}"


@pytest.mark.slow
def test_few_packages_suffice_for_the_tests_on_a_gpu():
    printed = with_few_packages("import pytest; pytest.main(['-m', 'gpu', '-rs', '--collect-only', '-p', 'no:cacheprovider'])")
    assert "test_block_swap.py" in printed and "test_shared_weights.py" in printed and "error" not in printed.lower()
    assert "test_training_step.py:0: needs 'accelerate'" in printed


@pytest.mark.slow  # each group has a process of its own
def test_the_rehearsal_measures_every_row(run, tmp_path):
    assert "\n0 rows were not run" in run("--tiny", "--output", tmp_path / "gpu.jsonl")
    assert not {name: result for name, result in read_results(tmp_path / "gpu.jsonl").items() if "error" in result}
