"""Many results from one load: all texts are encoded first, then everything is sampled, then everything is decoded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

import hunyuan_model
from hunyuan_model.sampling.decoding import Decode, load_decoder, read_latents
from hunyuan_model.sampling.preview import Preview, removed_on_failure
from networks.generation.background import start_decoding
from networks.generation.earlier import Earlier, Sampled, find_earlier
from networks.generation.record import Recorder, with_flags
from networks.generation.requests import Request, share_of
from networks.generation.sampler import Sampler, read_loras
from networks.generation.settings import GenerationSettings
from networks.generation.sheets.sheet import BatchSheet
from networks.generation.starts import ReadStart, prepare_with_vae
from utils.devices import explain_out_of_memory, free_memory
from utils.errors import UserError, first_line, name_some
from utils.files import wait_for_files
from utils.media.reading import read_frames
from utils.output import show
from utils.processes.ranks import ALONE, Ranks, split_by_cost
from utils.progress import ProgressBar

logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """A run: ``requests`` in, files out.

    Attributes:
        recorder: writes the metadata of files.
        read_start: reads pictures and clips to start from.
        sheet: shows them all, and is written at the end.
        ranks: the processes that share out the requests; the main one writes the sheet.
        helpers: in the main one of processes that compute each video together, all of them: the others ``sample_for_main``.
        failures: sentences on requests that were not made, in the end of all processes; a run of one request raises instead.
    """

    settings: GenerationSettings
    requests: Sequence[Request]
    device: torch.device
    recorder: Recorder
    read_start: ReadStart
    sheet: BatchSheet | None = None
    ranks: Ranks = ALONE
    helpers: Ranks = ALONE
    failures: list[str] = field(default_factory=list)
    _reasons: dict[Request, str] = field(default_factory=dict)  # of failures, short
    _stems: dict[Request, str] = field(default_factory=dict)  # of what was decoded

    def run(self) -> None:
        """Make everything; the networks are in memory one after the other.

        Raises:
            UserError: what concerns all results, or the only one.
        """
        settings, earlier = self.settings, self.ranks.from_main(self._find_earlier)
        self.requests = [earlier.as_made.get(request, request) for request in self.requests]
        if self.sheet is not None:
            self.sheet.grid = [[earlier.as_made.get(request, request) for request in row] for row in self.sheet.grid]
        waiting = split_by_cost([result.request.cost for result in earlier.waiting], self.ranks.count)[self.ranks.index]
        wanted = share_of(earlier.wanted, self.ranks)
        if not wanted:
            self.helpers.gather(None)
        everybody = all(self.ranks.gather(bool(wanted)))
        sampled = [earlier.waiting[position] for position in waiting]
        if wanted:
            sampled += self._sample_all(wanted, self.ranks if everybody else ALONE)
        if settings.output.output_type != "latent" and sampled:
            self._decode_all(sampled)
        others = self._gather()
        if self.ranks.is_main and self.sheet is not None and (earlier.wanted or earlier.waiting or not self.sheet.path.exists()):
            self._save_sheet(self.sheet, dict(earlier.done) | others)

    def _find_earlier(self) -> Earlier:
        if self.settings.skip_existing:
            return find_earlier(self.requests, self.settings.output, self.recorder.metadata)
        return Earlier(wanted=list(self.requests))

    def _gather(self) -> dict[Request, str]:
        """Wait for all processes, and take over their failures; returns the stems of what the others have decoded."""
        own, others = self._stems, {}
        told = self.ranks.gather((self.failures, self._reasons, self._stems))
        self.failures = [failure for failures, _, _ in told for failure in failures]
        for _, reasons, stems in told:
            self._reasons |= reasons
            others |= {request: stem for request, stem in stems.items() if request not in own}
        return others

    def _save_sheet(self, sheet: BatchSheet, stems: Mapping[Request, str]) -> None:
        """With what ``stems`` names from its files."""
        output = self.settings.output
        paths = {request: output.path_of_frames(stem) for request, stem in stems.items()}
        if missing := wait_for_files(paths.values()):
            logger.error("not seen here: %s. All machines must share --save_path.", name_some(missing))
        for request, path in paths.items():
            if path in missing:
                sheet.add_failure(request, "not seen by the process that makes this sheet")
            else:
                sheet.add(request, read_frames(path), path)
        for request, reason in self._reasons.items():
            sheet.add_failure(request, reason)
        metadata, of_each = {}, {}
        if not output.no_metadata:
            metadata = {**self.recorder.of_batch(self.requests), **sheet.about}
            of_each = {request: self.recorder.metadata(request) for request in self.requests}
        for path in sheet.save(metadata, of_each):
            show(path)

    def _sample_all(self, requests: Sequence[Request], loaders: Ranks) -> list[Sampled]:
        """The latents of every request, each on disk as soon as it is made: what ends the run later costs none of them.

        Returns those that are still to be decoded. ``loaders``: the processes that sample, where that is all of them.
        """
        settings, output, sampled = self.settings, self.settings.output, []
        # First, as it finds out what is wrong with the files.
        loras = read_loras(settings, requests[0])
        texts = list(dict.fromkeys(text for request in requests for text in request.texts))
        with explain_out_of_memory("encoding the prompts", "use --fp8_llm", self.device):
            encoded = dict(zip(texts, hunyuan_model.encode_prompts(texts, settings.text, self.device)))
        starts, colours = prepare_with_vae(settings, requests, self.read_start, self.device)
        if len(self.requests) == 1:
            starts.of(requests[0])  # raises before the transformer is loaded
        self.helpers.gather((requests, encoded))
        sampler = Sampler(settings, loras, requests, encoded, self.device, self.helpers, loaders)
        decodes = settings.decode_on_cpu and output.output_type != "latent"
        background = start_decoding(settings.vae, requests, sampler.host_bytes) if decodes else None
        steps = [request.sampling.steps_with_checks(request.start) for request in requests]
        share = f", 1 of {self.ranks.count} shares" if self.ranks.count > 1 else ""
        bar = ProgressBar(total=sum(steps), desc=f"sampling{share}", unit="step", disable=not self.ranks.is_main)
        with background or nullcontext(), bar as progress:
            for number, request in enumerate(requests, 1):
                begun = progress.n
                if len(requests) > 1:
                    progress.set_description(f"sampling {number} of {len(requests)}{share}")
                with self._others_go_on(request):
                    stem, metadata = output.unused_stem(request.stem), self.recorder.metadata(request)
                    if decodes and background is None:
                        metadata = with_flags(metadata, {"decode_on_cpu": False})
                    preview = Preview(colours, output.preview_path(stem), output.preview_every) if colours else None
                    with removed_on_failure(preview):
                        latents = sampler.sample(request, starts.of(request), lambda _: progress.update(), preview)
                    stem = output.unused_stem(stem)  # another process may have made one of that name
                    if preview and output.output_type == "latent":
                        preview.remove()
                    stored = output.save_latents(stem, latents, metadata)
                    sampled.append(Sampled(request, stem, stored, not output.keeps_latents, metadata, preview))
                    if output.keeps_latents:
                        show(stored)
                    if background:
                        background.start(partial(self._decode, sampled.pop()))
                progress.total -= steps[number - 1] - (progress.n - begun)  # of one that failed
            progress.close()
            sampler.close()
        return sampled

    def _decode_all(self, sampled: Sequence[Sampled]) -> None:
        decode = load_decoder(self.settings.vae, self.device)
        quiet = len(sampled) == 1 or not self.ranks.is_main
        with ProgressBar(total=len(sampled), desc="decoding", unit="result", disable=quiet) as progress:
            for result in sampled:
                self._decode(result, decode)
                progress.update()

    def _decode(self, result: Sampled, decode: Decode) -> None:
        with self._others_go_on(result.request, kept=result.stored):
            latents, _ = read_latents(result.stored, "the latents")
            frames = decode(latents)[0]
            if self.sheet is not None and self.ranks.is_main:
                self.sheet.add(result.request, frames.numpy(), self.settings.output.path_of_frames(result.stem))
            if result.preview:  # before the result appears: a run that is killed leaves no preview beside it
                result.preview.remove()
            show(self.settings.output.save_frames(result.stem, frames, result.metadata))
            self._stems[result.request] = result.stem
            if result.disposable:
                result.stored.unlink()

    @contextmanager
    def _others_go_on(self, request: Request, kept: Path | None = None) -> Iterator[None]:
        """One result that fails costs one result, where no other process waits for it."""
        try:
            yield
        except Exception as error:  # encoders of videos, drivers and file systems fail in many ways
            latents = f" Its latents are in {kept}: --latent_path decodes them." if kept else ""
            if len(self.requests) == 1 or (kept is None and self.helpers.count > 1):
                if isinstance(error, UserError):
                    raise UserError(f"{error}{latents}") from error
                if latents:
                    logger.error("%s was not made.%s", request, latents)
                raise
            reason = f"{first_line(error).rstrip('.')}.{latents}"
            self.failures.append(f"{request}: {reason}")
            logger.error("%s was not made: %s", request, reason)
            self._reasons[request] = first_line(error)
            free_memory(self.device)
