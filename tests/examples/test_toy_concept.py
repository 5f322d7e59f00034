"""The dataset of the quickstart, and the pictures that show what was learned from it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import load_dataset_config
from dataset.items import list_items, settle_captions
from dataset.media.decoding import iterate_frames
from dataset.media.pictures import read_image
from examples.toy.loss_curve import moving_average, plot_losses, read_losses
from examples.toy.make_concept import CACHE, CLIPS, CONCEPT, KNOWN_CLIPS, KNOWN_PICTURES, PICTURES, ROOT, make_concept
from examples.toy.world import COLOURS
from networks.training.logging.loss_log import LossLog

ZORPS, KNOWN = ("pictures", "clips"), ("known_pictures", "known_clips")
SMALL = 400_000  # bytes that a dataset in the repository may take


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The concept as the script writes it now."""
    return make_concept(tmp_path_factory.mktemp("concept"), cache=CACHE).parent


def media(folder: Path, ending: str, parts: tuple[str, ...]) -> list[Path]:
    return sorted(path for part in parts for path in (folder / part).glob(f"*{ending}"))


def frames_of(path: Path) -> np.ndarray:
    return read_image(path)[None] if path.suffix == ".png" else np.stack(list(iterate_frames(path)))


# ---------------------------------------------------------------------------------------------------------------------
# The dataset


def test_the_repository_holds_what_the_script_writes(made: Path) -> None:
    names = [path.relative_to(made) for path in sorted(made.rglob("*")) if path.is_file()]
    assert names == [path.relative_to(CONCEPT) for path in sorted(CONCEPT.rglob("*")) if path.is_file()]
    for name in names:
        if name.suffix == ".txt":
            assert (made / name).read_text("utf-8") == (CONCEPT / name).read_text("utf-8"), name  # whatever git makes of line ends
        elif name.suffix != ".toml":
            new, kept = frames_of(made / name).astype(int), frames_of(CONCEPT / name).astype(int)
            assert new.shape == kept.shape and np.abs(new - kept).max() <= 1, name  # numpy's last digit may differ
    moved = made.as_posix()
    assert (made / "dataset.toml").read_text("utf-8").replace(moved, CONCEPT.relative_to(ROOT).as_posix()) == (
        CONCEPT / "dataset.toml"
    ).read_text("utf-8")
    assert sum((CONCEPT / name).stat().st_size for name in names) < SMALL


def test_the_data_set_loads_in_the_project_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    datasets = load_dataset_config(CONCEPT / "dataset.toml").datasets
    pictures, clips, known_pictures, known_clips = datasets
    assert (pictures.kind, clips.kind, clips.target_frames) == ("image", "video", (9,))
    assert (known_pictures.kind, known_clips.kind) == ("image", "video")
    assert {dataset.resolution for dataset in datasets} == {(64, 64)}
    items = [list_items(dataset) for dataset in datasets]
    settle_captions([item for some in items for item in some], "error")
    assert [len(some) for some in items] == [len(PICTURES), len(CLIPS), KNOWN_PICTURES, KNOWN_CLIPS]
    assert len(items[0]) == 10 and len(items[1]) == 2


def test_captions_name_the_zorp_and_its_background_and_no_colour_of_it() -> None:
    seen = set()
    for path in media(CONCEPT, ".txt", ZORPS):
        caption = path.read_text(encoding="utf-8").strip()
        words = re.findall(r"\w+", caption)
        assert words.count("zorp") == 1 and not {"star", "striped", "pink", "teal"} & set(words), caption
        (background,) = [word for word in words if word in COLOURS]
        assert background in path.stem
        seen.add(background)
    assert seen == set(COLOURS)


# ---------------------------------------------------------------------------------------------------------------------
# The loss curve


@pytest.fixture
def losses(tmp_path: Path) -> Path:
    path = tmp_path / "loss.csv"
    with LossLog(path) as log:
        for step in range(1, 101):
            log.write(step, 1, 1.0 / step, 0.5, 1e-3)
    return path


def test_the_curve_becomes_a_picture(call_script, losses: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "curve.png"
    ended = call_script("examples.toy.loss_curve", "--input", losses, "--output", output)
    assert ended.status == 0 and ended.stdout.strip() == str(output), ended.stderr
    assert Image.open(output).width > 300


def test_the_last_line_of_a_killed_training_may_be_half(losses: Path) -> None:
    losses.write_text(losses.read_text(encoding="utf-8") + "101,1,0.0", encoding="utf-8")
    steps, values = read_losses(losses)
    assert steps.tolist() == list(range(1, 101)) and values[3] == 0.25


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        ("a,b\n1,2\n", "no columns step and loss"),
        ("step,epoch,loss\n", "no step yet"),
        ("step,epoch,loss\n1,1,abc\n", "line 2"),
        (b"\xff\xfe\x00", "as text"),
    ],
)
def test_a_file_that_is_no_loss_log_is_refused(call_script, tmp_path: Path, content: str | bytes | None, says: str) -> None:
    path = tmp_path / "loss.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    ended = call_script("examples.toy.loss_curve", "--input", path, "--output", tmp_path / "curve.png")
    assert ended.status == 2 and says in ended.stderr and str(path) in ended.stderr
    assert not (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0], [3e-7, 2e-7, 4e-7], [1e5, 2e5]])
def test_any_losses_can_be_plotted(values: list[float], tmp_path: Path) -> None:
    steps = np.arange(1.0, len(values) + 1)
    figure = plot_losses(steps, np.array(values))
    figure.savefig(tmp_path / "curve.png")
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), values)


def test_the_average_is_of_the_last_steps() -> None:
    values = np.array([4.0, 2.0, 0.0, 2.0, 8.0])
    np.testing.assert_allclose(moving_average(values, 2), [4, 3, 1, 1, 5])
    np.testing.assert_allclose(moving_average(values, 1), values)


def test_a_picture_that_cannot_be_written_is_reported_first(call_script, losses: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    ended = call_script("examples.toy.loss_curve", "--input", losses, "--output", tmp_path / "file" / "picture.png")
    assert ended.status == 2 and "--output" in ended.stderr and "cannot be written" in ended.stderr
