"""Reads run directories: their settings, their metrics and the labels that tell them apart."""
