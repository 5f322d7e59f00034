"""The table of counts, and the errors that say why nothing is left to train on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dataset.batches.cached_items import find_cached_items
from dataset.batches.report import report_cached_group
from dataset.cache.files import save_latents, save_text
from dataset.cache.report import DatasetReport, format_table, require_batches, require_items
from dataset.config import DatasetConfig, DatasetGroup
from dataset.items import list_items
from utils.errors import UserError


def dataset_in(folder: Path, kind: str = "image", **values) -> DatasetConfig:
    return DatasetConfig(0, kind, folder, None, folder / "cache", caption_extension=".txt", **values)


def report_of(dataset: DatasetConfig) -> DatasetReport:
    report = DatasetReport(dataset)
    report.count_items(list_items(dataset))
    report.count_caches()
    return report


@pytest.fixture
def dataset(tmp_path) -> DatasetConfig:
    """Three pictures, one without a caption; two have latents, one of these text."""
    for name in "abc":
        (tmp_path / f"{name}.png").touch()
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("x", encoding="utf-8")
        save_latents(tmp_path / "cache" / f"{name}_0099x0099_hv.safetensors", torch.zeros(16, 1, 4, 6), (99, 99))
    save_text(tmp_path / "cache" / "a_hv_te.safetensors", torch.zeros(2, 4), torch.ones(2), torch.zeros(3), "x")
    return dataset_in(tmp_path, batch_size=2, num_repeats=5)


def test_counts_of_items_and_caches(dataset):
    report = report_of(dataset)
    assert (report.found, report.no_caption, report.latents, report.texts, report.used) == (3, 1, 2, 1, 1)
    assert report.buckets == {(48, 32, 1): 2} and report.batches == 5
    assert report.decoded is None


def test_unreadable_cache_is_left_out_with_a_warning(dataset, caplog):
    (dataset.cache_directory / "b_0099x0099_hv.safetensors").write_bytes(b"cut")
    report = report_of(dataset)
    assert report.latents == 1 and "b_0099x0099_hv.safetensors is not a readable" in caplog.text


def test_training_counts_caches_alone_when_the_media_are_gone(dataset, tmp_path):
    (dataset.cache_directory / "b_0099x0099_hv.safetensors").unlink()
    [group] = find_cached_items(DatasetGroup(tmp_path / "d.toml", (dataset,)))
    report = report_cached_group(group)
    assert (report.found, report.no_caption, report.latents, report.used, report.batches) == (3, 1, 1, 1, 3)
    gone = DatasetConfig(0, "image", tmp_path / "gone", None, dataset.cache_directory)
    [group] = find_cached_items(DatasetGroup(tmp_path / "d.toml", (gone,)))
    report = report_cached_group(group)
    assert (report.found, report.no_caption, report.latents, report.used) == (None, None, 1, 1)


def test_table_shows_every_count_below_its_name(tmp_path):
    report = DatasetReport(dataset_in(tmp_path, kind="video"), 11, 12, 13, 14, 15, 16, 17, 20, 18, {(48, 32, 25): 19})
    header, row, paths, bucket = format_table([report]).splitlines()
    names = ("found", "no caption", "decoded", "too short", "failed", "latents", "texts", "cut", "used", "batches")
    values = ("11", "12", "13", "15", "14", "16", "17", "20", "18", "19")
    for name, value in zip(names, values):
        end = header.index(name) + len(name)
        assert row[:end].endswith(f" {value}")
    assert str(tmp_path) in paths
    assert bucket.split(":") == ["    48x32, 25 frame(s)", " 19 in 19 batch(es) of up to 1"]
    assert "  -  " in format_table([DatasetReport(dataset_in(tmp_path))])


def test_what_another_dataset_reads_from_the_same_folder_is_not_missed(tmp_path):
    for name in ("a.png", "b.mp4", "c.psd"):
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".txt").touch()
    reports = [report_of(dataset_in(tmp_path, kind)) for kind in ("image", "video")]
    assert "2 file(s) with a caption but of a kind not read here: b.mp4, c.psd" in format_table(reports[:1])
    assert format_table(reports).count("1 file(s) with a caption but of a kind not read here: c.psd") == 2


def test_empty_folder_is_an_error_that_names_it(tmp_path):
    dataset = dataset_in(tmp_path)
    with pytest.raises(UserError, match=r"number 1: .* holds no image files"):
        require_items([report_of(dataset)])
    require_items([DatasetReport(dataset)])  # nobody looked


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ({"found": 0}, "holds no video files"),
        (
            {"found": 3, "too_short": 3},
            r"nothing to train on\. In .* number 1, of 3 item.* 3 have fewer frames than the 25",
        ),
        ({"found": 3, "too_short": 1, "failed": 2}, "of 3 item.* 1 have fewer.*, 2 could not be cached"),
        ({"found": 3}, r"none has cached latents: run cache_latents\.py"),
    ],
)
def test_zero_batches_say_which_rule_removed_the_items(tmp_path, counts, sentence):
    report = DatasetReport(dataset_in(tmp_path, kind="video", target_frames=(25, 49)), **counts)
    with pytest.raises(UserError, match=sentence):
        require_batches([report])
    report.buckets = {(16, 16, 1): 1}
    require_batches([report])
