"""Every attention mode against the softmax written out, with stand-ins for packages that need a GPU."""

import math
import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from hunyuan_model.transformer import attention
from hunyuan_model.transformer.attention import ATTENTION_MODES, check_attention_device, check_attention_dtype, make_attention
from utils.errors import UserError

PACKAGES = {"flash": "flash_attn", "xformers": "xformers", "sageattn": "sageattention"}


def written_out(q, k, v, lengths):
    """Softmax attention of each sample's valid rows, in float64."""
    out = torch.zeros(*q.shape[:2], q.shape[2] * q.shape[3], dtype=torch.float64)
    for i, n in enumerate(lengths):
        qi, ki, vi = (x[i, :n].double().transpose(0, 1) for x in (q, k, v))
        weights = (qi @ ki.transpose(1, 2) / math.sqrt(q.shape[3])).softmax(-1)
        out[i, :n] = (weights @ vi).transpose(0, 1).flatten(1)
    return out


def dense(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def varlen(q, k, v, offsets_q, offsets_k, longest_q, longest_k):
    """What the packed calls of flash-attn and SageAttention do: (total, H, D) with int32 offsets."""
    assert offsets_q.dtype == offsets_k.dtype == torch.int32 and q.ndim == 3
    ends = offsets_q.tolist()
    assert ends[0] == 0 and ends[-1] == len(q)
    lengths = [b - a for a, b in pairwise(ends)]
    assert longest_q == longest_k == max(lengths)
    return torch.cat([dense(*(x[a:b][None] for x in (q, k, v)))[0] for a, b in pairwise(ends)])


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins with the interfaces of the three packages; yields the list of calls made."""
    calls = []

    def recorded(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    def sageattn(q, k, v, tensor_layout):
        assert tensor_layout == "NHD"
        return dense(q, k, v)

    def memory_efficient_attention(q, k, v, attn_bias=None):
        if attn_bias is None:
            return dense(q, k, v)
        assert q.shape[0] == 1
        ends = torch.tensor([0, *attn_bias.lengths]).cumsum(0, dtype=torch.int32)
        return varlen(q[0], k[0], v[0], ends, ends, max(attn_bias.lengths), max(attn_bias.lengths))[None]

    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, lengths):
            mask = cls()
            mask.lengths = lengths
            return mask

    modules = {
        "flash_attn": {"flash_attn_func": recorded("dense", dense), "flash_attn_varlen_func": recorded("packed", varlen)},
        "sageattention": {"sageattn": recorded("dense", sageattn), "sageattn_varlen": recorded("packed", varlen)},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": recorded("xformers", memory_efficient_attention)},
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": BlockDiagonalMask},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def qkv(batch=3, rows=11, heads=2, dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, rows, heads, dim, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("lengths", [None, [11, 11, 11], [7, 7, 7], [11, 4, 9], [11, 0, 3], [0, 0, 0]])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_modes_compute_the_same(packages, mode, split, lengths):
    half = mode in ("flash", "sageattn")
    q, k, v = qkv(dtype=torch.bfloat16 if half else torch.float32)
    out = make_attention(mode, split)(q, k, v, lengths)
    assert out.dtype == q.dtype
    torch.testing.assert_close(
        out.double(), written_out(q, k, v, lengths or [11] * 3), atol=2e-2 if half else 2e-6, rtol=1e-2 if half else 1e-5
    )


@pytest.mark.parametrize("mode", ["flash", "sageattn", "xformers"])
@pytest.mark.parametrize(
    ("lengths", "split", "number"), [(None, False, 1), ([7, 7, 7], False, 1), ([7, 8, 7], False, 1), (None, True, 3)]
)
def test_number_of_kernel_calls(packages, mode, lengths, split, number):
    make_attention(mode, split)(*qkv(dtype=torch.bfloat16), lengths)
    assert len(packages) == number
    if mode != "xformers":
        assert set(packages) == {"packed" if lengths == [7, 8, 7] else "dense"}


def test_where_samples_begin_goes_to_the_device_once_and_nobody_waits(monkeypatch, packages):
    sent = []
    monkeypatch.setattr(attention, "to_device", lambda tensor, device: sent.append(device) or tensor)
    for _ in range(3):
        make_attention("flash")(*qkv(dtype=torch.bfloat16), [6, 8, 7])
    assert sent == [torch.device("cpu")]


@pytest.mark.parametrize("mode", ["torch", "xformers", "flash"])
@pytest.mark.parametrize("lengths", [[11, 4, 9], [5, 5, 5]])
def test_rows_past_the_length_have_no_influence(packages, mode, lengths):
    q, k, v = qkv(dtype=torch.bfloat16)
    attention = make_attention(mode)
    clean = attention(q, k, v, lengths)
    for i, n in enumerate(lengths):
        for x in (q, k, v):
            x[i, n:] = math.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, lengths)
    assert torch.equal(out, clean)
    out.sum().backward()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
        assert all(not leaf.grad[i, n:].any() for i, n in enumerate(lengths))


def test_gradients_match_the_softmax_written_out():
    lengths = [11, 4, 9]
    tensors = [x.requires_grad_() for x in qkv()]
    weight = torch.randn(3, 11, 16, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((make_attention("torch")(*tensors, lengths) * weight).sum(), tensors)
    theirs = torch.autograd.grad((written_out(*tensors, lengths) * weight).sum(), tensors)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_what_cannot_work_is_refused_with_a_way_out(monkeypatch):
    for mode, package in PACKAGES.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match="pip install"):
            make_attention(mode)
        with pytest.raises(UserError, match="needs a CUDA device"):
            check_attention_device(mode, torch.device("cpu"))
    with pytest.raises(UserError, match="torch, sdpa, flash, xformers, sageattn"):
        make_attention("flashy")
    check_attention_dtype("torch", torch.float32)
    with pytest.raises(UserError, match="bfloat16"):
        check_attention_dtype("flash", torch.float32)


def test_a_gpu_that_is_too_old_for_a_package_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "an old GPU")
    check_attention_device("xformers", torch.device("cuda"))
    with pytest.raises(UserError, match=r"flash needs .* 8.0 or later .* an old GPU has 7\.5"):
        check_attention_device("flash", torch.device("cuda"))
