"""The HunyuanVideo networks and how to run them. Knows nothing of datasets or training."""
