"""Decoding on the CPU, in a thread, while the next result is sampled (--decode_on_cpu)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from hunyuan_model.sampling.decoding import Decode, load_decoder
from hunyuan_model.vae.loading import check_vae_file
from hunyuan_model.vae.memory import Clip, VAESettings, decoding_bytes
from networks.generation.requests import Request
from utils.disk_space import readable
from utils.free_memory import free_host_memory

logger = logging.getLogger(__name__)

FLAG = "--decode_on_cpu"
CPU = torch.device("cpu")


class BackgroundDecoding:
    """A VAE in float32 on the CPU, and the thread that decodes with it, one result after the other.

    As a context it waits for the thread at the end. Where that is an exception, Ctrl-C for example, only the result that is being
    decoded is finished; the latents of the others are on disk.
    """

    def __init__(self, settings: VAESettings) -> None:
        self._decode = load_decoder(settings, CPU)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoding")
        self._results: list[Future] = []

    def __enter__(self) -> BackgroundDecoding:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        waiting = sum(not result.done() for result in self._results)
        if kind is None and waiting > 1:
            logger.info("everything is sampled, %d results are being decoded", waiting)
        self._thread.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for result in self._results:
                result.result()

    def start(self, make: Callable[[Decode], None]) -> None:
        """Have ``make`` called with the decoder once its turn comes; what it raises is raised when the context ends."""
        self._results.append(self._thread.submit(make, self._decode))


def start_decoding(settings: VAESettings, requests: Sequence[Request], taken: int) -> BackgroundDecoding | None:
    """Load the VAE for the largest of ``requests``, unless RAM does not suffice, which is logged.

    Args:
        taken: bytes of RAM that sampling will take from what is free now.
    """
    settings = replace(settings, vae_dtype=torch.float32)
    config = check_vae_file(settings.vae)
    clips = [Clip(1, request.sampling.video_length, *request.sampling.video_size) for request in requests]
    need, clip = max(((decoding_bytes(config, clip, settings, CPU), clip) for clip in clips), key=lambda pair: pair[0])
    free = free_host_memory() - taken
    if need > free:
        logger.warning(
            "%s: the VAE and decoding %s take %s of RAM at least, and %s are free beside sampling. "
            "Results are decoded once everything is sampled.",
            *(FLAG, clip, readable(need), readable(max(free, 0))),
        )
        return None
    return BackgroundDecoding(settings)
