"""Processes and hosts: environment, store, Slurm, signals, rank processes, unresponsive ranks."""
