"""A small HunyuanVideo that was trained on drawings, and everything that made it."""
