"""--interactive: prompt lines from a terminal or a pipe, one result each, with the networks loaded once."""

from __future__ import annotations

import io
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hunyuan_model
from hunyuan_model.sampling.decoding import Decode, decoder_of, load_decoder
from hunyuan_model.sampling.preview import ColourMap, Preview
from hunyuan_model.sampling.prompts import PROMPT_OPTIONS, PROMPT_SETTINGS, PromptSetting, parse_prompt_line
from hunyuan_model.text.conditions import TextConditions
from networks.generation.prompts import changed_by
from networks.generation.requests import SAMPLING_FIELDS, START_FIELDS, Request, without_effect
from networks.generation.sampler import Sampler, read_loras
from networks.generation.settings import GenerationSettings
from networks.generation.starts import FindStarts, ReadStart, expand_starts, prepare_with_vae
from utils.cli.arguments import random_seed
from utils.devices import explain_out_of_memory, free_memory
from utils.errors import STATUS_FAILED, UserError, first_line
from utils.key_values import nearest_name
from utils.output import show, with_names_of_invisible
from utils.progress import ProgressBar

logger = logging.getLogger(__name__)

PROMPT = "prompt> "
HELP = f"""A line is a prompt with options behind it: a red ball --w 512 --h 320 --f 25 --d 7
What a line sets stays for those that follow; options alone sample the last prompt again. Without --d each result has a new seed.
Options: {" ".join(PROMPT_OPTIONS)}
  !settings          show what is set, as a prompt line
  !reset [OPTION..]  back to the flags: everything, or only these options
  !help              show this
  !quit              end, as Ctrl-D does
Ctrl-C ends the sample that is being made."""
COMMANDS = ("!help", "!settings", "!reset", "!quit")


class LineReader:
    """Lines of the terminal, with a history where Python has one, or of a pipe."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdin.isatty()
        self.count = 0
        if isinstance(sys.stdin, io.TextIOWrapper):  # what is no text is refused with its line
            sys.stdin.reconfigure(errors="surrogateescape")
        if self.is_terminal:
            try:
                import readline  # noqa: F401  # input() edits lines with it; Windows has none
            except ImportError:
                logger.info("this Python has no readline: there is no history of lines")

    def read(self) -> str | None:
        """The next line; None at the end, and for Ctrl-C."""
        self.count += 1
        try:
            if self.is_terminal:
                return input(PROMPT)
            return sys.stdin.readline() or None
        except (EOFError, KeyboardInterrupt):
            show("", error=True)
            return None

    @property
    def where(self) -> str:
        """The line, for messages."""
        return "this line" if self.is_terminal else f"line {self.count}"


@dataclass
class LineSettings:
    """What the lines so far have set.

    Attributes:
        base: as the flags say.
        seed: of --seed; None for a new one in each result.
        files: of LoRA.
    """

    base: Request
    seed: int | None
    files: Sequence[str]
    values: dict[str, Any] = field(default_factory=dict)  # by flag
    prompt: str | None = None

    def request(self, line: str, where: str) -> Request:
        """What ``line`` asks for. Nothing of a line that is refused stays.

        Raises:
            UserError: names ``where``.
        """
        entry = parse_prompt_line(line, where)
        if not entry.prompt and self.prompt is None:
            raise UserError(f"{where} has options but no prompt, and there is none before it. Write the prompt first.")
        prompt = entry.prompt or self.prompt
        replaced = () if entry.values.keys().isdisjoint(START_FIELDS) else START_FIELDS  # by a start of this line
        kept = {flag: value for flag, value in self.values.items() if flag not in replaced}
        values = {**kept, **entry.values}
        if (seed := values.get("seed", self.seed)) is None:
            seed_of_line = {"seed": random_seed(), "seed_given": False}
        else:
            seed_of_line = {"seed": seed, "seed_given": True}
        request = changed_by(replace(entry, values={**values, **seed_of_line, "prompt": prompt}), self.base, self.files)
        self.values, self.prompt = values, prompt
        return request

    def reset(self, options: Sequence[str]) -> None:
        """Back to the flags: the ``options``, or everything if there are none.

        Raises:
            UserError: an unknown option.
        """
        known = {setting.option: setting.flag for setting in PROMPT_SETTINGS}
        names = [option.removeprefix("--").lower() for option in options]
        for name in names:
            if name not in known:
                raise UserError(f"!reset: there is no option {name!r}.{nearest_name(name, known)} There are {', '.join(known)}.")
        if not names:
            self.values, self.prompt = {}, None
        for name in names:
            self.values.pop(known[name], None)

    def __str__(self) -> str:
        """As a prompt line."""
        settings = [setting for setting in PROMPT_SETTINGS if self._value(setting) not in (None, ())]
        return " ".join([self.prompt or "(no prompt yet)", *(f"--{setting.option} {self._shown(setting)}" for setting in settings)])

    def _value(self, setting: PromptSetting) -> Any:
        if setting.flag in self.values:
            return self.values[setting.flag]
        if setting.flag == "seed":
            return self.seed
        if setting.flag in ("height", "width"):
            return self.base.sampling.video_size[setting.flag == "width"]
        return getattr(self.base.sampling if setting.flag in SAMPLING_FIELDS else self.base, setting.flag)

    def _shown(self, setting: PromptSetting) -> str:
        value = self._value(setting)
        numbers = {tuple: value, float: (value,)}.get(setting.kind)
        return str(value) if numbers is None else ",".join(f"{number:.12g}" for number in numbers)


class Stopped(Exception):
    """The user has ended a sample."""


@contextmanager
def stop_after_step() -> Iterator[Callable[[], None]]:
    """Inside, the first Ctrl-C waits until the function that it gives is called, which raises ``Stopped``, so that the network is
    left as it should be; a second one interrupts at once."""
    asked = False

    def on_signal(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        logger.warning("stopping after this step; Ctrl-C again stops at once, and the transformer is loaded again")

    def stop_if_asked() -> None:
        if asked:
            raise Stopped

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield stop_if_asked
        stop_if_asked()
    finally:
        signal.signal(signal.SIGINT, before)


class Session:
    """Makes results one by one and keeps the transformer, the VAE and the states of every text that it has seen.

    The transformer is loaded for the first request, with memory planned for its size.

    Args:
        settings: with LoRA that are computed beside the weights, or their multipliers could not change.
        metadata, find_starts, read_start: as of ``Batch`` and ``expand_starts``.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        device: torch.device,
        metadata: Callable[[Request], dict[str, str]],
        find_starts: FindStarts,
        read_start: ReadStart,
    ) -> None:
        self._settings, self.device, self._metadata = settings, device, metadata
        self._find_starts, self._read_start = find_starts, read_start
        self._colours: ColourMap | None = None  # of previews
        self._texts: dict[str, TextConditions] = {}
        self._sampler: Sampler | None = None
        self._vae: nn.Module | None = None
        self._decode: Decode | None = None
        self._on_cpu = settings.decode_on_cpu

    def expanded(self, request: Request) -> list[Request]:
        """The request with its start checked; one for each file where that is a folder of several.

        Raises:
            UserError: as of ``expand_starts``, or there is no VAE to encode it.
        """
        if self._settings.vae.vae is None and (request.image_path or request.video_path):
            raise UserError(f"{request.where}: starting from a picture or clip needs --vae, which is missing.")
        return expand_starts([request], self._find_starts)

    def make(self, request: Request) -> None:
        """Sample, decode, write, and print the path.

        Raises:
            UserError: what a message can explain; the next request may work.
            Stopped, KeyboardInterrupt: by Ctrl-C.
        """
        output = self._settings.output
        stem = output.unused_stem(request.stem)
        latents = self._sample(request, output.preview_path(stem))
        stem = output.unused_stem(stem)  # another process may have made one of that name
        stored = output.save_latents(stem, latents, self._metadata(request))
        if output.keeps_latents:
            show(stored)
        if output.output_type == "latent":
            return
        try:
            show(output.save_frames(stem, self._decoded(latents)[0], self._metadata(request)))
        except BaseException:
            logger.warning("its latents are in %s: --latent_path decodes them.", stored)
            raise
        if not output.keeps_latents:
            stored.unlink()

    def _sample(self, request: Request, preview_path: Path) -> Tensor:
        if missing := [text for text in request.texts if text not in self._texts]:
            with explain_out_of_memory("encoding the prompt", "use --fp8_llm", self.device):
                encoded = hunyuan_model.encode_prompts(missing, self._settings.text, self.device, beside_others=True)
            self._texts.update(zip(missing, encoded))
        self._load(request)
        start, preview = self._prepared(request, preview_path)
        steps = request.sampling.steps_with_checks(request.start)
        progress = ProgressBar(total=steps, desc="sampling", unit="step", leave=False)
        try:
            with stop_after_step() as stop_if_asked, progress:

                def advance(_: int) -> None:
                    progress.update()
                    stop_if_asked()

                return self._sampler.sample(request, start, advance, preview)
        except KeyboardInterrupt:  # within a step, which leaves swapped blocks anywhere
            self._sampler.close()
            self._sampler = None
            raise
        finally:
            if preview:
                preview.remove()

    def _prepared(self, request: Request, preview_path: Path) -> tuple[Tensor | None, Preview | None]:
        """The latents to start from, and what writes previews."""
        settings, every = self._settings, self._settings.output.preview_every
        if self._colours is not None:  # they are fitted once
            settings = replace(settings, output=replace(settings.output, preview_every=None))
        starts, colours = prepare_with_vae(settings, [request], self._read_start, self.device, self._vae)
        self._colours = self._colours or colours
        return starts.of(request), Preview(self._colours, preview_path, every) if self._colours else None

    def _load(self, request: Request) -> None:
        """The transformer and the VAE, where they are not there yet; the VAE first, so that the plan counts it."""
        settings = self._settings
        if self._sampler is not None:
            return
        if self._vae is None and settings.output.output_type != "latent" and not self._on_cpu:
            self._vae = hunyuan_model.load_vae(settings.vae.vae, device=self.device, dtype=settings.vae.vae_dtype)
        sampler = Sampler(settings, read_loras(settings, request), [request], self._texts, self.device)
        if self._vae is not None:
            self._decode = decoder_of(self._vae, settings.vae, self.device)  # with the memory that is free now
        self._sampler = sampler

    def _decoded(self, latents: Tensor) -> Tensor:
        """Frames (1, T, H, W, 3); on the CPU with --decode_on_cpu, and from the first clip on that the GPU has no memory for."""
        if self._decode is not None:
            try:
                return self._decode(latents)
            except UserError as error:
                if self._on_cpu or self.device.type == "cpu" or not isinstance(error.__cause__, RuntimeError):
                    raise
                logger.warning("%s Decoding on the CPU from now on.", error)
            self._vae = self._decode = None
            self._on_cpu = True
            free_memory(self.device)
        self._decode = load_decoder(replace(self._settings.vae, vae_dtype=torch.float32), torch.device("cpu"))
        return self._decode(latents)


def run_session(session: Session, settings: LineSettings) -> int:
    """Answer every line of stdin. Returns the exit status: of a terminal 0, of a pipe that of a failure if a line failed."""
    reader, failed = LineReader(), False
    if reader.is_terminal:
        show(HELP)
    while (line := reader.read()) is not None and line.strip() != "!quit":
        try:
            _answer(line.strip(), reader.where, session, settings)
            continue
        except (Stopped, KeyboardInterrupt):
            show("stopped", error=True)
        except UserError as error:
            show(f"error: {with_names_of_invisible(str(error))}", error=True)
        except Exception as error:  # encoders of videos, drivers and file systems fail in many ways
            logger.exception("%s: %s", reader.where, first_line(error))
        failed = True
        free_memory(session.device)
    return STATUS_FAILED if failed and not reader.is_terminal else 0


def _answer(line: str, where: str, session: Session, settings: LineSettings) -> None:
    if not line or line.startswith("#"):
        return
    if not line.startswith("!"):
        before = settings.values, settings.prompt
        request = settings.request(line, where)
        try:
            requests = session.expanded(request)
        except UserError:
            settings.values, settings.prompt = before
            raise
        for sentence in without_effect([request]):
            logger.warning("%s", sentence)
        logger.info("seed %d", request.sampling.seed)
        for one in requests:
            session.make(one)
        return
    command, *options = line.split()
    if command == "!help":
        show(HELP)
    elif command == "!settings":
        show(settings)
    elif command == "!reset":
        settings.reset(options)
    else:
        raise UserError(f"{where}: there is no command {command}.{nearest_name(command, COMMANDS)} !help lists them.")
