"""Checkpoints: when they are saved, how their files are written and checked, and how a run resumes from one."""
