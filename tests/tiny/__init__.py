"""A tiny HunyuanVideo with random weights in the official file layouts, and a small drawn data set, for tests of plumbing."""
