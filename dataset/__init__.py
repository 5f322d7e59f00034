"""From a TOML file to batches of cached tensors."""
