"""Checkpoints: resume points, their files, and what a run continues from."""
