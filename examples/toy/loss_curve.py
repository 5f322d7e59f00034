"""Draw the loss that a training wrote with --loss_log: each step faint, their moving average bold.

python -m examples.toy.loss_curve --input quickstart_output/lora/zorp_loss.csv --output quickstart_output/loss_curve.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.cli.arguments import script_parser
from utils.errors import UserError, run_script
from utils.files import require_file, require_writable_folder
from utils.media_writing import save_picture

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 34, 44  # pixels around the plot
SUPERSAMPLING = 2  # drawn larger and shrunk, which smooths the lines
FONT_SIZE = 12
RAW, AVERAGE, GRID, TEXT = (186, 205, 232), (28, 84, 168), (230, 230, 230), (60, 60, 60)
MOST_TICKS = 6


def read_losses(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses of a --loss_log, both (N,) float64. A last line that was cut off is left out.

    Raises:
        UserError: there is no such file, it is no such log, or it holds no step.
    """
    require_file(path, "--input")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input {path} cannot be read as text ({error}); give a file that --loss_log wrote.") from error
    columns, *table = [line.split(",") for line in lines[:-1]] or [[]]  # what follows the last line break is half a line
    if "step" not in columns or "loss" not in columns:
        raise UserError(f"--input {path} has no columns step and loss; give a file that --loss_log wrote.")
    wanted = columns.index("step"), columns.index("loss")
    rows = []
    for number, row in enumerate(table, start=2):
        try:
            step, loss = (float(row[column]) for column in wanted)
        except (ValueError, IndexError):
            raise UserError(f"--input {path}, line {number} is no step of a --loss_log: {','.join(row)!r}.") from None
        if not math.isfinite(step):
            raise UserError(f"--input {path}, line {number} holds a step that is not finite: {','.join(row)!r}.")
        if math.isfinite(loss):  # training skips a step whose loss is not
            rows.append((step, loss))
    if not rows:
        raise UserError(f"--input {path} holds no step yet; draw it when training has made some.")
    steps, losses = np.array(rows).T
    return steps, losses


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and those before it, at most ``window`` of them: (N,) -> (N,)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def default_window(steps: int) -> int:
    """Wide enough to show the trend, narrow enough to show when it changes."""
    return max(1, min(50, steps // 8))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most ``MOST_TICKS`` of them."""
    span = high - low or 1.0
    scale = 10.0 ** math.floor(math.log10(span / MOST_TICKS))
    step = next(scale * factor for factor in (1, 2, 5, 10, 20) if span / (scale * factor) <= MOST_TICKS - 1)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def draw_curve(steps: np.ndarray, losses: np.ndarray, window: int) -> np.ndarray:
    """The curve over a grid with numbers at both axes: (HEIGHT, WIDTH, 3) uint8."""
    image = Image.new("RGB", (WIDTH * SUPERSAMPLING, HEIGHT * SUPERSAMPLING), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_SIZE * SUPERSAMPLING)
    first, last = float(steps[0]), max(float(steps[-1]), float(steps[0]) + 1)
    highest = float(losses.max()) * 1.03 or 1.0
    lowest = min(0.0, float(losses.min()))

    def place(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (loss - lowest) / (highest - lowest) * (HEIGHT - TOP - BOTTOM)
        return x * SUPERSAMPLING, y * SUPERSAMPLING

    def write(x: float, y: float, text: str, anchor: str) -> None:
        draw.text((x, y), text, fill=TEXT, font=font, anchor=anchor)

    gap = 6 * SUPERSAMPLING
    for loss in ticks(lowest, highest):
        (left, y), (right, _) = place(first, loss), place(last, loss)
        draw.line((left, y, right, y), fill=GRID, width=SUPERSAMPLING)
        write(left - gap, y, f"{loss:g}", "rm")
    for step in ticks(first, last):
        x, bottom = place(step, lowest)
        draw.line((x, bottom, x, TOP * SUPERSAMPLING), fill=GRID, width=SUPERSAMPLING)
        write(x, bottom + gap, f"{step:g}", "ma")
    for values, colour, width in ((losses, RAW, 1), (moving_average(losses, window), AVERAGE, 3)):
        points = [place(step, value) for step, value in zip(steps, values)]
        draw.line([*points, points[-1]], fill=colour, width=width * SUPERSAMPLING, joint="curve")
    title = f"loss of each step (faint) and the average of the last {window} (bold)"
    write(LEFT * SUPERSAMPLING, TOP / 2 * SUPERSAMPLING, title, "lm")
    write((LEFT + WIDTH - RIGHT) / 2 * SUPERSAMPLING, (HEIGHT - 6) * SUPERSAMPLING, "step", "ms")
    return np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.BOX))


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser("Draw the loss that a training wrote with --loss_log.")
    parser.add_argument("--input", type=Path, required=True, metavar="CSV", help="the file that --loss_log wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG", help="the picture to write")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    require_writable_folder(arguments.output.parent, "the folder of --output,")
    steps, losses = read_losses(arguments.input)
    save_picture(arguments.output, draw_curve(steps, losses, default_window(len(steps))))
    print(arguments.output)


if __name__ == "__main__":
    run_script(main)
