"""What a second process brings: items a second of whole commands with one process and with several, as a Markdown table.

The toy model caches pictures and clips that are drawn for it, and trains on them, each process with one thread of the CPU. A run of
few items is taken off the long one: what is left has no start of processes, imports and loading in it. Between the runs of one
process and of several nothing else changes; they alternate, and medians count. CPU seconds are those of all processes: where they
grow, the processes disturb each other, or something else runs on the machine.

    python benchmarks/processes.py [--processes 2] [--runs 3] [latents texts training]
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.toy import world  # noqa: E402
from examples.toy.model_files import require_model  # noqa: E402
from utils.media.writing import save_picture, save_video  # noqa: E402

TOY = ROOT / "examples" / "toy"
SIDE = 256  # of pictures and clips, in pixels
ENCODERS = ("--text_encoder1", TOY / "text_encoder", "--text_encoder2", TOY / "text_encoder_2")


class Time(NamedTuple):
    """Seconds of the wall's clock, and of the CPU in all processes."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Work:
    """A command that is measured: it handles ``items``, or in the short run ``few`` of them.

    Attributes:
        prepare: makes what the command reads, for so many items in a folder; returns its flags.
        again: undoes a run in that folder.
    """

    script: str
    items: int
    few: int
    prepare: Callable[[Path, int], list[object]]
    again: Callable[[Path], None]


def draw_dataset(folder: Path, items: int, clips: bool) -> Path:
    """So many pictures, or clips of 9 frames, with captions of different lengths; returns the TOML."""
    rng = world.generator(7)
    (folder / "media").mkdir(parents=True)
    for number in range(items):
        scene = world.random_attributes(rng, moving=clips)
        frames = world.draw(world.place(scene, 9 if clips else 1, rng))
        frames = np.kron(frames, np.ones((1, SIDE // frames.shape[1], SIDE // frames.shape[2], 1), np.uint8))
        path = folder / "media" / f"{number:05d}"
        if clips:
            save_video(path.with_suffix(".mp4"), frames, 24)
        else:
            save_picture(path.with_suffix(".png"), frames[0])
        texts = [world.caption(scene, rng) for _ in range(1 + number % 4)]
        path.with_suffix(".txt").write_text(". ".join(texts), encoding="utf-8")
    toml, kind = folder / "dataset.toml", "video" if clips else "image"
    lines = [f"{kind}_directory = '{folder / 'media'}'", f"cache_directory = '{folder / 'cache'}'", f"resolution = {SIDE}"]
    lines += ["target_frames = [9]"] if clips else []
    toml.write_text("[[datasets]]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return toml


def forget_caches(folder: Path) -> None:
    for path in (folder / "cache").glob("*.safetensors"):
        path.unlink()


def latents(folder: Path, items: int) -> list[object]:
    return [
        "--dataset_config",
        draw_dataset(folder, items, clips=True),
        "--vae",
        TOY / "vae",
        "--device",
        "cpu",
        "--num_workers",
        1,
    ]


def texts(folder: Path, items: int) -> list[object]:
    return ["--dataset_config", draw_dataset(folder, items, clips=False), *ENCODERS, "--device", "cpu", "--num_workers", 1]


def training(folder: Path, items: int) -> list[object]:
    """One epoch over the caches of so many clips."""
    flags = latents(folder, items)
    run("cache_latents.py", flags, 1)
    run("cache_text_encoder_outputs.py", [*flags[:2], *ENCODERS, "--device", "cpu", "--num_workers", 1], 1)
    model = ("--dit", require_model().dit, "--network_dim", 16, "--learning_rate", 1e-3, "--gradient_checkpointing")
    loop = ("--max_train_epochs", 1, "--max_data_loader_n_workers", 0, "--seed", 1)
    return [*flags[:2], *model, *loop, "--output_dir", folder / "out", "--output_name", "lora"]


def forget_network(folder: Path) -> None:
    shutil.rmtree(folder / "out", ignore_errors=True)


WORKS = {
    "latents": Work("cache_latents.py", 128, 8, latents, forget_caches),
    "texts": Work("cache_text_encoder_outputs.py", 2000, 16, texts, forget_caches),
    "training": Work("hv_train_network.py", 128, 8, training, forget_network),
}


def run(script: str, flags: list[object], processes: int) -> Time:
    """A whole command; several processes are started by accelerate."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes, "--num_machines", 1]
    launcher += ["--main_process_port", 0, "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, *(launcher if processes > 1 else []), ROOT / script, *flags]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run([str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        sys.exit(ended.stderr)
    return Time(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def measure(work: Work, processes: int, runs: int, folder: Path) -> dict[int, Time]:
    """Medians by the number of processes, without the start."""
    flags = {items: work.prepare(folder / str(items), items) for items in (work.few, work.items)}
    times: dict[tuple[int, int], list[Time]] = {}
    for _ in range(runs):
        for count in (1, processes):
            for items in (work.few, work.items):
                work.again(folder / str(items))
                times.setdefault((count, items), []).append(run(work.script, flags[items], count))

    def median(count: int, items: int, part: int) -> float:
        return statistics.median(each[part] for each in times[count, items])

    return {
        count: Time(*(median(count, work.items, part) - median(count, work.few, part) for part in (0, 1)))
        for count in (1, processes)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", default=list(WORKS), help=f"of {', '.join(WORKS)}")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    print("| work | items | processes | seconds | CPU seconds | items a second | of one process |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in arguments.works:
        work = WORKS[name]
        with tempfile.TemporaryDirectory() as folder:
            times = measure(work, arguments.processes, arguments.runs, Path(folder))
        items = work.items - work.few
        for count, (wall, cpu) in times.items():
            gain = times[1].wall / wall
            print(f"| {name} | {items} | {count} | {wall:.1f} | {cpu:.1f} | {items / wall:.1f} | {gain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
