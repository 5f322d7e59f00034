"""A transformer whose blocks are on two devices: the same numbers to the bit, and no operator that reads tensors of both."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from device_tags import DEVICES, device_tags
from safetensors.torch import load_file, save_file
from small_transformer import CONFIG, CPU, make_inputs, make_transformer, same, train_and_sample
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_leaves
from variations import slow_but

import networks.lora
from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime import device_split
from hunyuan_model.runtime.compilation import CompileSettings
from hunyuan_model.runtime.device_split import enable_device_split, make_split, parse_split
from hunyuan_model.runtime.gradient_checkpointing import enable_gradient_checkpointing
from hunyuan_model.runtime.loading import load_transformer
from hunyuan_model.runtime.offload.block_swap import SLOTS, SwapSettings, max_blocks_to_swap, streamed_by_device
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.transformer import model
from networks.formats.reading import lora_of
from networks.injection import InjectedLoras
from networks.merging import LoraToMerge
from networks.network_module import create_network
from utils.errors import UserError

CHECKPOINTING = {"gradient_checkpointing": True}


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("split") / "dit.safetensors"
    save_file(make_transformer().state_dict(), path)
    return path


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_split, "visible_gpus", lambda device: DEVICES)


def load(dit: Path, device: torch.device, **runtime) -> nn.Module:
    torch.manual_seed(0)
    return load_transformer(dit, device=device, dtype=torch.float32, runtime=RuntimeSettings(**runtime))


def with_lora(transformer: nn.Module, device: torch.device, **arguments: str) -> nn.Module:
    torch.manual_seed(1)
    options = {"dim": 2, "alpha": 2.0, "dropout": None, "network_args": arguments}
    network = create_network(networks.lora, transformer, **options, device=device)
    with torch.no_grad():
        for lora in network.loras():
            nn.init.normal_(lora.lora_up.weight, std=0.1)
    return network.train()


def short_run(transformer: nn.Module, network: nn.Module) -> list[torch.Tensor]:
    """Outputs and gradients of a step of two batches and of a sample."""
    inputs = make_inputs(0, device=DEVICES[0])
    outputs = [transformer(*inputs), transformer(*make_inputs(1, lengths=(4,), device=DEVICES[0]))]
    sum(output.square().mean() for output in outputs).backward()
    with torch.no_grad():
        outputs.append(transformer(*inputs))
    return [*outputs, *(parameter.grad for parameter in network.parameters())]


RUNTIMES = [
    {},
    {"weights": WeightFormat.INT8},
    {"weights": WeightFormat.FP8_SCALED, **CHECKPOINTING},
    {"weights": WeightFormat.FP8, "blocks_to_swap": 2},
    {**CHECKPOINTING, "keep_attention": True},
    {**CHECKPOINTING, "blocks_to_swap": 3, "img_in_txt_in_offloading": True},
    {**CHECKPOINTING, "gradient_checkpointing_cpu_offload": True, "keep_attention": True, "weights": WeightFormat.INT8},
]


@pytest.mark.parametrize("runtime", slow_but(RUNTIMES, {}, *RUNTIMES[-2:]), ids=str)
@pytest.mark.parametrize("counts", [(2, 5), pytest.param((4, 3), marks=pytest.mark.slow)], ids=str)
def test_outputs_and_gradients_are_the_same_to_the_bit(dit, two_devices, runtime, counts) -> None:
    def run(**split: tuple[int, ...]) -> list[torch.Tensor]:
        transformer = load(dit, CPU, **runtime, **split)
        return train_and_sample(transformer, with_lora(transformer, CPU))

    assert same(run(split_blocks=counts), run())


@pytest.mark.parametrize("runtime", slow_but(RUNTIMES, *RUNTIMES[-3:]), ids=str)
def test_no_operator_reads_tensors_of_two_devices(dit, two_devices, runtime) -> None:
    with device_tags() as tags:
        transformer = load(dit, DEVICES[0], **runtime, split_blocks=(2, 5))
        short_run(transformer, with_lora(transformer, DEVICES[0]))
    assert tags.moved[0, 1] and tags.moved[1, 0]


@pytest.mark.slow
def test_compiled_blocks_give_the_same_on_two_devices(dit, two_devices) -> None:
    def run(**split: object) -> list[torch.Tensor]:
        transformer = load(dit, CPU, compile=CompileSettings(backend="eager"), **CHECKPOINTING, **split)
        return short_run(transformer, with_lora(transformer, CPU))

    assert same(run(split_blocks=(2, 5), blocks_to_swap=3), run())


def test_tags_find_what_is_on_the_wrong_device(dit, two_devices) -> None:
    with device_tags(), pytest.raises(AssertionError, match=r"reads tensors of the devices \[0, 1\]"):
        transformer = load(dit, DEVICES[0], split_blocks=(2, 5))
        network = with_lora(transformer, DEVICES[0])
        network.lora_unet_single_blocks_0_linear1.to(DEVICES[0])
        short_run(transformer, network)


def test_what_moves_in_a_step(dit, two_devices) -> None:
    """Tokens and their gradients once, vec and rope once in a forward pass, patches and their gradients once; no weights."""
    with device_tags() as tags:
        transformer = load(dit, DEVICES[0], split_blocks=(2, 5))
        with_lora(transformer, DEVICES[0])
        inputs = make_inputs(0, lengths=(6,), size=(1, 4, 6), device=DEVICES[0])
        tags.moved.clear(), tags.moved_values.clear()
        output = transformer(*inputs)
        image, text, hidden, half = 6, 6, CONFIG.hidden_size, CONFIG.head_dim // 2
        tokens, patches = (image + text) * hidden, image * 64
        tables = (image + image + text) * half * 2  # for the double block, and for the single ones
        assert tags.moved == {(0, 1): 2 + 1, (None, 1): 2, (1, 0): 1}
        assert tags.moved_values == {(0, 1): tokens + hidden, (None, 1): tables, (1, 0): patches}
        tags.moved.clear(), tags.moved_values.clear()
        output.square().mean().backward()
        assert tags.moved == {(0, 1): 1, (1, 0): 2}
        assert tags.moved_values == {(0, 1): patches, (1, 0): tokens}
    assert not any(once._copies for once in {block.forward.moved for block in transformer.single_blocks})


def test_weights_stream_to_the_device_of_their_block(dit, two_devices) -> None:
    with device_tags() as tags:
        transformer = load(dit, DEVICES[0], split_blocks=(4, 3), weights=WeightFormat.INT8)
        network = with_lora(transformer, DEVICES[0])
        placed = {name: tags.tag(weight) for name, weight in transformer.named_parameters()}
        assert tags.moved.keys() == {(None, 0), (None, 1)}, "a weight went to one device and then to another"
        loras = {name: tags.tag(weight) for name, weight in network.named_parameters()}
    assert {name for name, tag in placed.items() if tag == 1} == {
        name for name in placed if name.startswith(("single_blocks.1.", "single_blocks.2.", "single_blocks.3.", "final_layer."))
    }
    assert all(tag == int("_single_blocks_" in name and "_single_blocks_0_" not in name) for name, tag in loras.items())


def test_sampling_with_loras_beside_the_weights(dit, two_devices) -> None:
    torch.manual_seed(2)
    tensors = {
        f"{path}.{kind}.weight": torch.randn(shape) * 0.1
        for path, out, inputs in (
            ("double_blocks.0.img_attn_qkv", 192, 64),
            ("single_blocks.3.linear1", 320, 64),
            ("final_layer.linear", 64, 64),
        )
        for kind, shape in (("lora_A", (2, inputs)), ("lora_B", (out, 2)))
    }
    lora = LoraToMerge(lora_of(tensors, {}, "a LoRA"), 0.7)

    def sampled(device: torch.device, **split: tuple[int, ...]) -> torch.Tensor:
        transformer = load(dit, device, **split)
        InjectedLoras(transformer, [lora], device)
        with torch.no_grad():
            return transformer(*make_inputs(3, device=device))

    with device_tags():
        found = sampled(DEVICES[0], split_blocks=(3, 4))
    assert same([found], [sampled(CPU)])
    assert not same([found], [load(dit, CPU)(*make_inputs(3))])


@pytest.mark.parametrize(
    ("text", "counts"), [(None, ()), ("auto", "auto"), ("20,40", (20, 40)), ("1,2,3", (1, 2, 3)), ("20, 40", (20, 40))]
)
def test_the_flag(text, counts) -> None:
    assert parse_split(text) == counts


@pytest.mark.parametrize("text", ["", "60", "0,60", "-1,61", "20;40", "20,", "a,b", "20.5,39.5", "two", "²,3"])
def test_other_values_are_refused(text) -> None:
    with pytest.raises(UserError, match=r"--split_blocks .* is not understood"):
        parse_split(text)


GPUS = tuple(torch.device("cuda", index) for index in range(2))


@pytest.mark.parametrize(
    ("counts", "gpus", "sentence"),
    [
        ((3, 4), (), "--split_blocks 3,4 spreads the blocks over several GPUs, but this runs on cpu"),
        ("auto", (), "--split_blocks auto spreads"),
        ("auto", GPUS[:1], "--split_blocks auto needs 2 GPUs, but this process sees 1"),
        ((2, 2, 3), GPUS, "--split_blocks 2,2,3 needs 3 GPUs, but this process sees 2"),
        ((3, 3), GPUS, "--split_blocks 3,3 places 6 blocks, but this transformer has 7: 3 double and 4 single ones"),
        ((3, 4), GPUS, "--blocks_to_swap 4 is more than .* blocks each device holds two at a time. Use at most 3."),
    ],
)
def test_what_cannot_be_split_is_refused_before_loading(monkeypatch, counts, gpus, sentence) -> None:
    monkeypatch.setattr(device_split, "visible_gpus", lambda device: gpus)
    with pytest.raises(UserError, match=sentence):
        RuntimeSettings(split_blocks=counts, blocks_to_swap=4).check(CPU, config=CONFIG)


def test_several_processes_are_refused(monkeypatch, two_devices) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="is for one process that has all GPUs, but this one was launched with others"):
        RuntimeSettings(split_blocks=(3, 4)).check(CPU, config=CONFIG)


@pytest.mark.parametrize("counts", [(3, 4), (2, 5), (1, 6), (2, 2, 3)], ids=str)
def test_every_device_swaps_its_part(counts) -> None:
    for swapped in range(max_blocks_to_swap(CONFIG, counts) + 1):
        by_device = streamed_by_device(SwapSettings(swapped, split=counts), CONFIG)
        fewer = [max(0, len(streamed) - SLOTS) for streamed in by_device]
        room = [max(0, count - SLOTS) for count in counts]
        assert sum(fewer) == swapped and all(one <= most for one, most in zip(fewer, room))
        assert all(abs(one - swapped * most / sum(room)) < 1 for one, most in zip(fewer, room))
        assert sorted(set(itertools.chain(*by_device))) == list(itertools.chain(*by_device))


def move(module: nn.Module, *where: object) -> nn.Module:
    """In place of ``nn.Module.to``, which cannot exchange parameters without values."""
    device = next((one for one in where if isinstance(one, torch.device)), None)
    for owner in module.modules() if device is not None else ():
        for name, old in list(owner._parameters.items()):
            if old is not None:
                owner._parameters[name] = nn.Parameter(torch.empty(old.shape, device=device), requires_grad=old.requires_grad)
    return module


def on_one_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which takes tensors of one device alone."""

    def checked(*inputs: Any, **options: Any) -> Any:
        assert len({value.device for value in tree_leaves(inputs) if isinstance(value, torch.Tensor)}) == 1
        return function(*inputs, **options)

    return checked


@pytest.mark.parametrize("checkpointing", slow_but([False, True], True))
def test_torch_finds_the_operands_of_a_training_step_on_one_device(monkeypatch, checkpointing) -> None:
    """With tensors without values that say which device they are on: torch itself refuses operators between devices."""
    monkeypatch.setattr(model, "_valid_text", lambda text, mask: (text, None))  # it reads values
    monkeypatch.setattr(nn.Module, "to", move)
    monkeypatch.setattr(torch, "stack", on_one_device(torch.stack))  # torch lets single numbers on CPUs pass
    monkeypatch.setattr(torch.Tensor, "mul_", on_one_device(torch.Tensor.mul_))
    with FakeTensorMode():
        transformer = model.HYVideoDiffusionTransformer(CONFIG).requires_grad_(False)
        split = make_split((4, 3), DEVICES, CONFIG)
        for name, module in transformer.named_modules():
            if not list(module.children()):
                module.to(split.device_of(name))
        if checkpointing:
            enable_gradient_checkpointing(transformer)
        enable_device_split(transformer, split)
        network = with_lora(transformer, DEVICES[0])
        assert {parameter.device for parameter in network.parameters()} == set(DEVICES)
        optimizer = torch.optim.AdamW(network.parameters(), foreach=True)
        inputs = [torch.empty(value.shape, device=DEVICES[0]) for value in make_inputs(lengths=(6,))]
        output = transformer(*inputs)
        assert output.device == DEVICES[0]
        output.square().mean().backward()
        assert all(parameter.grad.device == parameter.device for parameter in network.parameters())
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with pytest.raises(DataDependentOutputException):  # where it reads the norms, after everything else
            network.apply_max_norm_regularization(1.0)
        network.lora_unet_single_blocks_3_linear2.to(DEVICES[0])
        with pytest.raises(RuntimeError, match="found at least two devices"):
            transformer(*inputs)


@pytest.mark.parametrize("computes_on", [GPUS[1], DEVICES[1]], ids=str)
def test_a_block_computes_while_its_device_is_the_current_one(monkeypatch, computes_on) -> None:
    current = [None]

    @contextmanager
    def set_current(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", set_current)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)
    transformer, seen = make_transformer(), []
    for name, block in (*transformer.double_blocks.named_children(), *transformer.single_blocks.named_children()):
        block.branches = lambda *inputs, own=block.branches, name=name: (seen.append(current[-1]), own(*inputs))[1]
    enable_device_split(transformer, make_split((2, 5), (GPUS[0], computes_on), CONFIG))
    transformer(*make_inputs())
    assert seen == [None] * 2 + [computes_on if computes_on.type == "cuda" else None] * 5 and current == [None]


# Through the scripts.


FLAGS = ("--max_train_steps", 3, "--network_dropout", 0.1, "--scale_weight_norms", 0.05, "--learning_rate", 0.01, "--save_state")
SAMPLING = ("--infer_steps", 3, "--video_size", 32, 32, "--video_length", 1, "--seed", 1, "--output_type", "latent")


@pytest.mark.parametrize(
    "flags",
    [
        ("--gradient_checkpointing", "--int8_base", "--blocks_to_swap", 2, "--mixed_precision", "bf16"),
        ("--network_module", "lycoris.kohya", "--network_args", "algo=lora"),
    ],
    ids=["ours", "lycoris"],
)
def test_a_lora_is_trained_as_on_one_device(train, tmp_path, two_devices, flags) -> None:
    if "lycoris.kohya" in flags:
        pytest.importorskip("lycoris")
    assert train(*FLAGS, *flags, name="one").status == 0
    assert train(*FLAGS, *flags, "--split_blocks", "2,4", name="two").status == 0
    one, two = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and same(list(one.values()), list(two.values()))


def test_a_training_resumes_with_another_split(train, tmp_path, two_devices) -> None:
    assert train(*FLAGS, name="whole").status == 0
    assert train(*FLAGS, "--max_train_steps", 2, "--split_blocks", "1,5", name="part").status == 0
    state = tmp_path / "out" / "part-state"
    assert train(*FLAGS, "--split_blocks", "4,2", "--resume", state, name="resumed").status == 0
    whole, resumed = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("whole", "resumed"))
    assert same(list(whole.values()), list(resumed.values()))


@pytest.mark.parametrize("mode", ["merge", "inject"])
def test_a_video_is_sampled_as_on_one_device(call_script, tiny_model, train, tmp_path, two_devices, caplog, mode) -> None:
    caplog.set_level("INFO")
    assert train("--max_train_steps", 1, "--learning_rate", 0.1).status == 0
    encoders = ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
    lora = ("--lora_weight", tmp_path / "out" / "lora.safetensors", "--lora_mode", mode, "--step_cache", 0.1)
    latents = []
    for folder, split in (("one", ()), ("two", ("--split_blocks", "auto"))):
        base = ("--dit", tiny_model.dit, *encoders, "--prompt", "a", *SAMPLING, *lora, "--save_path", tmp_path / folder)
        assert call_script("hv_generate_video", *base, "--infer_steps", 5, *split).status == 0
        latents.append(load_file(next((tmp_path / folder).glob("*.safetensors")))["latent"])
    assert same(latents[:1], latents[1:])
    assert "--split_blocks auto: " in caplog.text and "blocks by device: " in caplog.text
