"""Placeholder."""


def write(cfg, study, root): ...
