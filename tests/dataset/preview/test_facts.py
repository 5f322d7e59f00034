"""What previews say of files, against the moments at which frames were filmed and the areas that are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import hunyuan_model
from dataset.cache.preparation import Failure, Finished, Source, plan_targets, prepare_item
from dataset.config import DatasetConfig
from dataset.items import Item, list_items
from dataset.media.decoding import probe_video
from dataset.media.frame_rate import resample
from dataset.preview.duplicates import Fingerprints
from dataset.preview.facts import Concern, ItemFacts, TokenCount, compare_items, facts_of, facts_of_failure
from hunyuan_model.text.arguments import TextEncoderSettings
from hunyuan_model.text.encoding import cut_texts

ROOT = Path(__file__).resolve().parents[3]
HERE = Path("folder")


@pytest.fixture(scope="module")
def toy_tokenizers() -> tuple:
    encoders = (str(ROOT / "examples" / "toy" / name) for name in ("text_encoder", "text_encoder_2"))
    return hunyuan_model.load_tokenizers(TextEncoderSettings(*encoders, torch.float32))


def dataset(kind: str, **values) -> DatasetConfig:
    return DatasetConfig(0, kind, HERE, None, HERE / "cache", caption_extension=".txt", **values)


def item(config: DatasetConfig, name: str = "a.png", caption: str | None = "a cat") -> Item:
    return Item(config, config.directory / name, caption, Path(name).stem)


def facts_of_source(config: DatasetConfig, source: Source) -> ItemFacts:
    one = item(config)
    return facts_of(Finished(one, source, plan_targets(one, source), decoded=True))


def facts_of_clip(fps: float, count: int, filmed_fps: float | None = None, **values) -> tuple[ItemFacts, Source]:
    """Of an even clip of ``count`` frames."""
    config = dataset("video", **values)
    times = [index / (config.source_fps or fps) for index in range(count)]
    resampling = resample(times, config.source_fps or fps, config.target_fps, config.source_fps is not None)
    frames = count if resampling is None else len(resampling.indices)
    source = Source((640, 360), "", frames, resampling, fps, count / fps, filmed_fps)
    return facts_of_source(config, source), source


def concerns(facts: ItemFacts) -> set[Concern]:
    return {note.concern for note in facts.notes}


def text_of(facts: ItemFacts, concern: Concern) -> str:
    [text] = [note.text for note in facts.notes if note.concern == concern]
    return text


@pytest.mark.parametrize(
    ("size", "resolution", "enable_bucket", "lost"),
    [
        ((3000, 1000), (1280, 720), False, 1 - (16 / 9) / 3),  # a panorama
        ((1080, 1920), (1280, 720), False, 1 - (9 / 16) ** 2),
        ((1920, 1080), (512, 512), False, 1 - 9 / 16),
        ((3000, 1000), (960, 544), True, None),
        ((4032, 3024), (960, 544), True, None),  # phones
        ((4032, 3024), (1280, 720), False, None),
        ((3000, 2000), (512, 512), False, None),
    ],
)
def test_what_is_cut_away(size, resolution, enable_bucket, lost):
    facts = facts_of_source(dataset("image", resolution=resolution, enable_bucket=enable_bucket), Source(size, ""))
    assert (Concern.CROPPED in concerns(facts)) == (lost is not None)
    if lost is not None:
        text = text_of(facts, Concern.CROPPED)
        assert text.startswith(f"{lost:.0%} of {size[0]}x{size[1]} is cut away at the ")
        assert ("left and right" if size[0] * resolution[1] > size[1] * resolution[0] else "top and bottom") in text


@pytest.mark.parametrize(
    ("size", "resolution", "times"),
    [
        ((960, 540), (960, 544), None),
        ((240, 240), (256, 256), None),
        ((480, 272), (960, 544), "2.0"),
        ((100, 400), (256, 256), "2.6"),
    ],
)
def test_what_is_enlarged(size, resolution, times):
    facts = facts_of_source(dataset("image", resolution=resolution), Source(size, ""))
    assert (Concern.UPSCALED in concerns(facts)) == (times is not None)
    if times is not None:
        assert f"enlarged {times} times" in text_of(facts, Concern.UPSCALED)


@pytest.mark.parametrize(
    ("fps", "filmed_fps", "camera", "values"),  # of the file, as it states of the camera, of the camera
    [
        (60, None, 60, {"target_fps": 0}),
        (60, None, 60, {"source_fps": 24}),
        (60, None, 60, {"source_fps": 30}),
        (30, 240, 240, {}),
        (30, 240, 240, {"target_fps": 0}),
        (30, 240, 240, {"source_fps": 240}),
        (30, 1, 1, {}),  # time lapse
        (24, None, 24, {"target_fps": 12}),
        (25, None, 25, {"target_fps": 0}),
        (60, None, 60, {}),
        (240, 240, 240, {}),
        (24, 30, 24, {}),  # a phone in the dark
    ],
)
def test_speed_by_the_moments_at_which_frames_were_filmed(fps, filmed_fps, camera, values):
    facts, source = facts_of_clip(fps, 1000, filmed_fps, target_frames=(49,), **values)
    indices = source.resampling.indices if source.resampling else range(1000)
    speed = (indices[48] - indices[0]) / camera / (48 / 24)  # seconds before the camera in a second of the model
    is_wrong = abs(1 / speed - 1) > 0.05
    assert (Concern.SPEED in concerns(facts)) == is_wrong
    if is_wrong:
        said = text_of(facts, Concern.SPEED).split("trained at ")[1].split(" times")[0]
        assert float(said) == pytest.approx(speed, rel=0.01)


def test_words_of_a_wrong_speed():
    facts, _ = facts_of_clip(60, 60, target_fps=0)
    assert text_of(facts, Concern.SPEED) == (
        "It was filmed at 60 frames per second. target_fps = 0 takes every frame, and 24 are a second for the model: "
        "it is trained at 0.4 times its speed. Remove target_fps."
    )
    for source_fps in (24, 30):
        facts, _ = facts_of_clip(60, 60, source_fps=source_fps)
        assert f"source_fps takes them for {source_fps}: " in text_of(facts, Concern.SPEED)


@pytest.mark.parametrize(
    ("fps", "values", "words"),
    [
        (60, {}, "60 fps → 24 fps, resampled"),
        (60, {"target_fps": 0}, "60 fps, every frame taken: plays at 0.4x"),
        (25, {}, "25 fps, every frame taken"),
        (30, {"source_fps": 240}, "30 fps, taken for 240 → 24 fps, resampled: plays at 8x"),
        (24, {"target_fps": 12}, "24 fps → 12 fps, resampled: plays at 2x"),
    ],
)
def test_words_of_the_rate(fps, values, words):
    assert facts_of_clip(fps, 1000, target_frames=(49,), **values)[0].rate == words


@pytest.mark.parametrize(("fps", "share"), [(8, "67%"), (10, "58%"), (12, None), (24, None), (30, None)])
def test_clips_that_repeat_frames_stutter(fps, share):
    facts, _ = facts_of_clip(fps, 10 * fps, target_frames=(25, 49))
    assert (Concern.STUTTER in concerns(facts)) == (share is not None)
    assert share is None or share in text_of(facts, Concern.STUTTER)


def test_which_part_of_a_clip_is_used():
    facts, _ = facts_of_clip(60, 870, target_frames=(25, 49))
    assert facts.spans == [(0, pytest.approx(49 / 24))] and facts.seconds == 14.5 and facts.fps == 60
    assert facts.use == "2.0 of 14.5 s are used"
    facts, _ = facts_of_clip(30, 300, target_fps=0, target_frames=(25,), frame_extraction="uniform", frame_sample=2)
    assert facts.windows == [(0, 25), (275, 25)] and facts.use == "1.7 of 10.0 s are used"
    np.testing.assert_allclose(facts.spans, [(0, 25 / 30), (275 / 30, 10)])
    facts, _ = facts_of_clip(12, 120, source_fps=24, target_frames=(49,))  # 49 of 12 in a second
    np.testing.assert_allclose(facts.spans, [(0, 49 / 12)])
    facts, _ = facts_of_clip(24, 48, target_frames=(9,), frame_extraction="slide", frame_stride=4)
    assert facts.spans == [(0, 45 / 24)] and len(facts.windows) == 10


def test_a_clip_that_is_too_short_and_a_file_that_is_broken():
    facts, _ = facts_of_clip(24, 12, target_frames=(25, 49))
    assert facts.windows == [] and concerns(facts) == {Concern.SHORT} and facts.size == (640, 360) and facts.kept is not None
    assert "It has 12 frames at 24 per second, fewer than the 25 of target_frames" in text_of(facts, Concern.SHORT)
    assert text_of(facts, Concern.SHORT).endswith("or put 9 into the list target_frames.")
    broken = facts_of_failure(Failure(item(dataset("video")), "a.mp4 is cut short."))
    assert broken.size is None and broken.use == "" and text_of(broken, Concern.FAILED) == "a.mp4 is cut short."


def write_phone_clip(path: Path, capture_fps: str) -> Path:
    with av.open(str(path), "w", format="mp4", options={"movflags": "use_metadata_tags"}) as container:
        container.metadata["com.android.capture.fps"] = capture_fps
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(45):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * number, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return path


def test_what_phones_say_of_slow_motion(tmp_path):
    path = write_phone_clip(tmp_path / "a.mp4", "240.000000")
    info = probe_video(path)
    assert (info.fps, info.filmed_fps) == (30, 240) and info.seconds == pytest.approx(1.5, abs=0.05)
    config = replace(dataset("video", resolution=(64, 48), target_frames=(9,)), directory=tmp_path)
    *_, finished = prepare_item(list_items(config)[0])
    text = text_of(facts_of(finished), Concern.SPEED)
    assert "filmed at 240 frames per second, and its file plays 30 of them" in text and "0.125 times its speed" in text


@pytest.mark.parametrize("nonsense", ["nan", "inf", "-30", "0", "fast", "1e999"])
def test_nonsense_in_the_place_of_a_rate_says_nothing(tmp_path, nonsense):
    assert probe_video(write_phone_clip(tmp_path / "a.mp4", nonsense)).filmed_fps is None


def test_animated_pictures_are_clips_without_a_stated_rate(tmp_path):
    frames = [Image.new("RGB", (64, 48), (20 * number, 0, 0)) for number in range(10)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=125)
    config = replace(dataset("video", resolution=(64, 48), target_frames=(25,)), directory=tmp_path)
    *_, finished = prepare_item(list_items(config)[0])
    facts = facts_of(finished)
    assert facts.fps == pytest.approx(8) and concerns(facts) == {Concern.STUTTER}
    assert facts.use == "1.0 s are used"


def test_captions():
    pictures, others = dataset("image"), replace(dataset("image"), index=1, directory=Path("other"))
    items = [
        item(pictures, "a.png", "a cat"),
        item(pictures, "b.png", "a cat"),
        item(others, "b.png", "a cat"),
        item(pictures, "c.png", "a dog"),
        replace(item(pictures, "c.png", "a dog"), dataset=others),  # the same file at two resolutions
        item(pictures, "d.png", None),
        item(pictures, "e.png", ""),
    ]
    facts = [ItemFacts(one) for one in items]
    compare_items(facts, Fingerprints())
    assert [[note.concern for note in each.notes] for each in facts] == [
        *[[Concern.SAME_CAPTION]] * 3,
        *[[]] * 2,
        *[[Concern.NO_CAPTION]] * 2,
    ]
    assert facts[0].notes[0].text.startswith("3 files have this same caption: a.png, folder/b.png, other/b.png. ")
    many = [ItemFacts(item(pictures, f"{number}.png")) for number in range(9)]
    compare_items(many, Fingerprints())
    assert "9 files have this same caption: 0.png, 1.png, 2.png, 3.png, 4.png and 4 more." in many[7].notes[0].text


def test_tokens_are_counted_as_caching_counts_them(toy_tokenizers):
    captions = ["a red circle", "a red circle " * 30, "a blue square " * 90]
    lengths = hunyuan_model.text_lengths(captions, toy_tokenizers)
    facts = [ItemFacts(item(dataset("image"), f"{number}.png", caption)) for number, caption in enumerate(captions)]
    compare_items(facts, Fingerprints(), lengths)
    cut = cut_texts(captions, toy_tokenizers)
    assert [Concern.LONG_CAPTION in concerns(each) for each in facts] == [caption in cut for caption in captions]
    for each in facts:
        ids = toy_tokenizers[1](each.item.caption)["input_ids"]  # with begin and end
        assert each.tokens[1] == TokenCount(len(ids), 77) and each.tokens[0].limit == 256
    assert facts[0].tokens[0].count == len(toy_tokenizers[0]("a red circle<|eot_id|>", add_special_tokens=False)["input_ids"])
