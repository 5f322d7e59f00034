"""One video over several processes: each computes a part of the image tokens, and in the attention some heads of all of them.

That is Ulysses (https://arxiv.org/abs/2309.14509): exact, and attention over whole sequences is that which the user chose. Text
tokens are few: every process has them all. A block has three all-to-all, of the image's q, k and v, and one of what is attended.
There is no backward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from hunyuan_model.transformer.attention import Attention
from hunyuan_model.transformer.config import TransformerConfig
from utils.errors import UserError

logger = logging.getLogger(__name__)


def check_sequence_parallel(processes: int, config: TransformerConfig) -> None:
    """Raise a UserError for a number of processes that attention heads cannot be split over."""
    if config.heads % processes:
        fitting = [str(count) for count in range(2, config.heads + 1) if config.heads % count == 0]
        raise UserError(
            f"{processes} processes cannot compute one video together: this transformer has {config.heads} attention heads, which "
            f"each process needs the same number of. Start one process, {', '.join(fitting)}, or as many prompts as processes."
        )


def part_sizes(tokens: int, processes: int) -> list[int]:
    """How many image tokens each process computes: the same number, or one more in the first ones.

    Raises:
        UserError: there are fewer tokens than processes.
    """
    if tokens < processes:
        raise UserError(f"a video of {tokens} tokens is too small for {processes} processes; use one, or a larger video.")
    least, more = divmod(tokens, processes)
    return [least + (index < more) for index in range(processes)]


def enable_sequence_parallel(transformer: nn.Module, processes: int) -> None:
    """Have ``transformer`` compute its blocks together with the same transformer in all other processes, from outside.

    All must call it with the same inputs, and all get the same outputs. The network's classes and parameters stay. Call it once,
    before ``enable_compile``.

    Args:
        processes: those of torch.distributed's default group, which must exist.

    Raises:
        UserError: see ``check_sequence_parallel``.
    """
    check_sequence_parallel(processes, transformer.config)
    if processes != distributed.get_world_size():
        raise ValueError(f"{processes} processes were asked for, and the process group has {distributed.get_world_size()}")
    doubles, singles = transformer.double_blocks, transformer.single_blocks
    parts = _TokenParts(distributed.get_rank(), processes)
    attention = SequenceAttention(doubles[0].attention, parts)
    for block in (*doubles, *singles):
        block.attention = attention
    doubles[0].register_forward_pre_hook(parts.cut_image)
    for block in doubles:
        block.register_forward_pre_hook(parts.cut_image_rope)
    singles[0].register_forward_pre_hook(parts.make_rope)
    for block in singles:
        block.register_forward_pre_hook(parts.cut_rope)
    transformer.final_layer.register_forward_pre_hook(parts.cut_text_off)
    transformer.final_layer.register_forward_hook(parts.gather_image)
    logger.info("%d processes compute each video together, a part of its tokens each", processes)


def agreed(decision: bool, device: torch.device) -> bool:
    """The decision of the main process, in all: what is rounded differently must not lead processes different ways."""
    decided = torch.tensor([decision], dtype=torch.uint8, device=device)
    distributed.broadcast(decided, 0)
    return bool(decided)


class _TokenParts:
    """Which image tokens this process has in the forward pass that runs, and hooks that cut them and gather what they became."""

    def __init__(self, index: int, processes: int) -> None:
        self.index, self.processes = index, processes
        self.sizes: list[int] = []
        self._rope: Tensor | None = None  # for image and text tokens of this process

    @property
    def size(self) -> int:
        """How many image tokens this process has."""
        return self.sizes[self.index]

    @property
    def rows(self) -> slice:
        """Where they are among all."""
        start = sum(self.sizes[: self.index])
        return slice(start, start + self.size)

    def cut_image(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Of the first double block's inputs all image tokens become those of this process."""
        img, *others = inputs
        self.sizes = part_sizes(img.shape[1], self.processes)
        return img[:, self.rows], *others

    def cut_image_rope(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Of a double block's."""
        *tokens, rope, lengths = inputs
        return *tokens, rope[self.rows], lengths

    def make_rope(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Once for all single blocks, whose rotations are not neighbours in the table."""
        rope = inputs[2]
        self._rope = torch.cat((rope[self.rows], rope[sum(self.sizes) :]))

    def cut_rope(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Of a single block's inputs."""
        tokens, vec, _, lengths = inputs
        return tokens, vec, self._rope, lengths

    def cut_text_off(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The network takes as many rows as there are image tokens: text is among them here."""
        tokens, vec = inputs
        self._rope = None
        return tokens[:, : self.size], vec

    def gather_image(self, _: nn.Module, __: tuple[Any, ...], patches: Tensor) -> Tensor:
        """After the final layer, where a token is smallest: (B, own tokens, C) -> (B, tokens, C)."""
        rows = patches.transpose(0, 1).repeat(self.processes, 1, 1)
        gathered = rows.new_empty(sum(self.sizes), *rows.shape[1:])
        _exchange(gathered, rows, self.sizes, [self.size] * self.processes)
        return gathered.transpose(0, 1)


class SequenceAttention:
    """In place of a block's attention: takes and gives the tokens of this process, and attends over those of all."""

    mode = "sequence parallel"  # no compiler looks inside

    def __init__(self, attention: Attention, parts: _TokenParts) -> None:
        self.attention, self.parts = attention, parts
        self.split = attention.split

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """As ``Attention``, of (B, own image tokens and text tokens, H, D); ``lengths`` count the image tokens of all processes."""
        if torch.is_grad_enabled() and q.requires_grad:
            raise RuntimeError("sequence parallelism has no backward pass: compute without gradients")
        return self._to_tokens(self.attention(*(self._to_heads(x) for x in (q, k, v)), lengths))

    def _to_heads(self, x: Tensor) -> Tensor:
        """(B, own image and text tokens, H, D) -> (B, all image and text tokens, own H, D)."""
        parts, own = self.parts, self.parts.size
        image, text = x[:, :own], x[:, own:]
        by_process = image.unflatten(2, (parts.processes, -1)).permute(2, 1, 0, 3, 4)  # (processes, own tokens, B, own H, D)
        rows = by_process.flatten(0, 1).contiguous()
        all_tokens = sum(parts.sizes)
        joined = rows.new_empty(all_tokens + text.shape[1], *rows.shape[1:])
        joined[all_tokens:] = text.chunk(parts.processes, dim=2)[parts.index].transpose(0, 1)
        _exchange(joined[:all_tokens], rows, parts.sizes, [own] * parts.processes)
        return joined.transpose(0, 1)

    def _to_tokens(self, attended: Tensor) -> Tensor:
        """(B, all image and text tokens, own H * D) -> (B, own image and text tokens, H * D)."""
        parts = self.parts
        *images, text = attended.transpose(0, 1).split((*parts.sizes, attended.shape[1] - sum(parts.sizes)))
        rows = torch.cat([part for image in images for part in (image, text)])  # for each process its image tokens, and the text
        kept = parts.size + len(text)
        received = rows.new_empty(parts.processes * kept, *rows.shape[1:])
        _exchange(received, rows, [kept] * parts.processes, [size + len(text) for size in parts.sizes])
        return received.unflatten(0, (parts.processes, kept)).permute(2, 1, 0, 3).flatten(2)


def _exchange(output: Tensor, rows: Tensor, received: Sequence[int], sent: Sequence[int]) -> None:
    """All-to-all of rows of contiguous tensors: ``sent`` and ``received`` count those for and from each process, in their order."""
    # As bytes: gloo knows few dtypes.
    distributed.all_to_all_single(output.view(torch.uint8), rows.view(torch.uint8), list(received), list(sent))
