"""Segmentation: the module and a network."""
