"""The type and range of each setting."""

from syncbn.training.config.ranges.settings import check, plain, unresolved

__all__ = ["check", "plain", "unresolved"]
