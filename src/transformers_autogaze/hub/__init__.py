"""Checkpoints: loading them safely, and their model cards."""
