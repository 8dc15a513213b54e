"""Training data that are in part wrong: labels of another class, images far out of their range."""

import numpy as np
import torch
from torch import Tensor

from syncbn.training.errors import SettingError


def check_share(name: str, share: float) -> None:
    """Refuses what is no share.

    Raises:
        SettingError: it is not a number from 0 to 1.
    """
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share <= 1:
        raise SettingError(name, share, "use a share, a number from 0 to 1")


def relabelled(labels: Tensor, share: float, num_classes: int, *, seed: int) -> Tensor:
    """Labels of which ``round(share * N)`` are another class, any of the others as likely ("symmetric" noise).

    Args:
        labels: shape ``(N,)``, 0 to ``num_classes - 1``; left as they are.
        share: 0 to 1.
        num_classes: two or more.
        seed: of what is drawn; no global generator is used.
    """
    rng = np.random.default_rng([seed, 1])  # a stream of its own beside the outliers'
    chosen = _chosen(len(labels), share, rng)
    others = labels.new_tensor(rng.integers(1, num_classes, len(chosen)))
    made = labels.clone()
    made[chosen] = (labels[chosen] + others) % num_classes
    return made


def with_outliers(images: Tensor, share: float, scale: float, *, seed: int) -> Tensor:
    """Images of which ``round(share * N)`` are multiplied by ``scale``.

    Args:
        images: shape ``(N, *)``; left as they are.
        share: 0 to 1.
        scale: the factor.
        seed: of what is drawn; no global generator is used.
    """
    chosen = _chosen(len(images), share, np.random.default_rng([seed, 2]))
    made = images.clone()
    made[chosen] *= scale
    return made


def _chosen(n: int, share: float, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.permutation(n)[: round(share * n)])
