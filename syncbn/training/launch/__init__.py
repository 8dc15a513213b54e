"""Launching: starts the rank processes of a command, reports how they ended, and runs sweeps and pools of runs."""
