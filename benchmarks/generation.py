"""What one load for many prompts saves: a run with all of them against a run for each, on the toy model.

Runs of one prompt stand before and after the run of all, so that what else the machine does meets both; CPU seconds are beside the
wall clock for the same reason. The run of all also makes a contact sheet, whose pixels are memory of their own, for clips several
hundred MB inside the video encoder; ``--output_type latent`` makes none.

    python benchmarks/generation.py --threads 1
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.toy.model_files import require_model  # noqa: E402


@dataclass(frozen=True)
class Cost:
    """Of one process: seconds, CPU seconds, and bytes of memory at the peak."""

    wall: float
    cpu: float
    peak: int


def measured(command: list[str], threads: int | None) -> Cost:
    """Run a process to its end."""
    environment = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return Cost(time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def generation(folder: Path, size: int, frames: int, steps: int, output_type: str) -> list[str]:
    """The command without its prompts; the files go to ``folder``."""
    files = require_model()
    return [
        *(sys.executable, "hv_generate_video.py", "--dit", str(files.dit), "--vae", str(files.vae), "--device", "cpu"),
        *("--text_encoder1", str(files.text_encoder1), "--text_encoder2", str(files.text_encoder2)),
        *("--video_size", str(size), str(size), "--video_length", str(frames), "--infer_steps", str(steps), "--seed", "1"),
        *("--save_path", str(folder), "--output_type", output_type),
    ]


def compare(prompts: int, threads: int | None, rounds: int = 1, **video: int | str) -> tuple[list[Cost], list[Cost]]:
    """Costs of runs of one prompt and of runs of all prompts: in each round ``prompts`` of the former, and one of the latter in the
    middle of them."""
    texts = [f"{number} red balls" for number in range(prompts)]
    single, batch = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "prompts.txt").write_text("\n".join(texts), encoding="utf-8")
        command = generation(folder / "out", **video)
        for _ in range(rounds):
            for number, text in enumerate(texts):
                if number == prompts // 2:
                    batch.append(measured([*command, "--from_file", str(folder / "prompts.txt")], threads))
                single.append(measured([*command, "--prompt", text], threads))
    return single, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, help="that compute (default: as torch chooses)")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output_type", default="images", help="as of hv_generate_video.py")
    args = parser.parse_args()
    single, batch = compare(**vars(args))
    print(f"{args.prompts} prompts, {args.frames} frames of {args.size}x{args.size}, {args.steps} steps; {os.cpu_count()} cores")
    print("| | one run for each | one run for all | ratio |\n|---|---|---|---|")
    for name, unit in (("wall", "s"), ("cpu", "s of CPU")):
        each, together = (statistics.mean(getattr(cost, name) for cost in costs) for costs in (single, batch))
        each *= args.prompts
        print(f"| {unit} | {each:.1f} | {together:.1f} | {each / together:.1f} |")
    peaks = [max(cost.peak for cost in costs) / 1e6 for costs in (single, batch)]
    print(f"| MB at the peak | {peaks[0]:.0f} | {peaks[1]:.0f} | {peaks[1] / peaks[0]:.3f} |")


if __name__ == "__main__":
    main()
