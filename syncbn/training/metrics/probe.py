"""Measures frozen features: a linear probe with few labels, and the nearest neighbour."""

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

CHUNK = 4096  # test images whose cosines are computed at once


def linear_probe(
    features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor, *, per_class: int = 10, seed: int = 0
) -> float:
    """The test accuracy of logistic regression on ``per_class`` labelled training images of each class.

    scikit-learn's default regularization (C=1), which depends on the scale of the features. Therefore they are scaled
    to mean 0 and variance 1 over all training images first, which takes no label.

    Args:
        features: of all training images, shape ``(N, F)``.
        labels: their labels, shape ``(N,)``.
        test_features, test_labels: of the test images, likewise.
        per_class: labelled images of each class; fewer where a class has fewer.
        seed: which images have labels.

    Returns:
        The share of test images that are classified correctly.
    """
    features, test_features = features.double(), test_features.double()
    mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-12)
    chosen = labelled(labels, per_class, seed)
    fitted = LogisticRegression(max_iter=5000).fit(
        ((features[chosen] - mean) / std).cpu().numpy(), labels[chosen].cpu().numpy()
    )
    found = fitted.predict(((test_features - mean) / std).cpu().numpy())
    return float((torch.from_numpy(found) == test_labels.cpu()).double().mean())


def nearest_neighbour(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    """The share of test images whose nearest training image, by the cosine of the features, has the same label.

    The arguments are those of :func:`linear_probe`.
    """
    known = F.normalize(features.double(), dim=1)
    nearest = [(F.normalize(part.double(), dim=1) @ known.T).argmax(1) for part in test_features.split(CHUNK)]
    return float((labels[torch.cat(nearest)] == test_labels).double().mean())


def labelled(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Indices of ``per_class`` images of each class, drawn by ``seed``."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    shuffled = labels[order]
    return torch.cat([order[shuffled == label][:per_class] for label in labels.unique()])
