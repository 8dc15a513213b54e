"""Adds label noise and outliers to training data: labels of another class, images far out of their range."""

import numpy as np
import torch
from torch import Tensor

from syncbn.training.errors import SettingError


def check_share(name: str, share: float) -> None:
    """Raise a SettingError unless the setting ``name`` is a number from 0 to 1."""
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share <= 1:
        raise SettingError(name, share, "use a share, a number from 0 to 1")


def relabelled(labels: Tensor, share: float, num_classes: int, *, seed: int) -> Tensor:
    """Return labels of which ``round(share * N)`` are replaced by another class, each with equal probability.

    This is "symmetric" label noise. No global generator is used, and ``labels`` are left unchanged.
    """
    rng = np.random.default_rng([seed, 1])  # independent of the stream [seed, 2] of the outliers
    chosen = _chosen(len(labels), share, rng)
    offsets = labels.new_tensor(rng.integers(1, num_classes, len(chosen)))  # 1 or more, so never the same class
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + offsets) % num_classes
    return noisy


def with_outliers(images: Tensor, share: float, scale: float, *, seed: int) -> Tensor:
    """Return images of which ``round(share * N)`` are multiplied by ``scale``; no global generator is used."""
    chosen = _chosen(len(images), share, np.random.default_rng([seed, 2]))
    scaled = images.clone()
    scaled[chosen] *= scale
    return scaled


def _chosen(n: int, share: float, rng: np.random.Generator) -> Tensor:
    """Draw ``round(share * n)`` of the indices 0 to ``n - 1``, without replacement."""
    return torch.from_numpy(rng.permutation(n)[: round(share * n)])
