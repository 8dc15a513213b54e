"""Re-exports :func:`syncbn.training.data.corruptions.corrupt` under its earlier public name."""

from syncbn.training.data.corruptions import corrupt

__all__ = ["corrupt"]
