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

from hunyuan_model.quantization.linear import QuantizedForward, dequantized_weight, replace_weight
from networks.formats.layouts import DEFAULT_PREFIX, flat_name
from networks.formats.reading import fit_to_model, lora_of, read_lora
from networks.formats.updates import LowRank
from networks.formats.writing import plain_network, tensor_hashes
from networks.lora_options import LoraOptions
from networks.low_rank import add_low_rank_product, low_rank_product
from networks.merging import LoraToMerge, MergePatch
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
        self.base_is_product = False
        nn.init.kaiming_uniform_(self.lora_down.weight, a=5**0.5)
        nn.init.zeros_(self.lora_up.weight)

    def attach(self, linear: nn.Linear) -> None:
        """Take the place of ``linear.forward`` and keep the forward that stood there as the base."""
        if self.base_forward is not None:
            raise RuntimeError("this LoRA module is attached already; apply a network once")
        self.base_forward = linear.forward
        self.base_is_product = _is_product(self.base_forward)
        linear.forward = self.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), dtype of the base layer's output."""
        if self.multiplier == 0:
            return self.base_forward(x)
        module_dropout = self.module_dropout if self.training else 0.0
        compiling = torch.compiler.is_compiling()
        # Random on the CPU: no wait for the device, and activation checkpointing repeats it.
        if module_dropout > 0 and not compiling and torch.rand(()).item() < module_dropout:
            return self.base_forward(x)
        scale = self.multiplier * self.scale
        if not compiling:
            device = x.device.type
            x = x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)
            down, up = self.lora_down.weight.to(x.dtype), self.lora_up.weight.to(x.dtype)
            return add_low_rank_product(self.base_forward, x, down, up, scale, self._dropped, self.base_is_product)
        hidden = self._dropped(F.linear(x, self.lora_down.weight.to(x.dtype)))
        if module_dropout > 0:  # a compiled graph cannot branch: zeros for what is left out
            hidden = hidden * (torch.rand((), device=hidden.device) >= module_dropout)
        update, base = low_rank_product(hidden, self.lora_up.weight, scale), self.base_forward(x)
        return update.to(base.dtype) + base

    def _dropped(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., rank) with dropouts, in training."""
        if not self.training:
            return hidden
        hidden = F.dropout(hidden, self.neuron_dropout)
        if self.rank_dropout > 0:
            shape = (hidden.shape[0], *(1,) * (hidden.dim() - 2), self.rank)
            kept = torch.rand(shape, device=hidden.device) >= self.rank_dropout
            hidden = hidden * (kept.to(hidden.dtype) / (1.0 - self.rank_dropout))
        return hidden


def _is_product(forward: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether ``forward`` makes its result and its gradient anew; others may give what somebody else has as well."""
    owner = getattr(forward, "__self__", None)
    if isinstance(owner, LoRAModule):
        return owner.base_is_product
    return getattr(forward, "__func__", None) in (nn.Linear.forward, QuantizedForward.forward)


class LoRANetwork(nn.Module):
    """LoRA modules by flat name (``lora_unet_double_blocks_0_img_attn_qkv``). Its state dict is the sd-scripts file layout."""

    def __init__(
        self, linears: Mapping[str, nn.Linear], sizes: Mapping[str, tuple[int, float]], multiplier: float, options: LoraOptions
    ):
        """Modules for ``linears``, the layers by their paths in the transformer, with the rank and the alpha of each."""
        super().__init__()
        self.paths = {DEFAULT_PREFIX + flat_name(path): path for path in linears}
        self.loraplus_lr_ratio = options.loraplus_lr_ratio
        self.verbose = options.verbose
        dropouts = (options.dropout, options.rank_dropout, options.module_dropout)
        for (path, linear), name in zip(linears.items(), self.paths):
            lora = LoRAModule(linear.in_features, linear.out_features, *sizes[path], multiplier, *dropouts)
            self.add_module(name, lora)

    def loras(self) -> Iterator[LoRAModule]:
        """The LoRA modules, in the order of the transformer."""
        return (getattr(self, name) for name in self.paths)

    def apply_to(self, text_encoder: None, unet: nn.Module, apply_text_encoder: bool = False, apply_unet: bool = True) -> None:
        """Hook the linear layers of ``unet`` (the transformer). There are no text encoder modules: that is always None."""
        if not apply_unet:
            return
        for lora, path in zip(self.loras(), self.paths.values()):
            lora.attach(unet.get_submodule(path))
            if self.verbose:
                logger.info("LoRA on %s: rank %d, alpha %g", path, lora.rank, lora.scale * lora.rank)
        logger.info("LoRA for %d linear layers", len(self.paths))

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
        if not self.loraplus_lr_ratio:
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
        """Load a LoRA file of any layout, with exactly this network's modules and ranks; returns a line on what was loaded."""
        weights, own = _network_tensors(plain_network(read_lora(file))), self.state_dict()
        shapes, own_shapes = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (weights, own))
        if shapes != own_shapes:
            unlike = sorted(name for name in shapes | own_shapes if shapes.get(name) != own_shapes.get(name))
            raise UserError(
                f"{file} holds a LoRA that does not match the network: {len(unlike)} keys have another shape or are in only one "
                f"of the two ({name_some(unlike, 3)}). Give the --network_dim and --network_args it was trained with, or use "
                "--dim_from_weights."
            )
        self.load_state_dict(weights)
        for lora in self.loras():
            lora.scale = lora.alpha.item() / lora.rank
        return f"{len(self.paths)} LoRA modules loaded from {file}"

    def save_weights(
        self, file: str | os.PathLike[str], dtype: torch.dtype | None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write the LoRA in the sd-scripts layout, as a whole file or not at all.

        Args:
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
            weights_sd: LoRA tensors of any layout; None means the ones of this network.
            dtype: of the merged weights; None keeps the way in which each is stored (float8 and its scales included).
            device: where to compute; None means where each weight is. The weight stays where it is.
        """
        shapes = {name: tuple(weight.shape) for name, weight in unet.named_parameters()}
        file = lora_of(self.state_dict() if weights_sd is None else weights_sd, {}, "the LoRA")
        patch = MergePatch([LoraToMerge(file, next(self.loras()).multiplier)], shapes)
        for name in patch.names:
            module, _, parameter = name.rpartition(".")
            owner = unet.get_submodule(module)
            if isinstance(owner, nn.Linear) and parameter == "weight":
                replace_weight(owner, patch(name, dequantized_weight(owner, device)), dtype)
            else:
                unet.get_parameter(name).copy_(patch(name, unet.get_parameter(name)))

    @torch.no_grad()
    def update_norms(self) -> torch.Tensor:
        """The Frobenius norm of each module's update (modules,), in the order of ``loras``."""
        norms = []
        for lora in self.loras():
            down, up = lora.lora_down.weight, lora.lora_up.weight
            # |up @ down|^2 = sum((up^T up) * (down down^T)): rank x rank instead of a full weight.
            squared = ((up.T @ up) * (down @ down.T)).sum()
            norms.append(squared.clamp(min=0).sqrt() * abs(lora.scale))
        return torch.stack([norm.to(norms[0].device) for norm in norms])  # of layers on other devices, too

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm_value: float, device: torch.device | str | None = None
    ) -> tuple[int, float, float]:
        """Scale updates whose Frobenius norm exceeds ``max_norm_value`` down to it (both factors alike).

        Returns how many modules were scaled, and the mean and the largest norm afterwards.
        """
        norms = self.update_norms()
        ratios = (max_norm_value / norms.clamp(min=1e-12)).clamp(max=1.0)
        for lora, root in zip(self.loras(), ratios.sqrt()):
            root = root.to(lora.lora_down.weight.device)
            lora.lora_down.weight.mul_(root)
            lora.lora_up.weight.mul_(root)
        scaled = norms * ratios
        changed, mean, largest = torch.stack(((ratios < 1).sum().to(scaled), scaled.mean(), scaled.max())).tolist()
        return int(changed), mean, largest


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
        network_args: the fields of ``LoraOptions``, as text or typed; ``dropout`` is the same as neuron_dropout.

    Raises:
        UserError: an unknown or malformed argument, or no linear layer left.
    """
    options = LoraOptions.of(network_args, neuron_dropout)
    linears = {
        path: module
        for block_path, block in unet.named_modules()
        if type(block).__name__ in TARGET_BLOCKS
        for path, module in block.named_modules(prefix=block_path)
        if isinstance(module, nn.Linear)
    }
    chosen = options.chosen(list(linears))
    linears = {path: module for path, module in linears.items() if path in chosen}
    if not linears:
        raise UserError(
            f"no linear layer is left for the LoRA: --network_args exclude_patterns removes all of {' and '.join(TARGET_BLOCKS)}."
        )
    rank = DEFAULT_RANK if network_dim is None else network_dim
    alpha = DEFAULT_ALPHA if network_alpha is None else network_alpha or float(rank)
    return LoRANetwork(linears, dict.fromkeys(linears, (rank, alpha)), multiplier, options)


def create_network_from_weights(
    multiplier: float,
    file: str | os.PathLike[str] | None,
    vae: object,
    text_encoder: object,
    unet: nn.Module,
    weights_sd: Mapping[str, torch.Tensor] | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> tuple[LoRANetwork, dict[str, torch.Tensor]]:
    """A LoRA with the modules, ranks, alphas and weights of a file, and its tensors in the sd-scripts layout.

    Any linear layer of the transformer may be named by the file. Patterns in ``network_args`` are refused, the file
    decides; the other arguments are those of ``create_network``.

    Args:
        file: LoRA of any layout; not read if ``weights_sd`` is given.
        for_inference: no gradients and no dropout.
    """
    lora = read_lora(file) if weights_sd is None else lora_of(weights_sd, {}, str(file) if file is not None else "the given LoRA")
    options = LoraOptions.of(network_args, neuron_dropout)
    if options.exclude_patterns or options.include_patterns:
        raise UserError(
            "--network_args exclude_patterns and include_patterns have no place with --dim_from_weights: the file "
            "says which modules."
        )
    linears = {path: module for path, module in unet.named_modules() if isinstance(module, nn.Linear)}
    fit_to_model(lora, {f"{path}.weight": (linear.out_features, linear.in_features) for path, linear in linears.items()})
    plain = plain_network(lora)
    linears = {path: linear for path, linear in linears.items() if flat_name(path) in plain}
    sizes = {path: (plain[flat_name(path)].rank, plain[flat_name(path)].alpha) for path in linears}
    network = LoRANetwork(linears, sizes, multiplier, options)
    weights = _network_tensors(plain)
    network.load_state_dict(weights)
    if for_inference:
        network.eval().requires_grad_(False)
    return network, weights


def _network_tensors(plain: Mapping[str, LowRank]) -> dict[str, torch.Tensor]:
    """The state dict of a network of these LoRA modules, by flat name."""
    tensors = {}
    for flat, lora in plain.items():
        parts = {"lora_down.weight": lora.down, "lora_up.weight": lora.up, "alpha": torch.tensor(lora.alpha)}
        tensors |= {f"{DEFAULT_PREFIX}{flat}.{name}": tensor for name, tensor in parts.items()}
    return tensors
