"""Data: samplers, loaders, data modules, augmentation, mixing, shards, corruptions and label noise.

The public names are imported on first use, because Lightning and scikit-learn take seconds to import.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "CIFAR": "image_archives",
    "Digits": "digits",
    "ExactSampler": "samplers",
    "ImageFolder": "image_folder",
    "MNIST": "image_archives",
    "SampleError": "batches",
    "corrupt": "corruptions",
    "exact_loader": "loaders",
    "train_loader": "loaders",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
