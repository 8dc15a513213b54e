"""Converts models: torch's batch norm into synchronized layers, and back."""
