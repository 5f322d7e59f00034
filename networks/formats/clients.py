"""What other programs load of a LoRA file: for each, a table of the keys that its loader takes, and of what it fails on.

The tables state what the code of these programs does (``docs/formats.md``); they judge names and shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from hunyuan_model.checkpoints.layouts import COMFYUI, DIFFUSERS, OFFICIAL, NameLayout
from networks.formats.layouts import DEFAULT_PREFIX, OTHER_MODELS, split_ending
from utils.key_values import TextEnum

HIDDEN = 3072  # width of HunyuanVideo, which some loaders have as a constant
Shapes = Mapping[str, tuple[int, ...]]


class Verdict(TextEnum):
    """What becomes of a file in a program."""

    ALL = "all"
    PART = "part"
    NONE = "none"
    WRONG = "wrong"  # loaded without an error, with another effect
    ERROR = "error"


@dataclass(frozen=True)
class Spelling:
    """Keys that a loader takes.

    Attributes:
        prefixes: of which one stands before the module.
        names: of the modules.
        dotted: as in ``LoraLayout``.
        endings: after the module.
        anchor: what some key of the file must hold for these to be read.
    """

    prefixes: tuple[str, ...]
    names: NameLayout
    dotted: bool
    endings: frozenset[str]
    anchor: str = ""

    def takes(self, key: str) -> bool:
        for prefix in self.prefixes:
            if not key.startswith(prefix):
                continue
            body = key[len(prefix) :]
            end = body.find(".")
            while end >= 0:
                if body[end + 1 :] in self.endings and self._is_module(body[:end]):
                    return True
                end = body.find(".", end + 1)
        return False

    def _is_module(self, path: str) -> bool:
        return (self.names.place(path) if self.dotted else self.names.place_of_flat(path)) is not None


@dataclass(frozen=True)
class Fault:
    """What a loader fails on, or reads wrongly, as soon as a file has it."""

    applies: Callable[[Shapes], bool]
    reason: str
    verdict: Verdict = Verdict.ERROR


@dataclass(frozen=True)
class Client:
    """A program that loads LoRA files.

    Attributes:
        takes: the keys that it matches; others are left out without an error.
        faults: what it does not leave out. The first that applies counts.
        empty_is_error: whether a file of which nothing matches is an error for it.
        targets: layouts to convert to for it, the one that most programs read first.
    """

    title: str
    takes: tuple[Spelling, ...]
    targets: tuple[str, ...]
    faults: tuple[Fault, ...] = ()
    empty_is_error: Callable[[Collection[str]], bool] = lambda keys: False


@dataclass(frozen=True)
class Match:
    """How much of a file a program loads: keys and modules, without those of text encoders."""

    verdict: Verdict
    keys: int
    of_keys: int
    modules: int
    of_modules: int
    reason: str = ""


def match(client: Client, shapes: Shapes) -> Match:
    """What ``client`` makes of a file with tensors of these names and shapes."""
    keys = transformer_keys(shapes)
    spellings = [spelling for spelling in client.takes if not spelling.anchor or any(spelling.anchor in key for key in shapes)]
    taken = {key for key in keys if any(spelling.takes(key) for spelling in spellings)}
    return _judged(client, shapes, count(keys, taken))


def count(keys: Collection[str], taken: Collection[str]) -> Match:
    """The match of a file of which the keys ``taken`` are read; a module counts if all of its keys are."""
    left = [key for key in keys if key not in taken]
    modules, broken = {module_of(key) for key in keys}, {module_of(key) for key in left}
    found = Match(Verdict.ALL, len(keys) - len(left), len(keys), len(modules - broken), len(modules))
    if not keys:
        return replace(found, verdict=Verdict.NONE, reason="it holds nothing for the transformer")
    if not left:
        return found
    if found.keys == 0:
        return replace(found, verdict=Verdict.NONE, reason=f"it knows no name such as {module_of(left[0])}")
    unread = {module_of(key) for key in taken}
    strange = [key for key in left if module_of(key) not in unread]
    reason = f"it does not know {module_of(strange[0])}" if strange else f"it ignores {left[0][len(module_of(left[0])) + 1 :]}"
    return replace(found, verdict=Verdict.PART, reason=reason)


def transformer_keys(keys: Collection[str]) -> list[str]:
    """The keys that are not of text encoders or embeddings."""
    return [key for key in keys if not key.startswith(OTHER_MODELS)]


def module_of(key: str) -> str:
    """A key without its ending, also where that is none that can be read here."""
    module, part = split_ending(key)
    return module if part else key.rpartition(".")[0] or key


def _judged(client: Client, shapes: Shapes, found: Match) -> Match:
    fault = next((fault for fault in client.faults if fault.applies(shapes)), None)
    if fault is None and not found.keys and client.empty_is_error(shapes):
        fault = Fault(client.empty_is_error, "it finds no module of these names")
    if fault is None:
        return found
    if fault.verdict is Verdict.ERROR:
        found = replace(found, keys=0, modules=0)
    return replace(found, verdict=fault.verdict, reason=fault.reason)


# Endings
_PEFT = frozenset({"lora_A.weight", "lora_B.weight"})
_KOHYA = frozenset({"lora_down.weight", "lora_up.weight", "alpha"})
_COMFY = (
    _PEFT
    | _KOHYA
    | {"lora_A.default.weight", "lora_B.default.weight", "lora.down.weight", "lora.up.weight", "lora_mid.weight", "dora_scale"}
    | {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "oft_blocks"}
    | {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
    | {"diff", "diff_b", "set_weight", "w_norm", "b_norm"}
)
_DIFFUSERS = _PEFT | {"lora.down.weight", "lora.up.weight"}
_MAGNITUDE = frozenset({"lora_magnitude_vector.weight"})


def _only(names: NameLayout, keep: Callable[[str], bool]) -> NameLayout:
    """``names`` of some of the official modules."""
    return replace(names, table={module: theirs for module, theirs in names.table.items() if keep(module)})


def _in_blocks(module: str) -> bool:
    return module.startswith(("double_blocks.", "single_blocks."))


def _is_linear_of_blocks(module: str) -> bool:
    return _in_blocks(module) and not module.endswith("_norm")


# ComfyUI knows its own names; of the official ones those that it derives from them for LoRA files.
_OFFICIAL_IN_COMFYUI = _only(
    OFFICIAL,
    lambda module: COMFYUI.table[module] == module or _is_linear_of_blocks(module) or "individual_token_refiner" in module,
)
# The wrapper's model has the official names. Of ComfyUI's it renames three.
_RENAMED_BY_WRAPPER = _only(
    COMFYUI, lambda module: module in {f"double_blocks.N.{name}" for name in ("img_attn_qkv", "img_attn_proj", "txt_attn_qkv")}
)
_BLOCKS = _only(OFFICIAL, _is_linear_of_blocks)

# The converter of diffusers has the width as a constant, and takes some factors apart wrongly. It runs if some key holds this.
_CONVERTED = "img_attn_qkv"


def _is_official(shapes: Shapes) -> bool:
    return any(_CONVERTED in key for key in shapes)


def _ends(*endings: str) -> Callable[[Shapes], bool]:
    return lambda shapes: any(key.endswith(endings) for key in shapes)


def _holds(text: str) -> Callable[[Shapes], bool]:
    return lambda shapes: any(text in key for key in shapes)


def _rows_other_than(size: int, module: str) -> Callable[[Shapes], bool]:
    """Whether the update of such a module has another number of rows."""
    up = tuple(f"{module}.{ending}.weight" for ending in ("lora_B", "lora_up", "lora.up"))
    return lambda shapes: any(key.endswith(up) and shape[:1] != (size,) for key, shape in shapes.items())


def _has_prefix(shapes: Collection[str]) -> bool:
    return any(key.startswith("transformer.") for key in shapes)


_CONVERTER_FAULTS = (
    Fault(
        lambda shapes: _is_official(shapes) and _ends(".alpha", ".lora_down.weight", ".lora.down.weight")(shapes),
        "of official names it takes lora_A and lora_B alone, and no alpha",
    ),
    Fault(_rows_other_than(7 * HIDDEN, "linear1"), f"it splits linear1 at the width {HIDDEN} of HunyuanVideo"),
    Fault(_holds(".self_attn_qkv.lora"), "it splits self_attn_qkv of the refiner along the rank"),
    Fault(
        _holds("final_layer.adaLN_modulation.1.lora"),
        "it swaps halves of the rank in final_layer.adaLN_modulation.1",
        Verdict.WRONG,
    ),
)
_DIFFUSERS_FAULTS = (
    Fault(
        lambda shapes: any("lora" not in key for key in shapes if "dora_scale" not in key),
        "it refuses keys without lora in them, such as alpha, diff and those of LyCORIS",
    ),
    *(
        replace(fault, applies=lambda shapes, applies=fault.applies: _is_official(shapes) and applies(shapes))
        for fault in _CONVERTER_FAULTS
    ),
)
_NO_LORA_B = Fault(
    lambda shapes: _has_prefix(shapes) and not any("lora_B" in key or ".lora.up" in key for key in shapes),
    "it needs lora_A and lora_B",
)
_ANY_PREFIX = ("", "transformer.", "diffusion_model.")

CLIENTS = (
    Client(
        "ComfyUI",
        (
            Spelling((DEFAULT_PREFIX,), COMFYUI, False, _COMFY),
            Spelling(("diffusion_model.",), COMFYUI, True, _COMFY),
            Spelling(("diffusion_model.", "transformer."), _OFFICIAL_IN_COMFYUI, True, _COMFY),
        ),
        ("other", "comfy"),
    ),
    Client(
        "ComfyUI-HunyuanVideoWrapper",
        (
            Spelling((DEFAULT_PREFIX,), OFFICIAL, False, _COMFY),
            Spelling(("diffusion_model.", "transformer."), OFFICIAL, True, _COMFY),
            Spelling(("diffusion_model.", "transformer."), _RENAMED_BY_WRAPPER, True, _COMFY),
        ),
        ("other", "default"),
    ),
    Client(
        "diffusers",
        (
            Spelling(("transformer.",), DIFFUSERS, True, _DIFFUSERS | _MAGNITUDE),
            Spelling(_ANY_PREFIX, OFFICIAL, True, _DIFFUSERS, anchor=_CONVERTED),
            Spelling(_ANY_PREFIX, _only(OFFICIAL, lambda module: "linear1" not in module), True, _MAGNITUDE, anchor=_CONVERTED),
        ),
        ("other", "diffusers"),
        (*_DIFFUSERS_FAULTS, _NO_LORA_B),
        lambda keys: (_is_official(keys) or _has_prefix(keys)) and not any(".default." in key for key in keys),
    ),
    Client(
        "FramePack (musubi-tuner)",
        (
            Spelling((DEFAULT_PREFIX,), DIFFUSERS, False, _KOHYA),
            Spelling((DEFAULT_PREFIX,), _BLOCKS, False, _KOHYA),
            Spelling(("diffusion_model.", "transformer."), _BLOCKS, True, _PEFT),
        ),
        ("other", "framepack"),
        tuple(
            Fault(_rows_other_than(rows, module), f"it splits official names at the width {HIDDEN} of HunyuanVideo")
            for module, rows in (("_attn_qkv", 3 * HIDDEN), ("linear1", 7 * HIDDEN))
        ),
    ),
    Client(  # always calls the converter of diffusers, and loads the result into FramePack
        "FramePack Studio",
        (
            Spelling(_ANY_PREFIX, DIFFUSERS, True, _DIFFUSERS),
            Spelling(_ANY_PREFIX, OFFICIAL, True, _DIFFUSERS),
        ),
        ("other", "diffusers"),
        (*_CONVERTER_FAULTS, Fault(lambda shapes: not any("lora_B" in key for key in shapes), "it needs lora_A and lora_B")),
        lambda keys: True,
    ),
)
