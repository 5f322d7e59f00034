"""What rows of flags measure: effects, and what they read of a run.

An effect is a function of two runs, with the flag and without it. Most hold for the first and not for the second.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import av
import numpy as np
import torch
from flag_runs import Effect, Refused, Run
from PIL import Image
from pytest import approx
from safetensors.torch import load_file

from dataset.cache.files import read_latents, read_text
from networks.formats.reading import read_lora
from utils.safetensors_io import read_header


def becomes(read: Callable[[Run], Any], expected: Any) -> Effect:
    """``read`` gives ``expected`` with the flag, and something else (or a refusal) without it."""

    def effect(run: Run, without: Run) -> None:
        found = read(run)
        assert found == expected, f"{found!r} is not {expected!r}"
        try:
            found_without = read(without)
        except Refused:
            return
        assert found_without != expected, f"it is {expected!r} without the flag as well"

    return effect


def refused(says: str) -> Effect:
    """Status 2 with a sentence that holds ``says``; without the flag the script works, or refuses something else."""

    def effect(run: Run, without: Run) -> None:
        assert run.ended.status == 2, "it is not refused"
        answer = run.ended.errors.strip().splitlines()[-1]
        assert says in answer and "Traceback" not in run.ended.errors, answer
        assert says not in without.ended.errors

    return effect


def works(run: Run, without: Run) -> None:
    """With the flag only."""
    assert run.done and without.ended.status == 2


def writes(pattern: str) -> Effect:
    """A file or folder in the run's folder is there with the flag only."""
    return becomes(lambda run: bool(run.done and any(run.out.glob(pattern))), True)


def removes(pattern: str) -> Effect:
    """A file or folder in the run's folder is there without the flag only."""
    return becomes(lambda run: bool(run.done and any(run.out.glob(pattern))), False)


def prints(text: str) -> Effect:
    """On stdout, with the flag only."""
    return becomes(lambda run: text in run.done.output, True)


def logs(text: str) -> Effect:
    """With the flag only."""
    return becomes(lambda run: text in run.done.log, True)


def counts_other_tokens(encoder: int) -> Effect:
    """On the page of a preview, for that encoder alone."""

    def counts(run: Run) -> list[list[str]]:
        assert run.done
        page = run.file("cache/debug/preview.html").read_text(encoding="utf-8")
        return [re.findall(rf"text encoder {number}\">(\d+) of", page) for number in (1, 2)]

    def effect(run: Run, without: Run) -> None:
        differ = [one != other for one, other in zip(counts(run), counts(without), strict=True)]
        assert differ == [encoder == 1, encoder == 2]

    return effect


def both(*effects: Effect) -> Effect:
    def effect(run: Run, without: Run) -> None:
        for one in effects:
            one(run, without)

    return effect


Values = Callable[[Run], dict[str, Any]]


def differs(read: Values, *, by_at_most: float | None = None) -> Effect:
    """The same tensors with other values; ``by_at_most`` as a share of their norm."""

    def effect(run: Run, without: Run) -> None:
        changed, plain = flat(read(run)), flat(read(without))
        assert changed.shape == plain.shape and torch.isfinite(changed).all()
        share = ((changed - plain).norm() / plain.norm()).item()
        assert share > 1e-6, "nothing changes"
        assert by_at_most is None or share <= by_at_most, f"the difference is {share:g} of the norm"

    return effect


def stays(read: Values, *, within: float = 0.0) -> Effect:
    """The same tensors to the bit, or with differences up to ``within``."""

    def effect(run: Run, without: Run) -> None:
        changed, plain = read(run), read(without)
        assert plain and changed.keys() == plain.keys()
        assert all(torch.as_tensor(changed[name]).shape == torch.as_tensor(plain[name]).shape for name in plain)
        difference = (flat(changed) - flat(plain)).abs().max().item()
        assert difference <= within, f"values differ by up to {difference:g}"

    return effect


def as_without_any(read: Values) -> Effect:
    """The same as in a run without any flag, but not as in the run without this one."""

    def effect(run: Run, without: Run) -> None:
        stays(read)(run, run.bench.run(""))
        differs(read)(run, without)

    return effect


def flat(values: dict[str, Any]) -> torch.Tensor:
    return torch.cat([torch.as_tensor(values[name]).double().flatten() for name in sorted(values)])


# What several scripts have


def seen(name: str) -> Callable[[Run], Any]:
    """A field of what was seen."""
    return lambda run: getattr(run.done.seen, name)


def computes_in(dtype: torch.dtype, *parts: str) -> Effect:
    """All weights of these parts of the model."""
    return both(*(becomes(lambda run, part=part: run.done.seen.weights[part], {dtype}) for part in parts))


def keeps_float8(part: str) -> Effect:
    """Some weights of a part of the model."""
    return becomes(lambda run: torch.float8_e4m3fn in run.done.seen.weights[part], True)


def keeps_int8(part: str) -> Effect:
    """Some weights of a part of the model are whole numbers, with scales beside them."""
    return becomes(lambda run: torch.int8 in run.done.seen.weights[part] and part in run.done.seen.scaled, True)


def keeps_scaled_float8(part: str) -> Effect:
    """Some weights of a part of the model have scales beside them."""
    return becomes(lambda run: torch.float8_e4m3fn in run.done.seen.weights[part] and part in run.done.seen.scaled, True)


def metadata(key: str, pattern: str) -> Callable[[Run], str | None]:
    """A key of the metadata of a safetensors file."""
    return lambda run: read_header(run.file(pattern)).metadata.get(key)


def picture(run: Run, pattern: str) -> dict[str, np.ndarray]:
    with Image.open(run.file(pattern)) as image:
        return {"pixels": np.asarray(image.convert("RGB")).astype(int)}


def swaps(*parts: str) -> Effect:
    """These parts of the transformer, and no others, have their weights in one piece of host memory."""
    return becomes(seen("in_one_piece"), set(parts))


def splits(run: Run) -> bool:
    """Whether an attention was to go sample by sample."""
    return True in run.done.seen.split


def narrower(run: Run, without: Run) -> None:
    """The VAE's convolutions see what 8 columns depend on at once, twice as many columns where they halve them."""
    assert run.done.seen.widest <= 18 < without.done.seen.widest


# Of training


def lora(run: Run) -> dict[str, torch.Tensor]:
    return run.tensors("lora.safetensors")


def about(key: str) -> Callable[[Run], str | None]:
    return metadata(key, "lora.safetensors")


def ranks(run: Run) -> set[int]:
    return {len(value) for name, value in lora(run).items() if name.endswith("lora_down.weight")}


def alphas(run: Run) -> set[float]:
    return {value.item() for name, value in lora(run).items() if name.endswith("alpha")}


def lora_dtypes(run: Run) -> set[torch.dtype]:
    return {value.dtype for name, value in lora(run).items() if name.endswith("weight")}


def lora_layout(run: Run) -> str:
    return read_lora(run.file("lora.safetensors")).layout


def blocks(run: Run) -> set[str]:
    return {"_".join(name.split("_")[2:4]) for name in lora(run)}


def length_of_first_step(run: Run) -> float:
    """Of the matrices that begin at zero, the only ones with a gradient then."""
    return torch.cat([value.flatten() for name, value in lora(run).items() if name.endswith("lora_up.weight")]).norm().item()


def largest_update(run: Run) -> float:
    tensors = lora(run)
    modules = [name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")]
    factors = [[tensors[f"{module}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha")] for module in modules]
    return max((up @ down * alpha / len(down)).norm().item() for up, down, alpha in factors)


def begins_with_the_file(run: Run, without: Run) -> None:
    """A training that learns almost nothing saves almost what it was given."""
    given = load_file(run.bench.places["data"] / "rank3.safetensors")
    for trained, same in ((run, True), (without, False)):
        found = lora(trained)
        assert found.keys() == given.keys()
        assert all(torch.allclose(found[name], given[name], atol=1e-6) for name in given) is same


def numbers(pattern: str) -> Callable[[Run], list[int]]:
    """In the names of the files and folders that are left."""

    def read(run: Run) -> list[int]:
        assert run.done
        return sorted(int(re.search(r"\d+", path.name)[0]) for path in run.out.glob(pattern))

    return read


def column(name: str, kind: Callable[[str], Any] = str) -> Callable[[Run], list[Any]]:
    """A column of the loss log."""

    def read(run: Run) -> list[Any]:
        with open(run.file("loss.csv"), encoding="utf-8", newline="") as file:
            return [kind(line[name]) for line in csv.DictReader(file)]

    return read


def rates(*expected: float) -> Effect:
    """Learning rates of the steps."""
    return becomes(column("learning_rate", float), approx(list(expected), rel=1e-3))


def quantile(share: float, expected: float) -> Effect:
    """Of the timesteps t in [0, 1] that the run's sampler gives."""
    return becomes(lambda run: run.done.seen.sampler.sample(1 << 16).quantile(share).item(), approx(expected, abs=0.01))


def every_four_cover_the_range(run: Run) -> bool:
    sampler = run.done.seen.sampler
    sampler.sample(-len(run.done.seen.timesteps) % 4)  # to the end of four
    quarters = (4 * sampler.sample(4000)).floor().view(-1, 4).sort(dim=1).values
    return bool((quarters == torch.arange(4)).all())


def trains_whole_timesteps(run: Run) -> bool:
    return all(abs(t - round(t)) < 1e-3 for t in run.done.seen.timesteps)


def trains_timesteps_in(low: float, high: float) -> Effect:
    return becomes(lambda run: all(low <= t <= high for t in run.done.seen.timesteps), True)


def sample(run: Run) -> dict[str, Any]:
    return picture(run, "sample/*.png")


def logged_steps(run: Run) -> list[int]:
    return [step for writer in run.done.seen.writers for name, _, step in writer.scalars if name == "loss/current"]


def asked_of_the_hub(method: str, argument: str) -> Callable[[Run], list[Any]]:
    return lambda run: [options[argument] for name, options in run.done.seen.hub if name == method]


def told_to_wandb(name: str) -> Callable[[Run], Any]:
    return lambda run: run.done.seen.wandb.get(name)


def is_nowhere(secret: str) -> Effect:
    def effect(run: Run, without: Run) -> None:
        files = [path for path in run.out.rglob("*") if path.is_file()]
        assert files and not any(secret.encode() in path.read_bytes() for path in files)
        assert secret not in repr(run.done).replace(f"'key': '{secret}'", "").replace(f"'token': '{secret}'", "")

    return effect


def process_timeout(run: Run) -> list[timedelta]:
    return [handler.timeout for handler in run.done.seen.handlers]


def begins_with_a_dry_step(run: Run, without: Run) -> None:
    """The timesteps of the run begin with those of a batch more, all in the middle; the others are the same."""
    told, plain = run.done.seen.timesteps, without.done.seen.timesteps
    more = len(told) - len(plain)
    assert more > 0 and told == [500.0] * more + plain


def half_the_memory(run: Run, without: Run) -> None:
    assert 0 < run.done.seen.saved_bytes < without.done.seen.saved_bytes / 2


def offloads(run: Run, without: Run) -> None:
    """Activations go to host memory, and autograd keeps as much less."""
    assert without.done.seen.offloaded == 0 < run.done.seen.offloaded
    assert run.done.seen.saved_bytes <= without.done.seen.saved_bytes - run.done.seen.offloaded


# Of the caching scripts


def latents(run: Run) -> dict[str, torch.Tensor]:
    """Of the two pictures."""
    assert run.done
    return {stem: read_latents(run.out / "cache" / f"{stem}_0288x0064_hv.safetensors") for stem in "ab"}


def states(run: Run) -> dict[str, torch.Tensor]:
    """Of text encoder 1, for the two captions."""
    assert run.done
    return {stem: read_text(run.out / "cache" / f"{stem}_hv_te.safetensors").llm for stem in "ab"}


def pooled(run: Run) -> dict[str, torch.Tensor]:
    """Of text encoder 2."""
    assert run.done
    return {stem: read_text(run.out / "cache" / f"{stem}_hv_te.safetensors").clip for stem in "ab"}


def dtypes(read: Callable[[Run], dict[str, torch.Tensor]]) -> Callable[[Run], set[torch.dtype]]:
    return lambda run: {tensor.dtype for tensor in read(run).values()}


def warns_of_the_cpu(run: Run) -> bool:
    return "torch finds no CUDA device" in run.done.log


def columns(run: Run) -> set[int]:
    """Of what is drawn in the terminal."""
    return {line.count("▀") for line in run.done.output.splitlines() if "▀" in line}


# Of generation


def latent(run: Run) -> dict[str, torch.Tensor]:
    return run.tensors("*_latent.safetensors")


def shape(run: Run) -> tuple[int, ...]:
    """Of the latent: channels, frames, height and width over 8."""
    return tuple(latent(run)["latent"].shape)


def computed_steps(run: Run) -> int:
    """How often the transformer computed."""
    return len(run.done.seen.timesteps)


def samples_nothing_more(run: Run, without: Run) -> None:
    """After the run without the flag."""
    assert without.done and run.done.seen.timesteps == []


def setting(key: str) -> Callable[[Run], str | None]:
    return metadata(key, "*_latent.safetensors")


def frame(run: Run) -> dict[str, np.ndarray]:
    return picture(run, "*/00000.png")


def frames_per_second(run: Run) -> int:
    with av.open(str(run.file("*.mp4"))) as container:
        return int(container.streams.video[0].average_rate)


def holds_prompt(run: Run) -> bool:
    with Image.open(run.file("*/00000.png")) as image:
        return "prompt" in image.text
