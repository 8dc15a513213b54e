"""The public name of :func:`syncbn.training.data.corruptions.corrupt`, which was here first."""

from syncbn.training.data.corruptions import corrupt

__all__ = ["corrupt"]
