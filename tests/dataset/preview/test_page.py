"""The page of a dataset: what it says, what it weighs, and that a browser shows it."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from browser import opened, serious_faults, until
from PIL import Image

from dataset.cache.caching import Job
from dataset.cache.preparation import Failure, Prepared, Target, prepare
from dataset.cache.report import DatasetReport
from dataset.config import DatasetConfig
from dataset.items import Item, list_items
from dataset.preview.duplicates import Fingerprints
from dataset.preview.facts import ItemFacts
from dataset.preview.media import LEAST_SIDE, PAGE_BYTES, Room
from dataset.preview.page import ItemView, collect_views, group_views, make_page
from utils.media.writing import save_video

EVIL = """</script><script>document.title = "run"</script><img src=x onerror="document.title='run'"> &amp; "q" 'q'"""
HEBREW = "כוס קפה שחור 🦊"
# The words of the table and the sizes that stand on more than one line.
BROKEN_WORDS = """[...document.querySelectorAll("th, td.number, .facts span")].flatMap((element) => {
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT), broken = [], range = document.createRange();
  while (walker.nextNode()) {
    for (const { 0: word, index } of walker.currentNode.data.matchAll(/\\S+/g)) {
      range.setStart(walker.currentNode, index);
      range.setEnd(walker.currentNode, index + word.length);
      if (range.getClientRects().length > 1) broken.push(word);
    }
  }
  return broken;
})"""


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


@pytest.fixture
def data(tmp_path) -> Path:
    """A TOML over pictures with strange names and captions, of which one is broken, and clips, of which one is too short."""
    pictures, clips = tmp_path / "pictures", tmp_path / "clips"
    pictures.mkdir()
    clips.mkdir()
    Image.fromarray(noise(64, 96)).save(pictures / "<b>&'x.png")
    Image.fromarray(noise(64, 64, seed=1)).save(pictures / "שחור.png")
    Image.fromarray(noise(64, 64, seed=2)).save(pictures / "plain.png")
    (pictures / "broken.png").write_bytes(b"nothing")
    for name, caption in (("<b>&'x", EVIL), ("שחור", HEBREW), ("broken", "a red ball"), ("plain", None)):
        if caption is not None:
            (pictures / f"{name}.txt").write_text(caption, encoding="utf-8")
    grey = np.arange(48, dtype=np.uint8)[:, None, None, None] * 5 + np.zeros((1, 64, 64, 3), np.uint8)
    save_video(clips / "long.mp4", grey, fps=48)
    save_video(clips / "short.mp4", grey[:6], fps=24)
    for name in ("long", "short"):
        (clips / f"{name}.txt").write_text(f"a {name} clip", encoding="utf-8")
    toml = tmp_path / "data.toml"
    toml.write_text(
        "[general]\nresolution = 64\ncaption_extension = '.txt'\n"
        f"[[datasets]]\nimage_directory = '{pictures.as_posix()}'\ncache_directory = '{tmp_path.as_posix()}/cache'\n"
        f"[[datasets]]\nvideo_directory = '{clips.as_posix()}'\ncache_directory = '{tmp_path.as_posix()}/clip_cache'\n"
        "target_frames = [9]\nframe_extraction = 'slide'\nframe_stride = 4\n",
        encoding="utf-8",
    )
    return toml


@pytest.fixture
def page(data, call_script, tiny_model) -> Path:
    encoders = ["--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2]
    done = call_script("cache_latents", "--dataset_config", data, "--debug_mode", "html", "--num_workers", 2, *encoders)
    assert done.status == 1 and "broken.png" in done.stderr
    path = data.parent / "cache" / "debug" / "preview.html"
    assert done.stdout.splitlines()[-1] == str(path)
    return path


def image_item(folder: Path, name: str = "a.png", caption: str | None = "a") -> Item:
    return Item(DatasetConfig(0, "image", folder, None, folder / "cache", resolution=(64, 32)), folder / name, caption, name[:-4])


def content(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


def shown(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(content(uri))) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_the_page_says_what_there_is(page):
    html = page.read_text(encoding="utf-8")
    assert html.count("<article") == 6 and "<script>document" not in html and "<img src=x" not in html
    for text in ("6 files of", "cannot be read <b>1", "too short <b>1", "no caption <b>1", "96x64", "→&nbsp;64x64", "33% cut away"):
        assert text in html, text
    assert re.search(r"1 \(images\)</th><td[^>]*>4</td><td[^>]*>1</td><td[^>]*>3</td>", html)
    assert re.search(r"2 \(videos\)</th><td[^>]*>2</td><td[^>]*>0</td><td[^>]*>1</td><td[^>]*>1</td>", html), (
        "as caching counts them"
    )
    assert "48 -&gt; 24 frames per second: long.mp4" in html
    assert "4 windows" in html and html.count("data-clip=") == 3 and "and 1 more window, trained too, but left out" in html
    assert "48 fps → 24 fps, resampled" in html and ">batches<" not in html
    assert re.search(r'for text encoder 1">\d+ of 256', html) and re.search(r'for text encoder 2">\d+ of 77', html)
    assert "--text_encoder1</code>" not in html


def test_half_of_the_text_encoders_is_refused_and_without_them_the_page_says_how(data, call_script, tiny_model, caplog):
    flags = ["--dataset_config", data, "--text_encoder1", tiny_model.text_encoder1, "--num_workers", 1]
    done = call_script("cache_latents", *flags, "--debug_mode", "html")
    assert done.status == 2 and "both --text_encoder1 and --text_encoder2" in done.stderr
    assert not (data.parent / "cache").exists()
    assert call_script("cache_latents", *flags[:2], *flags[4:], "--debug_mode", "html").status == 1
    assert "--text_encoder1</code>" in (data.parent / "cache" / "debug" / "preview.html").read_text(encoding="utf-8")
    call_script("cache_latents", *flags, "--debug_mode", "console", "--console_num_images", 1)
    assert "--text_encoder1 has no effect without --debug_mode html" in caplog.text


@pytest.mark.parametrize("place", ["debug", "debug/preview.html/x"])
def test_a_page_that_cannot_be_written_is_refused_before_the_media_are_read(data, call_script, monkeypatch, place):
    taken = data.parent / "cache" / place  # a file where the folder goes, or a folder where the page goes
    taken.parent.mkdir(parents=True)
    taken.touch()
    monkeypatch.setattr("dataset.preview.page.prepare", lambda *args, **keywords: pytest.fail("the media were read"))
    done = call_script("cache_latents", "--dataset_config", data, "--debug_mode", "html")
    assert done.status == 2 and ("is a folder" in done.stderr or "is a file" in done.stderr)


def test_pictures_show_what_is_trained_and_the_whole(tmp_path):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:16] = 255, 0, 0  # what is cut away
    pixels[16:48] = 0, 0, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    item, failures = image_item(tmp_path), []
    room = Room.for_items([item])
    [view] = collect_views(prepare([item], 1, see=room.overview), room, Fingerprints(), 1, failures)
    [window] = view.windows
    assert not failures and window.clip is None
    assert shown(window.stills[0]).shape == (32, 64, 3)
    assert np.abs(shown(window.stills[0])[16, 32] - [0, 0, 255]).max() < 12
    assert np.abs(shown(view.overview)[[4, 32], [32, 32]] - [[255, 0, 0], [0, 0, 255]]).max() < 12
    assert view.cut_away == "50%" and view.kept_style == "left:0.00%;top:25.00%;width:100.00%;height:50.00%"


def test_clips_show_three_frames_and_play_at_the_rate_of_the_model(tmp_path):
    grey = np.arange(36, dtype=np.uint8)[:, None, None, None] * 7 + np.zeros((1, 32, 64, 3), np.uint8)
    save_video(tmp_path / "a.mp4", grey, fps=48)
    dataset = DatasetConfig(
        0,
        "video",
        tmp_path,
        None,
        tmp_path,
        resolution=(64, 32),
        target_frames=(9,),
        frame_extraction="chunk",
        caption_extension=".txt",
    )
    room = Room(100_000, 128, 1)
    items = list_items(dataset)
    [view] = collect_views(prepare(items, 2, see=room.overview), room, Fingerprints(), 2, [])
    assert [window.window for window in view.windows] == [(0, 9), (9, 9)] == view.facts.windows
    greys = [[shown(still).mean() for still in window.stills] for window in view.windows]
    expected = [[2 * 7 * frame for frame in frames] for frames in ((0, 4, 8), (9, 13, 17))]
    assert np.abs(np.subtract(greys, expected)).max() < 6
    with av.open(io.BytesIO(content(view.windows[0].clip))) as container:
        frames = list(container.decode(video=0))
        assert len(frames) == 9 and container.streams.video[0].average_rate == 24


def test_a_clip_that_breaks_off_is_on_the_page_with_what_was_read(tmp_path):
    """As where a disk fails after the frames were counted."""
    config = DatasetConfig(0, "video", tmp_path, None, tmp_path / "cache", resolution=(64, 32), target_frames=(1, 5, 9))
    item = Item(config, tmp_path / "a.mp4", "a", "a")
    target, room, failures = Target(item, (0, 5), (64, 64), (64, 32)), Room.for_items([item]), []
    results = [
        Prepared(target, noise(5, 32, 64), {}, room.overview(noise(64, 64))),
        Failure(item, "a.mp4 cannot be read any more."),
    ]
    views = list(collect_views(results, room, Fingerprints(), 1, failures))
    html = make_page(views, [Job([item], DatasetReport(config))], "data.toml", has_tokens=False)
    assert "a.mp4 cannot be read any more." in html and html.count("data-clip=") == 1 and failures == results[1:]


@pytest.mark.parametrize(("size", "expected"), [((2048, 256), (591, 74)), ((100, 4000), (26, 1024)), ((640, 480), (256, 192))])
def test_long_files_are_shown_longer(tmp_path, size, expected):
    room = Room.for_items([image_item(tmp_path)])
    overview = room.overview(noise(size[1], size[0]))
    assert overview.size == expected
    assert shown(room.overview_uri(overview)).shape[1::-1] == expected


@pytest.mark.parametrize("count", [1, 50, 2000, 20_000])
def test_a_page_of_any_pictures_keeps_to_its_size(tmp_path, count):
    item = image_item(tmp_path, caption="a" * 500)
    room = Room.for_items([item] * count)
    assert room.side == (256 if count <= 50 else LEAST_SIDE)
    assert count > 2000 or count * (room.item_bytes + 2000) <= PAGE_BYTES
    frames = noise(1, 272, 480)
    overview = room.overview_uri(room.overview(frames[0]))
    assert len(overview) <= max(0.2 * room.item_bytes, 4000)


def test_items_are_grouped_by_what_they_are_trained_as(tmp_path):
    for name, size in (("a", (64, 32)), ("b", (64, 64))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    items = [image_item(tmp_path, name) for name in ("a.png", "gone.png", "b.png")]
    room, failures = Room.for_items(items), []
    views = list(collect_views(prepare(items, 2, see=room.overview), room, Fingerprints(), 2, failures))
    assert [(group.title, [view.name for view in group.views]) for group in group_views(views)] == [
        ("Cannot be read", ["gone.png"]),
        ("64 x 32, pictures", ["a.png", "b.png"]),
    ]
    assert [type(failure) for failure in failures] == [Failure]
    clip = Item(replace(items[0].dataset, kind="video"), tmp_path / "a.mp4", "a", "a")
    for lengths, title in ((1,), "1 frame"), ((5,), "5 frames"), ((9, 1, 5), "1, 5 and 9 frames"):
        facts = ItemFacts(clip, bucket=(64, 32), windows=[(0, length) for length in lengths])
        assert [group.title for group in group_views([ItemView(facts)])] == [f"64 x 32, clips of {title}"]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1440, False), (390, True)], ids=["light", "narrow and dark"])
def test_a_browser_filters_plays_and_shows_text_as_text(page, width, dark):
    def visible() -> int:
        return shown.evaluate("document.querySelectorAll('.item:not([hidden])').length")

    with opened(page, width=width, dark=dark) as shown:
        assert shown.title() == "Data set preview"
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        assert shown.evaluate("[...document.querySelectorAll('.caption')].map(e => e.textContent)").count(EVIL) == 1
        assert shown.evaluate("[...document.querySelectorAll('h4')].map(e => e.textContent)").count("<b>&'x.png") == 1
        assert not serious_faults(shown)
        assert shown.evaluate(BROKEN_WORDS) == []

        shown.click("button[data-concern='1']")
        assert visible() == 1 and shown.inner_text("#count") == "1 of 6 files"
        until(shown, "document.querySelector('.item:not([hidden])').getBoundingClientRect().top < innerHeight")
        shown.click("button[data-concern='1']")
        assert visible() == 6
        shown.focus("#text")
        shown.keyboard.type("קפה")
        assert visible() == 1 and shown.inner_text(".item:not([hidden]) h4") == "שחור.png"
        shown.keyboard.press("Tab")
        shown.keyboard.press("Enter")
        until(shown, "document.querySelectorAll('.item:not([hidden])').length === 6")
        shown.focus("#group")
        shown.keyboard.press("End")
        until(shown, "document.getElementById('count').textContent === '1 of 6 files'")

        shown.focus(".clip")
        until(shown, "document.querySelector('.clip video')?.currentTime > 0")
        shown.focus("#text")
        until(shown, "!document.querySelector('.clip video')")
        shown.evaluate("document.querySelector('.clip').scrollIntoView({block: 'center'})")
        shown.hover(".clip img:last-child")
        until(shown, "document.querySelector('.clip video')?.currentTime > 0")
        shown.click(".clip img:last-child")
        until(shown, "document.querySelector('dialog[open] video')?.currentTime > 0")
        assert not serious_faults(shown)
        shown.keyboard.press("Escape")
        until(shown, "!document.querySelector('dialog[open], dialog video')")

        shown.fill("#text", "no such name")
        assert visible() == 0 and shown.is_visible("#nothing")
        shown.click("#nothing button")
        until(shown, "document.querySelectorAll('.item:not([hidden])').length === 6")
        assert not shown.is_visible("#nothing")
