"""From a TOML file to batches of cached tensors."""

from dataset.config import DatasetConfig, DatasetGroup, load_dataset_config

__all__ = ["DatasetConfig", "DatasetGroup", "load_dataset_config"]
