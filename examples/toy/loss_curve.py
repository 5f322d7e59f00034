"""Plot the loss that a training wrote with --loss_log: each step faint, a moving average bold.

python -m examples.toy.loss_curve --input quickstart_output/lora/zorp_loss.csv --output quickstart_output/loss_curve.png
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils.cli.arguments import script_parser
from utils.errors import UserError, run_script
from utils.files import atomic_path, require_file, require_writable_folder

LARGEST_WINDOW = 50  # steps of the moving average


def read_losses(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses of a --loss_log, both (N,) float64, without an incomplete last line and losses that are not finite.

    Raises:
        UserError: there is no such file, it is no loss log, or it holds no step.
    """
    require_file(path, "--input")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input {path} cannot be read as text ({error}); give a file that --loss_log wrote.") from error
    table = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    if not {"step", "loss"} <= set(table.fieldnames or ()):
        raise UserError(f"--input {path} has no columns step and loss; give a file that --loss_log wrote.")
    rows = []
    for row in table:
        try:
            step, loss = int(row["step"]), float(row["loss"])
        except (TypeError, ValueError):
            raise UserError(f"--input {path}, line {table.line_num} is no step of a --loss_log: {row}.") from None
        if math.isfinite(loss):
            rows.append((step, loss))
    if not rows:
        raise UserError(f"--input {path} holds no step yet; plot it when training has made some.")
    steps, losses = np.array(rows, np.float64).T
    return steps, losses


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and those before it, at most ``window`` of them: (N,) -> (N,)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_losses(steps: np.ndarray, losses: np.ndarray) -> Figure:
    """The losses (N,) over their steps (N,), with a moving average."""
    window = max(1, min(LARGEST_WINDOW, len(steps) // 8))
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=0.8, marker="." if len(steps) == 1 else "", label="each step")
    axes.plot(steps, moving_average(losses, window), color="tab:blue", linewidth=2, label=f"average of the last {window}")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser("Plot the loss that a training wrote with --loss_log.")
    parser.add_argument("--input", type=Path, required=True, metavar="CSV", help="the file that --loss_log wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG", help="the picture to write")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    require_writable_folder(arguments.output.parent, "the folder of --output,")
    figure = plot_losses(*read_losses(arguments.input))
    with atomic_path(arguments.output) as temporary:
        figure.savefig(temporary, format="png")
    print(arguments.output)


if __name__ == "__main__":
    run_script(main)
