"""What the step cache of generation saves and costs, on the toy model: a Markdown table.

Every clip is sampled with all steps, then with ``--step_cache`` at several thresholds. "latents off" is the root mean square of the
difference to the latents of all steps, over that of these latents. Beside it stand the same computed steps with the last
velocity taken again instead of the line through the last two, and as many steps of a plain run, which is what one would do
without a cache.

    python benchmarks/step_cache.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.toy.scoring import held_out_prompts  # noqa: E402
from examples.toy.toy_model import FLOW_SHIFT, FRAMES, GUIDANCE, SIZE, ToyModel  # noqa: E402
from hunyuan_model.sampling.flow import flow_sigmas, initial_noise, latent_size, sample_latents  # noqa: E402
from hunyuan_model.sampling.step_cache import StepCache  # noqa: E402


class Repeating(StepCache):
    """Takes the last computed velocity again."""

    def _continued(self, t: Tensor) -> Tensor:
        return self._velocities[-1][1]


class Clip:
    """One clip of the toy model: its noise, its text, and its latents with all steps."""

    def __init__(self, model: ToyModel, prompt: str, seed: int, steps: int) -> None:
        self.model = model
        self.noise = initial_noise(latent_size(SIZE, SIZE, FRAMES), torch.Generator().manual_seed(seed))
        self.text = (*model.llama.encode([prompt]), model.clip.encode([prompt]))
        self.whole = self.draw(model.transformer, steps)

    def draw(self, network: Callable[..., Tensor], steps: int) -> Tensor:
        sigmas = flow_sigmas(steps, FLOW_SHIFT)
        return sample_latents(
            network,
            self.noise,
            *self.text,
            sigmas=sigmas,
            guidance_scale=GUIDANCE,
            device=self.model.device,
            dtype=self.model.dtype,
        )

    def off(self, network: Callable[..., Tensor], steps: int) -> float:
        """How far the latents of ``network`` are from those of all steps."""
        return ((self.draw(network, steps) - self.whole).norm() / self.whole.norm()).item()


def measure(clips: list[Clip], threshold: float, steps: int) -> str:
    """A row of the table."""
    transformer, computed, errors, repeated, fewer = clips[0].model.transformer, [], [], [], []
    seconds = {"whole": 0.0, "cached": 0.0}
    for clip in clips:
        cache, started = StepCache(transformer, steps, threshold), time.perf_counter()
        errors.append(clip.off(cache, steps))
        between = time.perf_counter()
        clip.draw(transformer, steps)
        seconds["cached"] += between - started
        seconds["whole"] += time.perf_counter() - between
        computed.append(len(cache.computed))
        repeated.append(clip.off(Repeating(transformer, steps, threshold), steps))
        fewer.append(clip.off(transformer, computed[-1]))
    cells = [
        f"{threshold:g}",
        f"{mean(computed):.1f} of {steps}",
        f"{seconds['cached'] / seconds['whole']:.2f}",
        *(f"{100 * value:.1f} %" for value in (mean(errors), max(errors), mean(repeated), mean(fewer))),
    ]
    return "| " + " | ".join(cells) + " |"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the step cache saves and costs, on the toy model.")
    parser.add_argument("--clips", type=int, default=8, metavar="N", help="held-out prompts (default: 8)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="sampling steps (default: 20)")
    parser.add_argument("--thresholds", type=float, nargs="+", default=(0.05, 0.1, 0.15, 0.2), metavar="T")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the transformer (default: float32)")
    args = parser.parse_args()
    model = ToyModel.load(dtype=getattr(torch, args.dtype))
    clips = [Clip(model, prompt.text, prompt.seed, args.steps) for prompt in held_out_prompts(args.clips, FRAMES, 0)]
    columns = ("threshold", "steps computed", "time", "latents off", "at most", "last velocity again", "as many plain steps")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for threshold in args.thresholds:
        print(measure(clips, threshold, args.steps), flush=True)
    print(f"\n{args.clips} clips, {args.dtype}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
