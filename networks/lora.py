"""LoRA (Hu et al. 2021, arXiv 2106.09685) for the linear layers of the transformer's blocks.

Follows the network-module contract of sd-scripts, so the trainer drives this module and third-party ones alike:
``create_network`` or ``create_network_from_weights``, then ``apply_to``. The base model is never edited: a LoRA module
takes the place of ``Linear.forward`` and calls the forward that stood there, whatever that is (plain, float8, ...).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hunyuan_model.quantization.linear import dequantized_weight, replace_weight
from networks.lora_files import lora_pairs, match_weights, read_lora, tensor_hashes, to_layout
from networks.lora_layouts import DEFAULT, DEFAULT_PREFIX, flat_name
from networks.lora_merging import LoraToMerge, MergePatch
from networks.lora_options import NetworkOptions
from utils.errors import UserError, name_some
from utils.safetensors_io import save_tensors

logger = logging.getLogger(__name__)

TARGET_BLOCKS = ("MMDoubleStreamBlock", "MMSingleStreamBlock")
DEFAULT_RANK = 4
DEFAULT_ALPHA = 1.0


class LoRAModule(nn.Module):
    """The low-rank update of one linear layer: ``base(x) + multiplier * alpha / rank * up(down(x))``.

    The factors are float32 parameters, computed in the dtype of x (or of autocast). Dropouts act in training only:

    - ``neuron_dropout`` drops single values after the down projection;
    - ``rank_dropout`` drops whole ranks, chosen for each sample, and scales the others up;
    - ``module_dropout`` leaves the update of this layer out altogether.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        *,
        multiplier: float = 1.0,
        neuron_dropout: float | None = None,
        rank_dropout: float | None = None,
        module_dropout: float | None = None,
    ):
        super().__init__()
        self.rank = rank
        self.multiplier = multiplier
        self.neuron_dropout = neuron_dropout or 0.0
        self.rank_dropout = rank_dropout or 0.0
        self.module_dropout = module_dropout or 0.0
        self.lora_down = nn.Linear(in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, out_features, bias=False)
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.scale = alpha / rank
        self.base_forward: Callable[[torch.Tensor], torch.Tensor] | None = None
        nn.init.kaiming_uniform_(self.lora_down.weight, a=5**0.5)
        nn.init.zeros_(self.lora_up.weight)

    def attach(self, linear: nn.Linear) -> None:
        """Take the place of ``linear.forward`` and keep the forward that stood there as the base."""
        if self.base_forward is not None:
            raise RuntimeError("this LoRA module is attached already; apply a network once")
        self.base_forward = linear.forward
        linear.forward = self.forward

    def set_alpha(self, alpha: float) -> None:
        """Change alpha and the scale that follows from it."""
        self.alpha.fill_(alpha)
        self.scale = alpha / self.rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), dtype of the base layer's output."""
        if self.multiplier == 0 or self._left_out():
            return self.base_forward(x)
        hidden = F.linear(x, self.lora_down.weight.to(x.dtype))  # (..., rank)
        if self.training:
            hidden = F.dropout(hidden, self.neuron_dropout)
            hidden = self._drop_ranks(hidden)
            hidden = self._maybe_without(hidden)
        # Scaling (..., rank) is the same update for a fraction of the memory traffic.
        hidden = hidden * (self.multiplier * self.scale)
        update = F.linear(hidden, self.lora_up.weight.to(hidden.dtype))
        # The base comes last: of its result no gradient depends, so a checkpointed block need not compute it once more.
        base = self.base_forward(x)
        return update.to(base.dtype).add_(base)  # in place: a third tensor of this size costs time and memory

    def _left_out(self) -> bool:
        if not self.training or self.module_dropout == 0 or torch.compiler.is_compiling():
            return False
        # Random on the CPU: no wait for the device, and activation checkpointing repeats it.
        return torch.rand(()).item() < self.module_dropout

    def _maybe_without(self, hidden: torch.Tensor) -> torch.Tensor:
        """In place of ``_left_out`` where a compiled graph cannot branch: the same dropout, with zeros for what is left out."""
        if self.module_dropout == 0 or not torch.compiler.is_compiling():
            return hidden
        return hidden * (torch.rand((), device=hidden.device) >= self.module_dropout)

    def _drop_ranks(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.rank_dropout == 0:
            return hidden
        shape = (hidden.shape[0], *(1,) * (hidden.dim() - 2), self.rank)
        kept = torch.rand(shape, device=hidden.device) >= self.rank_dropout
        return hidden * (kept.to(hidden.dtype) / (1.0 - self.rank_dropout))


class LoRANetwork(nn.Module):
    """LoRA modules by flat name (``lora_unet_double_blocks_0_img_attn_qkv``), for the linear layers at ``paths``.

    Its state dict is the sd-scripts file layout.
    """

    def __init__(self, loras: Mapping[str, LoRAModule], loraplus_lr_ratio: float | None = None):
        """``loras``: module by the dotted path of its linear layer in the transformer."""
        super().__init__()
        self.paths = {DEFAULT_PREFIX + flat_name(path): path for path in loras}
        for path, lora in loras.items():
            self.add_module(DEFAULT_PREFIX + flat_name(path), lora)
        self.loraplus_lr_ratio = loraplus_lr_ratio

    def loras(self) -> Iterator[LoRAModule]:
        """The LoRA modules, in the order of the transformer."""
        return (getattr(self, name) for name in self.paths)

    def apply_to(self, text_encoder: None, unet: nn.Module, apply_text_encoder: bool = False, apply_unet: bool = True) -> None:
        """Hook the linear layers of ``unet`` (the transformer). There are no text encoder modules: that is always None."""
        if apply_unet:
            for name, path in self.paths.items():
                getattr(self, name).attach(unet.get_submodule(path))

    def set_multiplier(self, multiplier: float) -> None:
        """Strength of the update; 0 is the base model."""
        for lora in self.loras():
            lora.multiplier = multiplier

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None = None, unet_lr: float = 1e-4, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups with their learning rates, and a name for each group.

        With LoRA+ (Hayou et al. 2024, arXiv 2402.12354) the up factors learn ``loraplus_lr_ratio`` times as fast.
        """
        learning_rate = default_lr if unet_lr is None else unet_lr
        if self.loraplus_lr_ratio is None:
            return [{"params": list(self.parameters()), "lr": learning_rate}], ["unet"]
        down = {"params": [lora.lora_down.weight for lora in self.loras()], "lr": learning_rate}
        up = {"params": [lora.lora_up.weight for lora in self.loras()], "lr": learning_rate * self.loraplus_lr_ratio}
        return [down, up], ["unet", "unet plus"]

    def prepare_grad_etc(self, text_encoder: None = None, unet: nn.Module | None = None) -> None:
        """Make the parameters trainable."""
        self.requires_grad_(True)

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        """The parameters whose gradients are clipped."""
        return self.parameters()

    def on_epoch_start(self, text_encoder: None = None, unet: nn.Module | None = None) -> None:
        """Called by the trainer before each epoch: switches the dropouts on."""
        self.train()

    def on_step_start(self) -> None:
        """Called by the trainer before each step; part of the contract, nothing is due for plain LoRA."""

    def load_weights(self, file: str | os.PathLike[str]) -> str:
        """Load a LoRA file of either layout into this network and return a line on what was loaded.

        Raises:
            UserError: its modules or ranks are not exactly those of this network.
        """
        weights = read_lora(file).tensors
        own = self.state_dict()
        fresh, foreign = own.keys() - weights.keys(), weights.keys() - own.keys()
        if fresh or foreign:
            raise UserError(
                f"{file} holds a LoRA whose modules do not match the network: {len(foreign)} keys are not in the network "
                f"({name_some(sorted(foreign), 3) or 'none'}), {len(fresh)} keys are not in the file "
                f"({name_some(sorted(fresh), 3) or 'none'}). "
                "Use the --network_args it was trained with, or --dim_from_weights to take the modules from the file."
            )
        unlike = [name for name in own if own[name].shape != weights[name].shape]
        if unlike:
            first = sorted(unlike)[0]
            raise UserError(
                f"{file} holds a LoRA of another shape than the network: {first} is {tuple(weights[first].shape)}, not "
                f"{tuple(own[first].shape)}. Give its rank as --network_dim, or use --dim_from_weights."
            )
        self.load_state_dict(weights)
        for lora in self.loras():
            lora.set_alpha(lora.alpha.item())
        return f"{len(self.paths)} LoRA modules loaded from {file}"

    def save_weights(
        self, file: str | os.PathLike[str], dtype: torch.dtype | None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write the LoRA in the sd-scripts layout, as a whole file or not at all.

        Args:
            file: a ``.safetensors`` path.
            dtype: of the factors in the file; None keeps float32. Alphas are always float32.
            metadata: strings for the header; with any, the two sd-scripts hashes of the tensors are added.
        """
        if Path(file).suffix != ".safetensors":
            raise UserError(f"a LoRA is saved as a .safetensors file, but {file} was asked for.")
        tensors = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        if dtype is not None:
            tensors = {name: tensor if name.endswith(".alpha") else tensor.to(dtype) for name, tensor in tensors.items()}
        save_tensors(file, tensors, {**metadata, **tensor_hashes(tensors, metadata)} if metadata else None)

    @torch.no_grad()
    def merge_to(
        self,
        text_encoder: None,
        unet: nn.Module,
        weights_sd: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add the update to the weights of ``unet``, computed in float32. The network must not be applied as well.

        Args:
            weights_sd: LoRA tensors of either layout; None means the ones of this network.
            dtype: of the merged weights; None keeps the way in which each is stored (float8 and its scales included).
            device: where to compute; None means where each weight is. The weight stays where it is.
        """
        shapes = {name: tuple(weight.shape) for name, weight in unet.named_parameters()}
        tensors = self.state_dict() if weights_sd is None else weights_sd
        lora = LoraToMerge(tensors, next(self.loras()).multiplier, "the LoRA")
        patch = MergePatch([lora], shapes)
        for name in patch.names:
            linear = unet.get_submodule(name.removesuffix(".weight"))
            replace_weight(linear, patch(name, dequantized_weight(linear, device)), dtype)

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm_value: float, device: torch.device | str | None = None
    ) -> tuple[int, float, float]:
        """Scale updates whose Frobenius norm exceeds ``max_norm_value`` down to it (both factors alike).

        Returns:
            How many modules were scaled, and the mean and the largest norm afterwards.
        """
        loras = list(self.loras())
        norms = torch.stack([self._update_norm(lora) for lora in loras])
        ratios = (max_norm_value / norms.clamp(min=1e-12)).clamp(max=1.0)
        for lora, root in zip(loras, ratios.sqrt()):
            lora.lora_down.weight.mul_(root)
            lora.lora_up.weight.mul_(root)
        scaled = norms * ratios
        changed, mean, largest = torch.stack(((ratios < 1).sum().to(scaled), scaled.mean(), scaled.max())).tolist()
        return int(changed), mean, largest

    @staticmethod
    def _update_norm(lora: LoRAModule) -> torch.Tensor:
        down, up = lora.lora_down.weight, lora.lora_up.weight
        # |up @ down|^2 = sum((up^T up) * (down down^T)): rank x rank instead of a full weight.
        squared = ((up.T @ up) * (down @ down.T)).sum()
        return squared.clamp(min=0).sqrt() * abs(lora.scale)


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: object,
    text_encoder: object,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> LoRANetwork:
    """A fresh LoRA for the linear layers of the transformer's blocks; its update is zero until trained.

    Args:
        network_dim: rank, 4 by default.
        network_alpha: 1 by default; 0 means the rank.
        vae, text_encoder: part of the contract, not read.
        unet: the transformer.
        network_args: text or typed values of ``exclude_patterns``, ``include_patterns``, ``loraplus_lr_ratio``,
            ``rank_dropout``, ``module_dropout``, ``dropout`` (the same as neuron_dropout) and ``verbose``.

    Raises:
        UserError: an unknown or malformed argument, or no linear layer left.
    """
    options = NetworkOptions(network_args, neuron_dropout)
    rank = DEFAULT_RANK if network_dim is None else network_dim
    if rank < 1:
        raise UserError(f"the rank of a LoRA (--network_dim) must be at least 1, but it is {rank}.")
    alpha = DEFAULT_ALPHA if network_alpha is None else float(network_alpha)
    if alpha < 0:
        raise UserError(f"the alpha of a LoRA (--network_alpha) must not be negative, but it is {alpha}.")
    targets = {path: linear for path, linear in _block_linears(unet) if options.takes(path)}
    if not targets:
        raise UserError(
            "no linear layer is left for the LoRA: the model has no "
            f"{' or '.join(TARGET_BLOCKS)}, or exclude_patterns removes everything."
        )
    return _build(targets, {path: (rank, alpha or float(rank)) for path in targets}, multiplier, options)


def create_network_from_weights(
    multiplier: float,
    file: str | os.PathLike[str] | None,
    vae: object,
    text_encoder: object,
    unet: nn.Module,
    weights_sd: Mapping[str, torch.Tensor] | None = None,
    for_inference: bool = False,
    **network_args: Any,
) -> tuple[LoRANetwork, dict[str, torch.Tensor]]:
    """A LoRA with the modules, ranks, alphas and weights of a file, and its tensors in the sd-scripts layout.

    Any linear layer of the transformer may be named by the file. Patterns in ``network_args`` are refused, the file
    decides; the other arguments are those of ``create_network``.

    Args:
        file: LoRA of either layout; not read if ``weights_sd`` is given.
        for_inference: no gradients and no dropout.

    Raises:
        UserError: not a LoRA, or its modules do not match the model.
    """
    source = str(file) if file is not None else "the given LoRA"
    weights = read_lora(file).tensors if weights_sd is None else to_layout(weights_sd, DEFAULT, source)
    options = NetworkOptions(network_args, network_args.pop("neuron_dropout", None))
    if options.has_patterns:
        raise UserError(
            "exclude_patterns and include_patterns cannot be used with --dim_from_weights: the file says which modules."
        )
    linears = {path: module for path, module in unet.named_modules() if isinstance(module, nn.Linear)}
    shapes = {f"{path}.weight": (linear.out_features, linear.in_features) for path, linear in linears.items()}
    pairs = lora_pairs(weights, source)
    names = match_weights({flat: (pair.up.shape[0], pair.down.shape[1]) for flat, pair in pairs.items()}, shapes, source)
    sizes = {names[flat].removesuffix(".weight"): (pair.rank, pair.alpha) for flat, pair in pairs.items()}
    network = _build({path: linear for path, linear in linears.items() if path in sizes}, sizes, multiplier, options)
    network.load_state_dict(weights)
    if for_inference:
        network.eval().requires_grad_(False)
    return network, weights


def _block_linears(unet: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for block_path, block in unet.named_modules():
        if type(block).__name__ in TARGET_BLOCKS:
            for path, module in block.named_modules(prefix=block_path):
                if isinstance(module, nn.Linear):
                    yield path, module


def _build(
    targets: Mapping[str, nn.Linear],
    sizes: Mapping[str, tuple[int, float]],
    multiplier: float,
    options: NetworkOptions,
) -> LoRANetwork:
    loras = {}
    for path, linear in targets.items():
        rank, alpha = sizes[path]
        loras[path] = LoRAModule(
            linear.in_features,
            linear.out_features,
            rank,
            alpha,
            multiplier=multiplier,
            neuron_dropout=options.neuron_dropout,
            rank_dropout=options.rank_dropout,
            module_dropout=options.module_dropout,
        )
        if options.verbose:
            logger.info("LoRA on %s: rank %d, alpha %g", path, rank, alpha)
    logger.info("LoRA for %d linear layers", len(loras))
    return LoRANetwork(loras, options.loraplus_lr_ratio)
