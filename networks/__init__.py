"""What is trained on top of the frozen transformer: LoRA and its file formats."""
