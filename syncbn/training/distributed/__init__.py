"""Rank processes and their hosts: starts and monitors ranks, handles signals, and works with torchrun and Slurm."""
