"""The transformer against reference outputs and gradients, and what must not influence it."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from variations import slow_but

from hunyuan_model.transformer.attention import make_attention
from hunyuan_model.transformer.config import transformer_config_from_shapes
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from hunyuan_model.transformer.rope import rotation_table
from utils.errors import UserError
from utils.safetensors_io import read_tensors

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
CASES = ["caseA", "caseB", "caseC", "caseD"]
INPUTS = ["x", "t", "text", "text_mask", "text2", "guidance"]


@pytest.fixture(scope="module")
def weights():
    return read_tensors(GOLDENS / "dit.safetensors").tensors


@pytest.fixture(scope="module")
def reference():
    return read_tensors(GOLDENS / "dit_io.safetensors").tensors


def build(weights, dtype=torch.float32, **attention):
    config = transformer_config_from_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()})
    model = HYVideoDiffusionTransformer(config, make_attention(**attention))
    model.load_state_dict(weights)
    return model.to(dtype)


@pytest.fixture
def model(weights):
    return build(weights)


def inputs_of(reference, case):
    return [reference[f"{case}.{name}"].clone() for name in INPUTS]


def random_inputs(lengths, size=(2, 4, 6), rows=16, seed=0):
    """Inputs for the tiny reference model, one sample per entry of lengths."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    x = torch.randn(batch, 16, *size, generator=generator)
    text = torch.randn(batch, rows, 48, generator=generator)
    mask = (torch.arange(rows) < torch.tensor(lengths)[:, None]).long()
    t = torch.rand(batch, generator=generator) * 1000
    return [x, t, text, mask, torch.randn(batch, 24, generator=generator), torch.full((batch,), 6000.0)]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_outputs(weights, reference, case, split):
    with torch.no_grad():
        out = build(weights, split=split)(*inputs_of(reference, case))
    torch.testing.assert_close(out, reference[f"{case}.out"], atol=2e-5, rtol=1e-4)


def test_gradients(model, reference):
    inputs = inputs_of(reference, "caseB")
    x, _, text, _, text2, _ = inputs
    for leaf in (x, text, text2):
        leaf.requires_grad_()
    loss = model(*inputs).square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(0.782578706741333, rel=1e-5)
    assert not text.grad[:, 9:].any()
    parameters = dict(model.named_parameters())
    prefix = "caseB.grad_param."
    expected = {name.removeprefix(prefix): tensor for name, tensor in reference.items() if name.startswith(prefix)}
    assert len(expected) == 11
    pairs = {name: (parameters[name].grad, tensor) for name, tensor in expected.items()}
    pairs |= {"x": (x.grad, reference["caseB.grad_x"]), "text": (text.grad, reference["caseB.grad_text"])}
    pairs["text2"] = (text2.grad, reference["caseB.grad_text2"])
    for name, (ours, theirs) in pairs.items():
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name


@pytest.mark.parametrize("case", ["caseA", "caseC"])
@pytest.mark.parametrize(
    ("weight_dtype", "input_dtype", "autocast"),
    [
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float32, torch.bfloat16, True),
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, False),
    ],
)
def test_bfloat16(weights, reference, case, weight_dtype, input_dtype, autocast):
    inputs = inputs_of(reference, case)
    for index in (0, 2, 4):
        inputs[index] = inputs[index].to(input_dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = build(weights, weight_dtype)(*inputs)
    assert out.dtype == input_dtype
    difference = out.float() - reference[f"{case}.out"]
    assert difference.abs().max() <= 0.08 and difference.square().mean().sqrt() <= 0.02


def test_gradients_flow_in_bfloat16(weights, reference):
    model = build(weights, torch.bfloat16)
    inputs = inputs_of(reference, "caseB")
    inputs[0] = inputs[0].to(torch.bfloat16).requires_grad_()
    model(*inputs).float().square().mean().backward()
    expected = reference["caseB.grad_x"]
    assert (inputs[0].grad.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("garbage", [math.nan, -1e30])
@pytest.mark.parametrize("lengths", [[9], [0, 7]])
def test_padding_rows_have_no_influence(model, lengths, garbage):
    inputs = random_inputs(lengths)
    inputs[2].masked_fill_(inputs[3][..., None] == 0, 0)
    clean = model(*inputs)
    clean.square().mean().backward()
    clean_gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()

    inputs[2].masked_fill_(inputs[3][..., None] == 0, garbage)
    inputs[2].requires_grad_()
    out = model(*inputs)
    out.square().mean().backward()
    assert torch.equal(out, clean)
    assert inputs[2].grad.isfinite().all() and not inputs[2].grad[inputs[3] == 0].any()
    for parameter, expected in zip(model.parameters(), clean_gradients):
        assert torch.equal(parameter.grad, expected)


@pytest.mark.parametrize("lengths", [[0], [0, 0], [0, 7]])
def test_an_empty_prompt_is_the_image_alone(model, lengths):
    inputs = random_inputs(lengths)
    with torch.no_grad():
        out = model(*inputs)
        assert out.isfinite().all()
        inputs[2][0] = torch.randn(16, 48)  # no row of sample 0 is valid, so its text cannot matter
        assert torch.equal(model(*inputs)[0], out[0])
        inputs[3][0, 0] = 1
        assert not torch.allclose(model(*inputs)[0], out[0], atol=1e-3)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("lengths", [[3, 16, 8], [0, 6], [5, 5]])
def test_a_batch_is_its_samples(weights, lengths, split):
    model = build(weights, split=split)
    inputs = random_inputs(lengths)
    with torch.no_grad():
        out = model(*inputs)
        singles = [model(*(tensor[i : i + 1] for tensor in inputs)) for i in range(len(lengths))]
    torch.testing.assert_close(out, torch.cat(singles), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[9], [9, 9], [3, 12]])
def test_no_attention_mask_is_built(model, monkeypatch, lengths):
    keys = []
    real = F.scaled_dot_product_attention

    def spy(q, k, v, *args, **kwargs):
        assert not args and kwargs.get("attn_mask") is None
        keys.append(k.shape[2])
        return real(q, k, v, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model(*random_inputs(lengths, size=(2, 6, 8)))
    blocks = [rows for rows in keys if rows > 16]  # the token refiner sees at most the 16 text rows
    assert blocks == 5 * [24 + length for length in dict.fromkeys(lengths)]


def test_guidance(weights, reference):
    model = build(weights)
    inputs = inputs_of(reference, "caseA")
    with pytest.raises(ValueError, match="guidance"):
        model(*inputs[:5])
    without = build({name: tensor for name, tensor in weights.items() if not name.startswith("guidance_in.")})
    assert not without.config.guidance
    with torch.no_grad():
        torch.nn.init.zeros_(model.guidance_in.mlp[2].weight)
        torch.nn.init.zeros_(model.guidance_in.mlp[2].bias)
        assert torch.equal(without(*inputs[:5]), model(*inputs))


@pytest.mark.parametrize("lengths", slow_but([None, [5, 13]], [5, 13]))
def test_blocks_trace_into_one_graph(model, lengths):
    """Each block compiles without a graph break (traced only: no code generator is needed)."""
    torch.manual_seed(0)
    batch, image, text = 2, 8, 13
    lengths = lengths and [image + n for n in lengths]
    rope = rotation_table((2, 2, 2), model.config.rope_dims, model.config.rope_theta, torch.device("cpu"), text)
    img, txt, vec = torch.randn(batch, image, 48), torch.randn(batch, text, 48), torch.randn(batch, 48)
    double, single = model.double_blocks[0], model.single_blocks[0]
    torch._dynamo.reset()
    traced_double = torch.compile(double, backend="eager", fullgraph=True)
    traced_single = torch.compile(single, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            traced_double(img, txt, vec, rope[:image], lengths), double(img, txt, vec, rope[:image], lengths), atol=1e-5, rtol=1e-4
        )
        tokens = torch.cat((img, txt), dim=1)
        torch.testing.assert_close(
            traced_single(tokens, vec, rope, lengths), single(tokens, vec, rope, lengths), atol=1e-5, rtol=1e-4
        )


def test_inputs_that_do_not_fit_are_refused(model):
    for size in ((1, 5, 6), (1, 6, 5)):
        with pytest.raises(UserError, match="divisible by 16"):
            model(*random_inputs([4], size=size))
    inputs = random_inputs([4])
    inputs[3] = inputs[3].flip(1)
    with pytest.raises(UserError, match="right"):
        model(*inputs)
