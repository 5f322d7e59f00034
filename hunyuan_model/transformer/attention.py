"""Attention among the valid rows of each sample, computed by torch or by one of several packages.

No N x N mask is ever built, as a mask keeps torch from its fast kernels: samples of one length are one dense call, others are
computed one by one or packed end to end.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.devices import to_device
from utils.errors import UserError

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]
Packed = Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Attention:
    """Callable: attention of every row over the valid rows of its own sample.

    Attributes:
        mode: name the user chose.
        dense: (B, L, H, D) x 3 -> (B, L, H, D), all rows valid.
        packed: (1, sum of lengths, H, D) x 3 and the lengths -> (1, sum of lengths, H, D), each sample for itself; None
            where the package has no such call.
        split: compute sample by sample even where one call would do; costs speed, saves memory.
    """

    mode: str
    dense: Dense
    packed: Packed | None = None
    split: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Attention with scale 1/sqrt(D).

        Args:
            q, k, v: (B, L, H, D), one dtype.
            lengths: number of valid rows of each sample, which come first; None if all rows are valid.

        Returns:
            (B, L, H * D); rows past a sample's length are zero.
        """
        batch, rows = q.shape[:2]
        if lengths is None:
            if not self.split or batch == 1:
                return self.dense(q, k, v).flatten(2)
            lengths = [rows] * batch
        if not self.split and len(set(lengths)) == 1:
            return self._dense_part(q, k, v, lengths[0])
        if self.packed is not None and not self.split and min(lengths) > 0:
            return self._packed_parts(q, k, v, tuple(lengths))
        samples = range(batch)
        return torch.cat([self._dense_part(q[i : i + 1], k[i : i + 1], v[i : i + 1], lengths[i]) for i in samples])

    def _dense_part(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        if length == 0:
            return q.new_zeros(*q.shape[:2], q.shape[2] * q.shape[3])
        return _pad_rows(self.dense(q[:, :length], k[:, :length], v[:, :length]).flatten(2), q.shape[1])

    def _packed_parts(self, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        q_packed, k_packed, v_packed = (
            torch.cat([sample[:length] for sample, length in zip(tensor, lengths)])[None] for tensor in (q, k, v)
        )
        parts = self.packed(q_packed, k_packed, v_packed, lengths)[0].flatten(1).split(lengths)
        return torch.stack([_pad_rows(part, q.shape[1]) for part in parts])


def make_attention(mode: str = "torch", split: bool = False) -> Attention:
    """The attention called ``mode``: torch (also called sdpa), flash, xformers or sageattn.

    Raises:
        UserError: unknown mode, or its package is not installed.
    """
    return Attention(mode, *_known(mode).make(), split)


def check_attention_device(mode: str, device: torch.device) -> None:
    """Raise a UserError where ``mode`` cannot run on ``device``: the packages' kernels need CUDA, and some a newer GPU."""
    known = _known(mode)
    if not known.needs_cuda:
        return
    if device.type != "cuda":
        raise UserError(f"attention mode {mode} needs a CUDA device, but this runs on {device}; use torch (in training: --sdpa).")
    if known.capability is None or torch.version.hip is not None:
        return
    found, needed = torch.cuda.get_device_capability(device), known.capability
    if found < needed:
        raise UserError(
            f"attention mode {mode} needs an NVIDIA GPU of compute capability {needed[0]}.{needed[1]} or later (Ampere), but "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}; use torch."
        )


def check_attention_dtype(mode: str, dtype: torch.dtype) -> None:
    """Raise a UserError where ``mode`` has no kernels for tensors of ``dtype``."""
    if _known(mode).half_only and dtype not in (torch.float16, torch.bfloat16):
        raise UserError(
            f"attention mode {mode} computes in float16 or bfloat16 only, but the transformer runs in {dtype}. "
            "Load it in bfloat16 (in training, bf16 mixed precision will do), or choose attention mode torch."
        )


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    """(..., L, C) -> (..., rows, C) with zeros below."""
    return x if x.shape[-2] == rows else F.pad(x, (0, 0, 0, rows - x.shape[-2]))


@lru_cache(maxsize=16)
def _row_offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each packed sample starts, and the end: (B + 1,) int32. Cached: every block of a forward pass asks for it."""
    with torch.inference_mode(False):
        offsets = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return to_device(offsets, device)


def _import(module: str, package: str, mode: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"attention mode {mode} needs the package {package}, which cannot be imported ({error}). "
            f"Install it with: pip install {package}  - or choose attention mode torch."
        ) from error


def _make_torch() -> tuple[Dense, None]:
    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)

    return dense, None


def _make_flash() -> tuple[Dense, Packed]:
    flash = _import("flash_attn", "flash-attn", "flash")

    def packed(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        offsets, longest = _row_offsets(lengths, q.device), max(lengths)
        return flash.flash_attn_varlen_func(q[0], k[0], v[0], offsets, offsets, longest, longest)[None]

    return flash.flash_attn_func, packed


def _make_xformers() -> tuple[Dense, Packed]:
    ops = _import("xformers.ops", "xformers", "xformers")
    bias = _import("xformers.ops.fmha.attn_bias", "xformers", "xformers")
    # Cached because making one copies the lengths to the device.
    block_diagonal = lru_cache(maxsize=16)(lambda lengths: bias.BlockDiagonalMask.from_seqlens(list(lengths)))

    def packed(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        return ops.memory_efficient_attention(q, k, v, attn_bias=block_diagonal(lengths))

    return ops.memory_efficient_attention, packed


def _make_sageattn() -> tuple[Dense, Packed]:
    sage = _import("sageattention", "sageattention", "sageattn")

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sage.sageattn(q, k, v, tensor_layout="NHD")

    def packed(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        offsets, longest = _row_offsets(lengths, q.device), max(lengths)
        return sage.sageattn_varlen(q[0], k[0], v[0], offsets, offsets, longest, longest)[None]

    return dense, packed


@dataclass(frozen=True)
class AttentionMode:
    """A row of ATTENTION_MODES: what makes ``dense`` and ``packed`` of an ``Attention``, and where that can run."""

    make: Callable[[], tuple[Dense, Packed | None]]
    trainable: bool = True  # has a backward pass
    needs_cuda: bool = True
    half_only: bool = False  # computes in float16 and bfloat16 only
    capability: tuple[int, int] | None = None  # the least compute capability of an NVIDIA GPU that there are kernels for


ATTENTION_MODES = {
    "torch": AttentionMode(_make_torch, needs_cuda=False),
    "sdpa": AttentionMode(_make_torch, needs_cuda=False),
    "flash": AttentionMode(_make_flash, half_only=True, capability=(8, 0)),
    "xformers": AttentionMode(_make_xformers),
    "sageattn": AttentionMode(_make_sageattn, trainable=False, half_only=True, capability=(8, 0)),
}

# Of the attention above, with a backward pass: each gives a tuple of the output, the log-sum-exps and what is small. What older
# releases of packages call is no operator of torch, and attention that torch puts together from products has none of its own.
OPERATORS = frozenset(
    (
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "xformers_flash::flash_fwd",
        "aten::_efficient_attention_forward",
    )
)


def _known(mode: str) -> AttentionMode:
    if mode not in ATTENTION_MODES:
        raise UserError(f"there is no attention mode {mode!r}; use one of {', '.join(ATTENTION_MODES)}.")
    return ATTENTION_MODES[mode]
