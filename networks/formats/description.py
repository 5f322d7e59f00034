"""What a LoRA file is, and where it can be used: the facts behind ``convert_lora.py --check``, as one object and as text."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_model.checkpoints.loading import true_value
from hunyuan_model.checkpoints.reading import Checkpoint
from hunyuan_model.runtime.loading import open_transformer
from networks.formats.clients import CLIENTS, HIDDEN, Client, Match, Verdict, count, match, transformer_keys
from networks.formats.layouts import LAYOUTS
from networks.formats.other_models import model_by_metadata, model_itself
from networks.formats.reading import LoraFile, fit_to_model, lora_path, read_lora
from networks.formats.updates import DoRA, LowRank, Replacement, Update
from networks.formats.writing import to_layout
from utils.errors import UserError, shown
from utils.processes.command_line import command_line
from utils.safetensors_io import read_tensors

THIS_PROJECT = "this project"
METADATA = (
    "modelspec.title",
    "modelspec.author",
    "modelspec.date",
    "modelspec.architecture",
    "ss_network_module",
    "ss_sd_model_name",
    "ss_base_model_version",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_steps",
    "ss_epoch",
)


@dataclass(frozen=True)
class Program:
    """What one program loads of the file, and how to make the file that it needs.

    ``target`` is the layout to convert to, ``command`` the command for the shell; None where the file is right already, or where
    no layout helps.
    """

    name: str
    verdict: str
    keys: int
    of_keys: int
    modules: int
    of_modules: int
    reason: str
    target: str | None = None
    command: str | None = None


@dataclass(frozen=True)
class Description:
    """The facts of a file, also what ``--json`` prints.

    Attributes:
        is_lora: whether this project reads it, or a part of it.
        problem: why not, or what it is instead.
        layout, layout_title: name in ``LAYOUTS`` and whose it is; None if it is no LoRA.
        kinds, dtypes: of its updates and tensors.
        metadata: who made it, with what.
        ranks, alphas: all that occur.
        scale: smallest and largest alpha / rank.
        modules: number of updated modules.
        groups: group of blocks -> kind of layer -> number of modules.
        norms: group -> Frobenius norm of all its updates ("update"), of the weights that they change ("weight"), and their ratio
            ("relative"); empty unless asked for, None for what is not known.
        model: "file", "fits" and "problem" of the transformer compared with; None if none was.
        left_out: keys of text encoders and embeddings.
        unknown: keys that match nothing in the transformer.
        notes: what seems odd.
        programs: where it can be used.
    """

    file: str
    bytes: int
    is_lora: bool
    problem: str | None = None
    layout: str | None = None
    layout_title: str | None = None
    kinds: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    scale: tuple[float, float] | None = None
    modules: int = 0
    groups: dict[str, dict[str, int]] = field(default_factory=dict)
    norms: dict[str, dict[str, float | None]] = field(default_factory=dict)
    model: dict[str, object] | None = None
    left_out: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    programs: tuple[Program, ...] = ()

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def describe(path: str | os.PathLike[str], dit: str | os.PathLike[str] | None = None, *, norms: bool = False) -> Description:
    """What the file is. Reads its header and alphas; with ``norms`` also the tensors, and the weights of ``dit`` that it changes.

    Raises:
        UserError: it is no whole safetensors file; ``dit`` is no transformer that can be read.
    """
    file = lora_path(path)
    stored = read_tensors(file, "LoRA file", lambda name: False)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.tensors.items()}
    facts = Description(
        str(path),
        os.path.getsize(file),
        False,
        dtypes=_named(tensor.dtype for tensor in stored.tensors.values()),
        metadata={key: stored.metadata[key] for key in METADATA if key in stored.metadata},
    )
    checkpoint = open_transformer(dit, "--dit")[0] if dit is not None else None
    try:
        lora = read_lora(path, partial=True, values=False)
    except UserError as error:
        model = model_itself(shapes)
        programs = [] if model else [_program(client.title, match(client, shapes)) for client in CLIENTS]
        if programs:
            programs.append(replace(programs[0], name=THIS_PROJECT, verdict=Verdict.ERROR.value, keys=0, modules=0, reason=""))
        problem = f"it looks like {model.text}, not like a LoRA" if model else str(error)
        return replace(facts, problem=problem, programs=tuple(programs))
    unknown = transformer_keys(lora.left_out)
    ranks = [placed.update.rank for placed in lora.updates if placed.update.rank is not None]
    alphas = [alpha for placed in lora.updates if (alpha := _alpha(placed.update)) is not None]
    scales = [placed.update.scale for placed in lora.updates if placed.update.rank is not None]
    return replace(
        facts,
        is_lora=True,
        layout=lora.layout,
        layout_title=LAYOUTS[lora.layout].title,
        kinds=tuple(sorted(lora.kinds)),
        ranks=tuple(sorted(set(ranks))),
        alphas=tuple(sorted(set(alphas))),
        scale=(min(scales), max(scales)) if scales else None,
        modules=len({placed.module for placed in lora.updates}),
        groups=_groups(lora),
        norms=_norms(read_lora(path, partial=True), checkpoint) if norms else {},
        model=None if checkpoint is None else _compared(lora, str(dit), checkpoint.shapes),
        left_out=tuple(key for key in lora.left_out if key not in unknown),
        unknown=tuple(unknown),
        notes=tuple(_notes(lora)),
        programs=tuple(_programs(path, lora, shapes)),
    )


def _named(dtypes: Iterable[torch.dtype]) -> tuple[str, ...]:
    return tuple(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


def _alpha(update: Update) -> float | None:
    return getattr(update.direction if isinstance(update, DoRA) else update, "alpha", None)


def group_of(module: str) -> tuple[str, str]:
    """Where a module of the transformer stands, and what kind of layer it is."""
    blocks = next((name for start, name in _BLOCKS.items() if module.startswith(start)), "others")
    if blocks == "others":
        return blocks, module.partition(".")[0]
    return blocks, next((kind for pattern, kind in _LAYERS if re.search(pattern, module)), "others")


_BLOCKS = {"double_blocks.": "double blocks", "single_blocks.": "single blocks", "txt_in.individual": "refiner"}
_LAYERS = (
    (r"_norm$|norm\d$", "norm"),
    (r"_mod\.|modulation", "modulation"),
    (r"linear[12]$", "attention with MLP"),
    (r"attn", "attention"),
    (r"mlp", "MLP"),
)


def _groups(lora: LoraFile) -> dict[str, dict[str, int]]:
    groups: dict[str, dict[str, int]] = {}
    for blocks, layer in map(group_of, sorted({placed.module for placed in lora.updates})):
        layers = groups.setdefault(blocks, {})
        layers[layer] = layers.get(layer, 0) + 1
    return groups


def _norms(lora: LoraFile, checkpoint: Checkpoint | None) -> dict[str, dict[str, float | None]]:
    """The norms of the updates of each group, and of the weights that they change; None where the weights are needed for them."""
    squares: dict[str, list[tuple[float | None, float | None]]] = {}
    for placed in lora.updates:
        weight = None
        if checkpoint is not None and placed.parameter in checkpoint.shapes:
            weight = true_value(checkpoint.get(placed.parameter), checkpoint.scales.get(placed.parameter)).float()
            weight = weight.flatten(1) if weight.dim() > 1 else weight
            weight = weight[placed.rows(len(weight))]
            weight = weight if weight.shape == placed.update.shape else None
        norm = update_norm(placed.update, weight)
        pair = norm, None if weight is None else float(torch.linalg.vector_norm(weight))
        squares.setdefault(group_of(placed.module)[0], []).append(pair)
    norms = {}
    for group, pairs in squares.items():
        update, weight = (None if None in values else math.hypot(*values) for values in zip(*pairs))
        norms[group] = {"update": update, "weight": weight, "relative": update / weight if update is not None and weight else None}
    return norms


def update_norm(update: Update, weight: Tensor | None = None) -> float | None:
    """The Frobenius norm of what is added to ``weight`` (out, in); None if that depends on the weight and it is not given."""
    if isinstance(update, LowRank):
        return update.norm()
    if weight is None and isinstance(update, DoRA | Replacement):
        return None
    return float(torch.linalg.vector_norm(update.delta(torch.empty(0) if weight is None else weight)))


def _compared(lora: LoraFile, dit: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    try:
        fit_to_model(lora, shapes)
    except UserError as error:
        return {"file": dit, "fits": False, "problem": str(error)}
    return {"file": dit, "fits": True, "problem": None}


def _notes(lora: LoraFile) -> Iterator[str]:
    said, ours = model_by_metadata(lora.metadata)
    if said and not ours:
        yield f"it was made for another model, by its metadata ({shown(said)[1:-1]})"
    inputs = {placed.update.shape[1] for placed in lora.updates if re.search(r"(img_attn_qkv|linear1)\.weight$", placed.parameter)}
    if odd := sorted(inputs - {HIDDEN}):
        yield f"it is for a model of width {', '.join(map(str, odd))}; HunyuanVideo has {HIDDEN}"
    patch = {placed.update.shape[1] for placed in lora.updates if placed.parameter == "img_in.proj.weight"}
    if patch - {64}:
        yield "it changes the input of the model for more than 16 channels, as image-to-video models have"


def _programs(path: str | os.PathLike[str], lora: LoraFile, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Program]:
    converted: dict[str, Mapping[str, tuple[int, ...]] | str] = {}
    for client in CLIENTS:
        found = match(client, shapes)
        program = _program(client.title, found)
        if found.verdict is not Verdict.ALL:
            program = _with_command(program, client, path, lora, converted)
        yield program
    keys = transformer_keys(shapes)
    ours = count(keys, set(keys) - set(lora.left_out))
    if ours.verdict is Verdict.PART:
        ours = replace(ours, reason=f"{ours.reason}; give --lora_partial to use the rest")
    yield _program(THIS_PROJECT, ours)


def _program(name: str, found: Match) -> Program:
    return Program(name, str(found.verdict), found.keys, found.of_keys, found.modules, found.of_modules, found.reason)


def _with_command(
    program: Program,
    client: Client,
    path: str | os.PathLike[str],
    lora: LoraFile,
    converted: dict[str, Mapping[str, tuple[int, ...]] | str],
) -> Program:
    """With the command for the first layout of which the program reads all, or with the reason why there is none."""
    for target in client.targets:
        if target not in converted:
            converted[target] = _converted(lora, target)
        shapes = converted[target]
        if isinstance(shapes, str):
            refusal = shapes
        elif (found := match(client, shapes)).verdict is Verdict.ALL:
            return replace(program, target=target, command=_command(path, target, lora))
        else:
            refusal = f"--target {target} does not help: {found.reason}"
    return replace(program, reason=f"{program.reason}; {refusal}")


def _converted(lora: LoraFile, target: str) -> Mapping[str, tuple[int, ...]] | str:
    """Names and shapes of the file in that layout, or why there is none."""
    try:
        return {key: tuple(tensor.shape) for key, tensor in to_layout(lora, target).items()}
    except UserError as error:
        return f"--target {target} is refused: {error.__cause__}"


def _command(path: str | os.PathLike[str], target: str, lora: LoraFile) -> str:
    source = Path(path)
    if source.name in ("", ".."):  # of the folder that the user is in, or one above
        source = source.resolve()
    if str(source).startswith("-"):  # else argparse takes it for a flag
        source = Path(os.curdir, source).absolute()
    output = source.with_name(f"{source.stem if source.suffix == '.safetensors' else source.name}_{target}.safetensors")
    words = ["python", "convert_lora.py", "--input", str(source), "--output", str(output), "--target", target]
    return command_line(words + ["--lora_partial"] * bool(transformer_keys(lora.left_out)))
