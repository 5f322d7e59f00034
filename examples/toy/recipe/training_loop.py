"""One optimization run that can be stopped at any moment and continued as if it had not been."""

from __future__ import annotations

import csv
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from examples.toy.recipe.muon import Muon
from utils.errors import UserError
from utils.files import atomic_path
from utils.progress import ProgressBar

SAVE_EVERY_SECONDS = 60
LOG_EVERY_STEPS = 25
FALL = 1 / 3  # of all steps, at their end

Losses = dict[str, torch.Tensor]
"""Named scalars of one step; ``loss`` is the one to minimise, the others are logged."""


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to optimize.

    Attributes:
        learning_rate: of AdamW, at its highest.
        muon_rate: of Muon, for matrices and kernels; 0 leaves these to AdamW too.
        muon_parts: a pattern for the names of the parameters that Muon may have.
        earlier_ends: steps at which the run had ended before it was given more: the rates fell to nothing there, and rose again.
    """

    steps: int
    learning_rate: float
    muon_rate: float = 0.0
    muon_parts: str = ""
    warm_up: int = 200
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    earlier_ends: tuple[int, ...] = ()

    def pace(self, step: int) -> float:
        """What learning rates are multiplied by: a linear warm-up to 1, and for the last third a linear fall to nothing.

        Until the fall begins a longer run is the same run, so ``steps`` can be raised while one is under way. Steps between
        two ends are a run of their own, but begin at 1.
        """
        end = next(end for end in (*self.earlier_ends, self.steps) if step < end)
        start = max((earlier for earlier in self.earlier_ends if earlier <= step), default=0)
        rising, falling = (step + 1) / self.warm_up, (end - step) / ((end - start) * FALL)
        return min(1.0, rising, falling)

    def ema_weight(self, step: int) -> float:
        """What the running average keeps of itself: less at first, when the weights still move far."""
        return min(self.ema_decay, (step + 1) / (step + 10))


class Run:
    """Optimizes ``module`` and keeps an average of its weights; everything needed to resume lies in ``folder``.

    Args:
        name: of the files ``{name}.pt`` (state) and ``{name}.csv`` (log).
        module: trained in place; on the device it shall be trained on.
        losses: the losses of a step, given its number; its random numbers must depend on nothing but that number.
    """

    def __init__(self, name: str, module: nn.Module, recipe: Recipe, losses: Callable[[int], Losses], folder: Path):
        self.name, self.module, self.recipe, self.losses = name, module, recipe, losses
        self.state_path, self.log_path = folder / f"{name}.pt", folder / f"{name}.csv"
        folder.mkdir(parents=True, exist_ok=True)
        self.optimizers = _optimizers(module, recipe)
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.average = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        if self.state_path.exists():
            self._load()

    @property
    def finished(self) -> bool:
        return self.step >= self.recipe.steps

    def go(self, minutes: float = math.inf) -> bool:
        """Train until the last step or for ``minutes``, whichever comes first, and save; whether the last step was made.

        An interrupted run (Ctrl-C) saves, too.
        """
        started, saved, before = time.monotonic(), time.monotonic(), self.seconds
        since_log: list[dict[str, float]] = []
        bar = ProgressBar(total=self.recipe.steps, initial=self.step, desc=self.name, unit="step", smoothing=0.05)
        try:
            while not self.finished and time.monotonic() - started < 60 * minutes:
                since_log.append(self._one_step())
                self.seconds = before + time.monotonic() - started
                bar.update()
                if self.step % LOG_EVERY_STEPS == 0:
                    means = {key: sum(values[key] for values in since_log) / len(since_log) for key in since_log[0]}
                    self._log(means)
                    bar.set_postfix({key: f"{value:.4g}" for key, value in means.items()})
                    since_log = []
                if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                    self._save()
                    saved = time.monotonic()
        except FloatingPointError:
            raise  # what stands in memory is no state to resume from
        except BaseException:
            self._save()
            raise
        finally:
            bar.close()
        self._save()
        return self.finished

    def averaged(self) -> dict[str, torch.Tensor]:
        """The averaged weights, as a state dict."""
        return {name: value.clone() for name, value in self.average.items()}

    def _one_step(self) -> dict[str, float]:
        for optimizer, rates in zip(self.optimizers, self.rates):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * self.recipe.pace(self.step)
        losses = self.losses(self.step)
        if not torch.isfinite(losses["loss"]):
            raise FloatingPointError(f"{self.name}: the loss of step {self.step} is {losses['loss'].item()}")
        self.module.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.recipe.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        keep = self.recipe.ema_weight(self.step)
        with torch.no_grad():
            names = list(self.average)
            now = self.module.state_dict()
            torch._foreach_lerp_([self.average[name] for name in names], [now[name] for name in names], 1.0 - keep)
        self.step += 1
        return {**{key: value.item() for key, value in losses.items()}, "grad_norm": norm.item()}

    def _log(self, values: dict[str, float]) -> None:
        new = not self.log_path.exists()
        with self.log_path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(["step", "seconds", *values])
            writer.writerow([self.step, round(self.seconds, 1), *(f"{value:.6g}" for value in values.values())])

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "recipe": self._fixed_recipe(),
            "module": self.module.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        with atomic_path(self.state_path) as temporary:
            torch.save(state, temporary)

    def _load(self) -> None:
        device = next(self.module.parameters()).device
        state = torch.load(self.state_path, map_location=device, weights_only=True)
        if state["recipe"] != self._fixed_recipe():
            raise UserError(
                f"{self.state_path} belongs to a run with other settings ({state['recipe']}, now {self._fixed_recipe()}). "
                "Give another output folder, or delete that file to start over."
            )
        self.module.load_state_dict(state["module"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]
        self._forget_log_after(self.step)

    def _fixed_recipe(self) -> dict[str, float | str]:
        """What must stay as it is while a run is under way: all but where it ends."""
        return {key: value for key, value in asdict(self.recipe).items() if key not in ("steps", "earlier_ends")}

    def _forget_log_after(self, step: int) -> None:
        """Drop the lines of steps that were made but not saved: they are made, and logged, again."""
        if not self.log_path.exists():
            return
        heading, *lines = self.log_path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.split(",")[0].isdigit() and int(line.split(",")[0]) <= step]
        with atomic_path(self.log_path) as temporary:
            temporary.write_text("\n".join([heading, *kept]) + "\n", encoding="utf-8")


def _optimizers(module: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon before it where the recipe has a rate for it. Only matrices and kernels decay."""
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "weights": [], "vectors": []}
    for name, parameter in module.named_parameters():
        of_muon = recipe.muon_rate > 0 and re.search(recipe.muon_parts, name)
        groups["vectors" if parameter.ndim <= 1 else "muon" if of_muon else "weights"].append(parameter)
    decays = [(groups["weights"], recipe.weight_decay), (groups["vectors"], 0.0)]
    adam = torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in decays if group],
        lr=recipe.learning_rate,
        betas=(0.9, 0.99),
        fused=True,
    )
    return [Muon(groups["muon"], recipe.muon_rate, weight_decay=recipe.weight_decay), adam] if groups["muon"] else [adam]
