"""A tiny HunyuanVideo with random weights in the official file layouts, and a small drawn dataset, for tests of plumbing."""
