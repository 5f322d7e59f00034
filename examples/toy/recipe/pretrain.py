"""Train the toy model from nothing: the text encoders, the VAE, then the transformer; two cores do it in an evening.

    python -m examples.toy.recipe.pretrain --output toy_pretraining
    python -m examples.toy.recipe.pretrain --output toy_pretraining --minutes 60     # stop after an hour; run again to continue

States and logs lie in the output folder, the finished model in its folder ``model``, laid out as the real one's files.
The README beside it says how the shipped weights came about.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from examples.toy.model_files import files_in, write_vae
from examples.toy.recipe import pretrain_text, pretrain_transformer, pretrain_vae
from examples.toy.recipe.training_loop import Run
from hunyuan_model import load_text_encoder_1, load_text_encoder_2, load_vae
from utils.cli.arguments import add_device_argument, positive_float, script_parser
from utils.devices import pick_device
from utils.errors import run_script
from utils.files import require_writable_folder
from utils.safetensors_io import save_tensors


class OutOfTime(Exception):
    """The minutes are over; everything is saved."""


class Pretraining:
    """The three stages. Each does nothing when what it makes is there already."""

    def __init__(self, output: Path, minutes: float, device: torch.device):
        self.output, self.device = output, device
        self.model = output / "model"
        self.files = files_in(self.model)
        self.ends = time.monotonic() + 60 * minutes

    def finish(self, run: Run) -> dict[str, torch.Tensor]:
        """Train to the end and return the averaged weights.

        Raises:
            OutOfTime: the end was not reached.
        """
        if not run.go(minutes=max(0.0, self.ends - time.monotonic()) / 60):
            raise OutOfTime(f"{run.name} stands at step {run.step} of {run.recipe.steps}")
        print(f"{run.name}: {run.step} steps in {run.seconds / 60:.0f} minutes, log in {run.log_path}", flush=True)
        return run.averaged()

    def vae(self) -> None:
        if (self.files.vae / "config.json").exists():
            return
        vae = pretrain_vae.new_vae().to(self.device)
        run = Run("vae", vae, pretrain_vae.RECIPE, pretrain_vae.VAELosses(vae), self.output)
        vae.load_state_dict(self.finish(run))
        pretrain_vae.normalise_latents(vae)
        write_vae(vae, self.files.vae, torch.float16)

    def text_encoders(self) -> None:
        if (self.files.text_encoder2 / "model.safetensors").exists():
            return
        tokenizers = pretrain_text.write_tokenizers(self.files.text_encoder1, self.files.text_encoder2)
        readers = pretrain_text.Readers(*tokenizers).to(self.device)
        run = Run("text", readers, pretrain_text.RECIPE, pretrain_text.ReadingLosses(readers, *tokenizers), self.output)
        readers.load_state_dict(self.finish(run))
        pretrain_text.write_encoders(readers, self.files.text_encoder1, self.files.text_encoder2)

    def transformer(self) -> None:
        if self.files.dit.exists():
            return
        placed = {"device": self.device, "dtype": torch.float32}
        vae = load_vae(self.files.vae, **placed)
        pool = pretrain_transformer.latent_pool(vae, self.output, self.check_time)
        llama = load_text_encoder_1(self.files.text_encoder1, **placed)
        clip = load_text_encoder_2(self.files.text_encoder2, **placed)
        transformer = pretrain_transformer.new_transformer().to(self.device)
        losses = pretrain_transformer.FlowLosses(transformer, pool, llama, clip)
        run = Run("transformer", transformer, pretrain_transformer.RECIPE, losses, self.output)
        weights = self.finish(run)
        save_tensors(self.files.dit, {name: value.bfloat16() for name, value in weights.items()})

    def check_time(self) -> None:
        """Raise OutOfTime when the minutes are over."""
        if time.monotonic() >= self.ends:
            raise OutOfTime("the clips for the transformer are being encoded")


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser("Train the toy model from nothing. Run again to continue.")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where states, logs and the model go")
    parser.add_argument(
        "--minutes",
        type=positive_float,
        default=math.inf,
        metavar="N",
        help="stop after about so many minutes, with everything saved (default: at the end)",
    )
    add_device_argument(parser)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    require_writable_folder(arguments.output, "--output")
    pretraining = Pretraining(arguments.output, arguments.minutes, pick_device(arguments.device))
    try:
        pretraining.text_encoders()
        pretraining.vae()
        pretraining.transformer()
    except OutOfTime as reached:
        print(f"{reached}; run the same command again to continue.")
        return
    print(f"The model is complete: {pretraining.model}")


if __name__ == "__main__":
    run_script(main)
