"""The transformer with its LoRA on the device, for as many results as are wanted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import hunyuan_model
from hunyuan_model.runtime.compilation import CompileWatch
from hunyuan_model.runtime.memory import BatchSize, weight_shapes
from hunyuan_model.runtime.memory_plan import MemoryPlan
from hunyuan_model.runtime.memory_report import advice, batch_name
from hunyuan_model.runtime.sequence_parallel import agreed
from hunyuan_model.sampling.generation import generate_latents
from hunyuan_model.text.conditions import TextConditions
from networks.generation.requests import Request
from networks.generation.settings import GenerationSettings
from networks.injection import InjectedLoras, injected_bytes
from networks.merging import LoraToMerge, MergePatch, read_lora_files
from utils.devices import explain_out_of_memory, free_memory
from utils.errors import UserError
from utils.free_memory import free_device_memory
from utils.processes.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)


class Sampler:
    """Loads the transformer, and samples with it until ``close``.

    Args:
        loras: of the run; the list is emptied where they are merged, as nobody needs their tensors any more.
        requests: what will be sampled, for the memory plan, which is of the largest.
        texts: of the requests; there may be more of them later.
        helpers: the processes that compute each video together; all but the main one ``sample_for_main``.
        loaders: the processes that load the same weights for videos of their own; all make a sampler.

    Raises:
        UserError: memory does not suffice; files that do not belong together.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        loras: list[LoraToMerge],
        requests: Sequence[Request],
        texts: Mapping[str, TextConditions],
        device: torch.device,
        helpers: Ranks = ALONE,
        loaders: Ranks = ALONE,
    ) -> None:
        self._helpers = helpers
        loaders = helpers if helpers.count > 1 else loaders
        self._settings, self._device, self._texts = settings, device, texts
        batch = largest_batch(settings, requests, texts)
        dtype = settings.dit_dtype
        injects = settings.lora_mode == "inject"
        injected = loras if injects else []
        beside = injected_bytes(injected)
        devices = settings.runtime.devices(device)
        plan = MemoryPlan(
            settings.config,
            devices[0],
            settings.runtime,
            batch,
            dtype,
            dtype,
            trains=False,
            injected_bytes=beside,
            others=devices[1:],
        )
        free = helpers.gather([free_device_memory(each) for each in devices])
        plan = plan.resolved([None if None in each else min(each) for each in zip(*free)])
        # Who holds one copy of swapped weights with others swaps the same blocks.
        self._plan = plan.with_blocks(max(loaders.gather(plan.runtime.blocks_to_swap)))
        with self._explained(batch):
            patch = MergePatch(loras, weight_shapes(settings.config)) if loras and not injects else None
            self._transformer = hunyuan_model.load_transformer(
                settings.dit, device=device, dtype=dtype, runtime=self._plan.runtime, ranks=loaders, patch=patch
            )
            self._loras = InjectedLoras(self._transformer, injected, device)
        self._injects = injects
        loras.clear()

    def sample(
        self,
        request: Request,
        start: Tensor | None = None,
        on_step: Callable[[int], None] = lambda step: None,
        on_estimate: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Latents (1, 16, F, H, W), float32, on the CPU, which the main process asks for. Arguments as of ``generate_latents``.

        Raises:
            UserError: memory does not suffice, or the transformer gives NaN.
        """
        self._helpers.gather((request, start))
        compiling = CompileWatch()

        def advance(step: int) -> None:
            compiling.report(f"step {step}")
            on_step(step)

        latents = self.latents_of(request, start, advance, on_estimate).cpu()
        if not torch.isfinite(latents).all():
            raise UserError(
                "the transformer produced NaN or infinity; nothing was written. "
                "Try --dit_dtype bfloat16 or float32, or another --attn_mode."
            )
        return latents

    def latents_of(
        self,
        request: Request,
        start: Tensor | None,
        on_step: Callable[[int], None] = lambda step: None,
        on_estimate: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """As of ``sample``, but on the device, perhaps not finite, and no other process is asked to compute them, too."""
        text, *negative = (self._texts[text] for text in request.texts)
        together = self._settings.runtime.sequence_parallel > 1
        if self._injects:
            self._loras.set_multipliers(request.lora_multiplier)
        with self._explained(largest_batch(self._settings, [request], self._texts)):
            return generate_latents(
                self._transformer,
                text,
                request.sampling,
                device=self._device,
                dtype=self._settings.dit_dtype,
                negative=negative[0] if negative else None,
                start=start,
                on_step=on_step,
                on_estimate=on_estimate,
                agree=partial(agreed, device=self._device) if together else bool,
            )

    @property
    def host_bytes(self) -> int:
        """RAM that sampling takes beside what is loaded."""
        need = self._plan.need()
        return need.sampling + need.tables if self._device.type == "cpu" else 0

    def close(self) -> None:
        """Give the memory back, in other processes too."""
        if self._helpers.is_main:
            self._helpers.gather(None)
        del self._transformer, self._loras
        if self._settings.runtime.compile:
            torch._dynamo.reset()  # it holds on to what it compiled, whose memory decoding needs
        free_memory(self._device)

    def _explained(self, batch: BatchSize):
        return explain_out_of_memory(f"sampling {batch_name(batch)}", lambda: advice(self._plan), *self._plan.devices)


def sample_for_main(settings: GenerationSettings, device: torch.device, ranks: Ranks) -> None:
    """What the other processes do while the main one runs a ``Batch``: they compute the same, and it keeps the results."""
    (asked, *_) = ranks.gather(None)
    if asked is None:
        return
    requests, texts = asked
    sampler = Sampler(settings, read_loras(settings, requests[0]), requests, texts, device, ranks)
    while (given := ranks.gather(None)[0]) is not None:
        sampler.latents_of(*given)
    sampler.close()


def read_loras(settings: GenerationSettings, request: Request) -> list[LoraToMerge]:
    """The LoRA files of a run, as strong as ``request`` has them; errors as of ``read_lora``."""
    multipliers = request.lora_multiplier
    return read_lora_files(settings.lora_weight, multipliers, partial=settings.lora_partial, blocks=settings.lora_blocks)


def injecting_where_needed(settings: GenerationSettings, requests: Sequence[Request]) -> GenerationSettings:
    """With LoRA beside the weights if their multipliers change from one of ``requests`` to another."""
    if settings.lora_mode == "inject" or len({request.lora_multiplier for request in requests}) <= 1:
        return settings
    logger.info("LoRA are computed beside the weights, as their multipliers change from result to result")
    return replace(settings, lora_mode="inject")


def largest_batch(settings: GenerationSettings, requests: Sequence[Request], texts: Mapping[str, TextConditions]) -> BatchSize:
    """The one of all forward passes that takes most memory."""
    batches = [
        BatchSize(
            2 if request.sampling.batched else 1,
            request.sampling.latent_size,
            max(int(texts[text].mask.sum()) for text in request.texts),
        )
        for request in requests
    ]
    return max(batches, key=lambda batch: batch.tokens(settings.config))
