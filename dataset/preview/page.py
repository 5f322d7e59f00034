"""One page on which people see a dataset as the model gets it: ``cache_latents.py --debug_mode html``."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset.cache.caching import Job
from dataset.cache.preparation import Failure, Prepared, Result, Target, prepare
from dataset.cache.report import COLUMNS, table_rows
from dataset.items import Item
from dataset.media.frame_rate import MODEL_FPS
from dataset.preview.decoded import CacheDecoder
from dataset.preview.duplicates import Fingerprints
from dataset.preview.facts import Concern, ItemFacts, compare_items, facts_of, facts_of_failure
from dataset.preview.media import CAPTION_LETTERS, LONG, Room, WindowView
from utils.files import require_possible_file, require_writable_folder
from utils.pages.page import render, require_templates, write_page
from utils.progress import ProgressBar

if TYPE_CHECKING:
    from hunyuan_model.text.encoding import TextLength

TEMPLATE = Path(__file__).with_name("preview.html.j2")
PAGE_NAME, PAGE_NAME_DECODED = "preview.html", "preview_latents.html"
FIRST_LETTERS = 160  # of a caption; a click shows the rest
OF_CACHES = ("latents", "texts", "cut", "used", "batches")  # columns that are left out where they say nothing
WAITING_BYTES = 256 * 2**20  # of pixels that wait until they are made small

CountTokens = Callable[[Iterable[str]], Mapping[str, "TextLength"]]


@dataclass
class ItemView:
    """One file on the page: what is said of it, the whole of it as a small picture, and what the model gets."""

    facts: ItemFacts
    overview: str | None = None
    windows: list[WindowView] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.facts.item.path.name

    @property
    def caption_parts(self) -> tuple[str, str]:
        """The caption as it is shown at once, and the rest, as far as it is shown; cut between words if that goes."""
        caption = (self.facts.item.caption or "")[:CAPTION_LETTERS]
        if len(caption) <= FIRST_LETTERS:
            return caption, ""
        place = (
            max(caption.rfind(" ", FIRST_LETTERS // 2, FIRST_LETTERS), caption.rfind("\n", FIRST_LETTERS // 2, FIRST_LETTERS)) + 1
        )
        return caption[: place or FIRST_LETTERS], caption[place or FIRST_LETTERS :]

    @property
    def caption_left_out(self) -> int:
        """Characters that are not shown."""
        return max(0, len(self.facts.item.caption or "") - CAPTION_LETTERS)

    @property
    def concerns(self) -> str:
        """Places in ``Concern``, for the filter."""
        places = {concern: str(place) for place, concern in enumerate(Concern)}
        return " ".join(dict.fromkeys(places[note.concern] for note in self.facts.notes))

    @property
    def cut_away(self) -> str:
        """The share of the picture that is cut away, in words; empty where it is none, or not known."""
        if self.facts.size is None:
            return ""
        (width, height), (_, _, kept_width, kept_height) = self.facts.size, self.facts.kept
        share = 1 - kept_width * kept_height / (width * height)
        return f"{share:.0%}" if share >= 0.005 else ""

    @property
    def shape(self) -> str:
        """Whether the whole file is long, for the stylesheet."""
        width, height = self.facts.size or (1, 1)
        return "wide" if width > LONG * height else "tall" if height > LONG * width else ""

    @property
    def kept_style(self) -> str:
        """Where the kept rectangle lies on the whole picture, as CSS."""
        (width, height), (left, top, kept_width, kept_height) = self.facts.size, self.facts.kept
        shares = {"left": left / width, "top": top / height, "width": kept_width / width, "height": kept_height / height}
        return ";".join(f"{side}:{share:.2%}" for side, share in shares.items())


@dataclass
class Group:
    """Items of one bucket, or without any."""

    title: str
    is_wide: bool  # what is shown of its items needs room: three frames side by side, or a message
    views: list[ItemView] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """How many its files take side by side."""
        return sum(2 if self.is_wide or view.shape == "wide" else 1 for view in self.views)


def write_preview(
    jobs: Sequence[Job],
    config: str,
    num_workers: int,
    count_tokens: CountTokens | None = None,
    decoder: CacheDecoder | None = None,
) -> tuple[Path, list[Failure]]:
    """Write the page of all datasets into the folder ``debug`` of the first cache directory, and fill in the reports.

    Args:
        config: the path of the dataset TOML.
        count_tokens: counts the tokens of captions; None: the page says how to get them.
        decoder: shows what is in the cache, in place of the media.

    Returns:
        The path of the page, and the files that cannot be read; they are on the page, too.
    """
    path = jobs[0].dataset.cache_directory / "debug" / (PAGE_NAME if decoder is None else PAGE_NAME_DECODED)
    require_templates()
    require_possible_file(path)
    require_writable_folder(path.parent, "the folder of the page,")
    room = Room.for_items([item for job in jobs for item in job.items])
    fingerprints = Fingerprints()
    views: list[ItemView] = []
    failures: list[Failure] = []
    for job in jobs:
        report = job.report
        report.decoded = report.too_short = report.failed = 0
        results = prepare(job.items, num_workers, wanted=_first_windows(room), see=room.overview)
        with ProgressBar(total=len(job.items), desc=job.dataset.label, unit="item") as progress:
            shown = results if decoder is None else decoder.decode(results)
            for view in collect_views(shown, room, fingerprints, num_workers, failures):
                progress.update()
                views.append(view)
                if decoder is not None:
                    view.facts.notes += decoder.notes[view.facts.item]
                concerns = {note.concern for note in view.facts.notes}
                report.failed += Concern.FAILED in concerns
                report.decoded += not concerns & {Concern.FAILED, Concern.SHORT}
                report.too_short += Concern.SHORT in concerns
                if view.windows:
                    report.note_changes(view.facts.item, view.facts.changes)
    captions = {view.facts.item.caption for view in views} - {None}
    compare_items([view.facts for view in views], fingerprints, count_tokens and count_tokens(captions))
    write_page(path, make_page(views, jobs, config, has_tokens=count_tokens is not None, is_decoded=decoder is not None))
    return path, failures


def make_page(views: Sequence[ItemView], jobs: Sequence[Job], config: str, *, has_tokens: bool, is_decoded: bool = False) -> str:
    """The page as HTML."""
    rows = list(table_rows([job.report for job in jobs]))
    columns = [
        place
        for place, column in enumerate(COLUMNS)
        if column not in OF_CACHES or any(cells[place] not in ("-", "0") for _, cells, _ in rows)
    ]
    counted = Counter(concern for view in views for concern in {note.concern for note in view.facts.notes})
    return render(
        TEMPLATE,
        config=config,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
        count=len(views),
        columns=[COLUMNS[place] for place in columns],
        of_caches=[COLUMNS[place] for place in columns if COLUMNS[place] in OF_CACHES],
        rows=[(label, [cells[place] for place in columns], lines) for label, cells, lines in rows],
        places={view.facts.item: place for place, view in enumerate(views)},
        several_datasets=len(jobs) > 1,
        concerns=[(place, concern, counted[concern]) for place, concern in enumerate(Concern) if counted[concern]],
        groups=list(group_views(views)),
        has_tokens=has_tokens,
        is_decoded=is_decoded,
        model_fps=MODEL_FPS,
    )


def collect_views(
    results: Iterable[Result], room: Room, fingerprints: Fingerprints, num_workers: int, failures: list[Failure]
) -> Iterator[ItemView]:
    """What the page shows of each item, in their order, made in ``num_workers`` threads while the next ones are prepared.

    Args:
        results: as ``prepare`` gives them, with ``room.overview`` as ``see``.
        failures: gets those among the results.
    """
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="preview")
    views: deque[tuple[ItemFacts, list[Future[str]], list[Future[WindowView]]]] = deque()
    running: deque[tuple[Future[WindowView], int]] = deque()
    overviews, windows = [], []

    try:
        for result in results:
            if isinstance(result, Prepared):
                while running and sum(size for _, size in running) + result.pixels.nbytes > WAITING_BYTES:
                    running.popleft()[0].result()
                if not overviews and result.seen is not None:
                    overviews.append(pool.submit(room.overview_uri, result.seen))
                if len(result.pixels):
                    fingerprints.add(result)
                    windows.append(pool.submit(room.view, result))
                    running.append((windows[-1], result.pixels.nbytes))
                continue
            if isinstance(result, Failure):
                failures.append(result)
            views.append((facts_of_failure(result) if isinstance(result, Failure) else facts_of(result), overviews, windows))
            overviews, windows = [], []
            while views and all(future.done() for future in views[0][2]):
                yield _view_of(*views.popleft())
        while views:
            yield _view_of(*views.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _view_of(facts: ItemFacts, overviews: Sequence[Future[str]], windows: Sequence[Future[WindowView]]) -> ItemView:
    overview = next((future.result() for future in overviews), None)
    return ItemView(facts, overview, [future.result() for future in windows])


def _first_windows(room: Room) -> Callable[[Target], bool]:
    """Wants the first few windows of each length of each item, which are those that are shown."""
    seen: Counter[tuple[Item, int]] = Counter()

    def wanted(target: Target) -> bool:
        key = target.item, target.frames
        seen[key] += 1
        return seen[key] <= room.windows_of(target.item)

    return wanted


def group_views(views: Iterable[ItemView]) -> Iterator[Group]:
    """The items by what they are trained as: those that are not come first."""
    groups: dict[tuple[Any, ...], Group] = {}
    for view in views:
        facts, kind = view.facts, view.facts.item.dataset.kind
        lengths = sorted({length for _, length in facts.windows})
        if facts.bucket is None:
            key, title = (0,), "Cannot be read"
        elif kind == "video" and not lengths:
            key, title = (1,), "Too short"
        else:
            width, height = facts.bucket
            key, title = (2, kind, facts.bucket, *lengths), f"{width} x {height}, pictures"
            if lengths:
                *others, longest = map(str, lengths)
                counts = f"{', '.join(others)} and {longest}" if others else longest
                title = f"{width} x {height}, clips of {counts} frame{'s' if lengths != [1] else ''}"
        groups.setdefault(key, Group(title, kind == "video" or facts.bucket is None)).views.append(view)
    yield from (groups[key] for key in sorted(groups))
