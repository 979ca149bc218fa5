"""Checkpoints on disk: complete or not there, verified, read as tensors and plain types."""
