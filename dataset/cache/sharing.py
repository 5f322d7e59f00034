"""What latents cost, and each process's share of the items of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from dataset.cache.preparation import CLIP_MEMORY, Target, plan_targets
from dataset.items import Item
from dataset.media.videos import decoding_bytes
from utils.processes.ranks import Ranks, split_by_cost

LOOKING = 64 * 64  # pixels; encoding them takes about as long as finding out that an item's caches are right


def latents_cost(item: Item, wanted: Callable[[Target], bool]) -> int:
    """Pixels that the VAE has to encode for an item, by the header of its file; encoding is most of the work."""
    try:
        with CLIP_MEMORY.of(decoding_bytes(item.path) if item.dataset.kind == "video" else 0):
            targets = plan_targets(item)
        return LOOKING + sum(target.frames * target.bucket[0] * target.bucket[1] for target in targets if wanted(target))
    except Exception:  # files are damaged in many ways; whoever has the item in its share reports it
        return LOOKING


def share_items(
    datasets: Sequence[Sequence[Item]], ranks: Ranks, num_workers: int, wanted: Sequence[Callable[[Target], bool]]
) -> list[list[Item]]:
    """Of each dataset the items that this process caches. Shares are split over the whole run: nobody waits between datasets.

    ``wanted``: of each dataset, which targets have to be made; called in threads.
    """
    if ranks.count == 1:
        return [list(items) for items in datasets]
    places = [(number, item) for number, items in enumerate(datasets) for item in items]

    def costs(part: Sequence[tuple[int, Item]]) -> list[int]:
        with ThreadPoolExecutor(num_workers) as pool:
            return list(pool.map(lambda place: latents_cost(place[1], wanted[place[0]]), part))

    shares: list[list[Item]] = [[] for _ in datasets]
    for position in split_by_cost(ranks.map(costs, places), ranks.count)[ranks.index]:
        number, item = places[position]
        shares[number].append(item)
    return shares
