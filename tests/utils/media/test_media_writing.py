"""utils.media.writing: pictures and videos read back."""

import av
import numpy as np
import pytest
from PIL import Image

from utils.media.writing import save_animation, save_picture, save_video


@pytest.fixture
def frames() -> np.ndarray:
    """Five frames (5, 32, 48, 3): a bright bar that moves over a smooth gradient."""
    gradient = np.linspace(0, 200, 48, dtype=np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2)
    pictures = np.stack([gradient] * 5)
    for index in range(5):
        pictures[index, :, 8 * index : 8 * index + 8] = (240, 30, 30)
    return pictures


def test_a_picture_is_lossless_and_carries_metadata(tmp_path, frames):
    save_picture(tmp_path / "out" / "a.png", frames[0], {"prompt": "a bar, バー"})
    with Image.open(tmp_path / "out" / "a.png") as picture:
        assert picture.text["prompt"] == "a bar, バー"
        np.testing.assert_array_equal(np.asarray(picture), frames[0])


@pytest.mark.parametrize("count", [1, 5])
def test_video_has_every_frame_rate_and_metadata(tmp_path, frames, count):
    path = tmp_path / "clip.mp4"
    save_video(path, frames[:count], 24, {"seed": "7"})
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 24
        assert "seed: 7" in container.metadata["comment"]
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded.shape == (count, 32, 48, 3)
    assert np.abs(decoded.astype(int) - frames[:count]).mean() < 12  # chroma subsampling blurs the bar's edges
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize(("ending", "within"), [("webp", 8), ("gif", 12)])
@pytest.mark.parametrize("count", [1, 5])
def test_an_animation_has_every_frame_and_takes_its_time(tmp_path, frames, ending, within, count):
    path = tmp_path / f"clip.{ending}"
    save_animation(path, frames[:count], 24)
    with Image.open(path) as animation:
        assert animation.n_frames == count
        decoded, milliseconds = [], 0
        for index in range(count):
            animation.seek(index)
            animation.load()
            decoded.append(np.asarray(animation.convert("RGB")).astype(int))
            milliseconds += animation.info.get("duration", 0)
    assert np.abs(np.stack(decoded) - frames[:count]).mean() < within
    if count > 1:
        assert milliseconds == pytest.approx(1000 * count / 24, abs=5)
    assert [file.name for file in tmp_path.iterdir()] == [f"clip.{ending}"]


def test_a_gif_is_no_faster_than_players_show_it(tmp_path, frames, caplog):
    save_animation(tmp_path / "a.gif", frames, 60)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.info["duration"] == 20
    assert "a GIF holds at most 50" in caplog.text


def test_videos_are_the_same_each_time(tmp_path):
    """Whatever the memory held before."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 14, 3), np.uint8)).resize((192, 112))
    clip = np.stack([np.roll(np.asarray(coarse), 3 * number, axis=1) for number in range(9)])
    found, other = set(), []
    for number in range(20):
        other = [*other[number % 3 :], rng.integers(0, 256, 4000 * (number + 1), np.uint8)]
        save_video(tmp_path / "a.mp4", clip, 24)
        found.add((tmp_path / "a.mp4").read_bytes())
    assert len(found) == 1
