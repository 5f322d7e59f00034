"""What other programs load of a LoRA file: against diffusers itself, and against the keys that the other loaders take."""

from __future__ import annotations

import pytest
import torch
from variations import slow_but

from networks.formats.clients import CLIENTS, Match, Verdict, match
from networks.formats.layouts import LAYOUTS, flat_name

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:While injecting the PEFT adapters")
W = 3072
DOUBLE = {"attn_qkv": (3 * W, W), "attn_proj": (W, W), "mlp.fc1": (4 * W, W), "mlp.fc2": (W, 4 * W)}
LINEAR = {f"double_blocks.0.{stream}_{name}": size for stream in ("img", "txt") for name, size in DOUBLE.items()}
LINEAR |= {"single_blocks.0.linear1": (7 * W, W), "single_blocks.0.linear2": (W, 5 * W)}
WITHOUT_QKV = {module: size for module, size in LINEAR.items() if "img_attn_qkv" not in module}
REFINER = "txt_in.individual_token_refiner.blocks.0."
EXTRAS = {
    "double_blocks.0.img_mod.linear": (6 * W, W),
    "double_blocks.0.txt_mod.linear": (6 * W, W),
    "single_blocks.0.modulation.linear": (3 * W, W),
    f"{REFINER}self_attn_qkv": (3 * W, W),
    f"{REFINER}self_attn_proj": (W, W),
    f"{REFINER}mlp.fc1": (4 * W, W),
    f"{REFINER}adaLN_modulation.1": (2 * W, W),
    "final_layer.linear": (64, W),
    "time_in.mlp.0": (W, 256),
    "txt_in.c_embedder.linear_1": (W, 8),
}
PEFT, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
OLD = ("lora.down.weight", "lora.up.weight")
RANK = 2
Tensors = dict[str, torch.Tensor]


def lora(layout: str, modules: dict[str, tuple[int, int]], endings: tuple[str, str], *others: str) -> Tensors:
    """A file in the names of a layout, with other tensors for each module."""
    named = LAYOUTS[layout]
    tensors = {}
    for module, (rows, inputs) in modules.items():
        names = named.names.modules(module)
        sizes = [inputs] * (len(names) - 1) + [rows - inputs * (len(names) - 1)]
        for name, size in zip(names, sizes):
            path = named.prefix + (name if named.dotted else flat_name(name))
            values = {endings[0]: torch.ones(RANK, inputs), endings[1]: torch.ones(size, RANK), "alpha": torch.tensor(1.0)}
            values |= {"lora_magnitude_vector.weight": torch.ones(size), "diff_b": torch.ones(size)}
            tensors |= {f"{path}.{ending}": values[ending] for ending in (*endings, *others)}
    return dict(sorted(tensors.items()))


def matched(title: str, tensors: Tensors) -> Match:
    client = next(client for client in CLIENTS if client.title == title)
    return match(client, {name: tuple(tensor.shape) for name, tensor in tensors.items()})


# diffusers itself


@pytest.fixture
def loaded_by_diffusers(monkeypatch):
    """Load a file into a transformer without values, and return what came of it, as a verdict, and the modules that changed."""
    import peft
    from diffusers import HunyuanVideoTransformer3DModel
    from diffusers.loaders.lora_pipeline import HunyuanVideoLoraLoaderMixin

    class Pipeline(HunyuanVideoLoraLoaderMixin):
        def __init__(self, transformer):
            self.transformer, self.components, self.hf_device_map = transformer, {}, None

    def load(tensors: Tensors, heads: int = 24) -> tuple[Verdict, int]:
        sizes = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 8, "pooled_projection_dim": 8}
        with torch.device("meta"):
            transformer = HunyuanVideoTransformer3DModel(num_attention_heads=heads, attention_head_dim=128, **sizes)
        results = []
        set_tensors = peft.set_peft_model_state_dict
        monkeypatch.setattr(peft, "set_peft_model_state_dict", lambda *a, **k: results.append(set_tensors(*a, **k)) or results[-1])
        try:
            Pipeline(transformer).load_lora_weights(dict(tensors), adapter_name="x")
        except (ValueError, RuntimeError, IndexError, TypeError, KeyError):
            return Verdict.ERROR, 0
        finally:
            monkeypatch.undo()
        unexpected = [key for result in results for key in result.unexpected_keys or ()]
        missing = [key for result in results for key in result.missing_keys or () if ".lora_" in key]
        changed = sum("x" in getattr(module, "lora_A", {}) for module in transformer.modules())
        if not changed or 2 * changed == len(missing):
            return Verdict.NONE, 0
        return Verdict.PART if unexpected or missing else Verdict.ALL, changed

    return load


@pytest.mark.parametrize("endings", slow_but([PEFT, KOHYA, OLD], PEFT, KOHYA), ids=lambda endings: endings[0])
@pytest.mark.parametrize(
    "others", [(), ("alpha",), ("lora_magnitude_vector.weight",), ("diff_b",)], ids=lambda others: "".join(others)
)
def test_diffusers_loads_what_the_table_says(loaded_by_diffusers, endings, others):
    for layout in LAYOUTS:
        for modules in (LINEAR, WITHOUT_QKV):
            tensors = lora(layout, modules, endings, *others)
            found = matched("diffusers", tensors)
            verdict, changed = loaded_by_diffusers(tensors)
            assert found.verdict == verdict, (layout, len(modules), found)
            if verdict is Verdict.ALL:
                assert changed == sum(len(LAYOUTS["diffusers"].names.modules(module)) for module in modules)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diffusers_loads_nothing_with_the_name_of_an_adapter(loaded_by_diffusers, layout):
    tensors = lora(layout, LINEAR, ("lora_A.default.weight", "lora_B.default.weight"))
    assert matched("diffusers", tensors).keys == loaded_by_diffusers(tensors)[1] == 0


@pytest.mark.parametrize("module", slow_but(EXTRAS, *list(EXTRAS)[::3]))
def test_diffusers_loads_other_modules_as_the_table_says(loaded_by_diffusers, module):
    for layout in ("default", "other", "diffusers", "comfy", "diffusion-pipe", "original"):
        for modules in (LINEAR, WITHOUT_QKV, {}):
            tensors = lora(layout, modules | {module: EXTRAS[module]}, PEFT)
            assert matched("diffusers", tensors).verdict == loaded_by_diffusers(tensors)[0], (layout, len(modules))


def test_diffusers_swaps_the_rank_of_the_last_modulation():
    from diffusers.loaders.lora_pipeline import HunyuanVideoLoraLoaderMixin

    tensors = lora("other", LINEAR | {"final_layer.adaLN_modulation.1": (2 * W, W)}, PEFT)
    tensors["diffusion_model.final_layer.adaLN_modulation.1.lora_A.weight"] = torch.arange(2.0)[:, None].expand(2, W).clone()
    converted = HunyuanVideoLoraLoaderMixin.lora_state_dict(dict(tensors))
    assert converted["transformer.norm_out.linear.lora_A.weight"][:, 0].tolist() == [1.0, 0.0]
    assert matched("diffusers", tensors).verdict == Verdict.WRONG


@pytest.mark.parametrize("layout", ["other", "diffusers"])
def test_diffusers_at_another_width(loaded_by_diffusers, layout):
    smaller = {module: (rows // 2, inputs // 2) for module, (rows, inputs) in LINEAR.items()}
    for modules in (smaller, {module: size for module, size in smaller.items() if "linear1" not in module}):
        tensors = lora(layout, modules, PEFT)
        assert matched("diffusers", tensors).verdict == loaded_by_diffusers(tensors, heads=12)[0]


# The loaders that are no packages


COMFYUI_KEYS = [
    *(f"double_blocks.0.{stream}_{name}" for stream in ("img", "txt") for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")),
    *(f"double_blocks.0.{stream}_mod.lin" for stream in ("img", "txt")),
    *(f"single_blocks.0.{name}" for name in ("linear1", "linear2", "modulation.lin")),
    *(f"{REFINER}{name}" for name in ("self_attn.qkv", "self_attn.proj", "mlp.0", "mlp.2", "adaLN_modulation.1")),
    *("txt_in.c_embedder.in_layer", "time_in.in_layer", "final_layer.linear"),
]


def modules_for_comfyui() -> set[str]:
    """Names before the endings, made from the model's own as its loader makes them."""
    accepted = set()
    for key in COMFYUI_KEYS:
        official = f"{key}."
        for theirs, ours in (("_mod.lin.", "_mod.linear."), ("_attn.qkv.", "_attn_qkv."), ("_attn.proj.", "_attn_proj.")):
            official = official.replace(theirs, ours)
        official = (
            official.replace("mlp.0.", "mlp.fc1.").replace("mlp.2.", "mlp.fc2.").replace(".modulation.lin.", ".modulation.linear.")
        )
        accepted |= {f"lora_unet_{key.replace('.', '_')}", f"diffusion_model.{key}"}
        accepted |= {f"{prefix}{official[:-1]}" for prefix in ("diffusion_model.", "transformer.")}
    return accepted


def modules_for_wrapper() -> set[str]:
    """Its model has the official names, and it renames the prefix and three of ComfyUI's names."""
    official = [*LINEAR, *EXTRAS]
    accepted = {f"lora_unet_{name.replace('.', '_')}" for name in official}
    for prefix in ("diffusion_model.", "transformer."):
        accepted |= {prefix + name for name in official}
        accepted |= {f"{prefix}double_blocks.0.{name}" for name in ("img_attn.qkv", "img_attn.proj", "txt_attn.qkv")}
    return accepted


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("title", "accepted"), [("ComfyUI", modules_for_comfyui()), ("ComfyUI-HunyuanVideoWrapper", modules_for_wrapper())]
)
def test_modules_that_comfyui_and_its_wrapper_match(layout, title, accepted):
    modules = LINEAR | EXTRAS
    tensors = lora(layout, modules, PEFT, "alpha")
    names = {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
    found = matched(title, tensors)
    assert (found.modules, found.of_modules) == (len(names & accepted), len(names))
    assert (found.keys, found.of_keys) == (3 * len(names & accepted), 3 * len(names))


# What programs write, and how much of it ComfyUI, its wrapper and the two of FramePack load.
PROGRAMS = ("ComfyUI", "ComfyUI-HunyuanVideoWrapper", "FramePack (musubi-tuner)", "FramePack Studio")
WRITTEN = {
    "default": (KOHYA, ("alpha",), ("part", "all", "all", "error")),
    "other": (PEFT, (), ("all", "all", "all", "all")),
    "diffusion-pipe": (PEFT, (), ("all", "all", "all", "all")),
    "diffusers": (PEFT, (), ("none", "none", "none", "all")),
    "onetrainer": (KOHYA, ("alpha",), ("none", "none", "none", "error")),
    "original": (PEFT, ("alpha",), ("none", "none", "none", "error")),
    "comfy": (KOHYA, (), ("all", "part", "none", "error")),
    "lycoris": (KOHYA, ("alpha",), ("none", "none", "none", "error")),
    "hunyuan": (KOHYA, ("alpha",), ("none", "none", "none", "error")),
    "framepack": (KOHYA, ("alpha",), ("none", "none", "all", "error")),
}


@pytest.mark.parametrize("layout", WRITTEN)
def test_files_in_circulation(layout):
    endings, others, expected = WRITTEN[layout]
    tensors = lora(layout, LINEAR, endings, *others)
    found = [matched(title, tensors).verdict.value for title in PROGRAMS]
    assert found == list(expected)


def test_a_file_of_comfyui_in_the_wrapper():
    found = matched("ComfyUI-HunyuanVideoWrapper", lora("comfy", LINEAR, KOHYA))
    assert (found.modules, found.of_modules) == (5, 10)
    assert found.reason.startswith("it does not know diffusion_model.double_blocks.0.")


def test_alpha_beside_lora_a_is_ignored_by_framepack():
    found = matched("FramePack (musubi-tuner)", lora("other", LINEAR, PEFT, "alpha"))
    assert (found.verdict, found.keys, found.of_keys, found.reason) == ("part", 20, 30, "it ignores alpha")


def test_keys_of_text_encoders_do_not_count():
    tensors = lora("other", LINEAR, PEFT)
    more = tensors | {f"text_encoders.llama.transformer.x.{ending}": torch.ones(2, 2) for ending in PEFT}
    assert matched("ComfyUI", more) == matched("ComfyUI", tensors)
    only = {name: tensor for name, tensor in more.items() if name not in tensors}
    verdicts = {client.title: matched(client.title, only).verdict for client in CLIENTS}
    assert verdicts["ComfyUI"] is verdicts["FramePack (musubi-tuner)"] is Verdict.NONE and Verdict.ALL not in verdicts.values()
