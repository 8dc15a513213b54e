"""The probes of frozen features, where the answer is known."""

import pytest
import torch
from torch import Tensor

from syncbn.training.metrics.probe import labelled, linear_probe, nearest_neighbour


def blobs(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of three classes around three corners; the first of them is long."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 3
    corners = torch.tensor([[9.0, 0.0, 1.0], [0.0, 1.0, 1.0], [-3.0, -1.0, 1.0]])
    return corners[labels] + 0.1 * torch.randn(images, 3, generator=generator), labels


def test_separate_classes_are_told_apart() -> None:
    data = *blobs(90, 0), *blobs(60, 1)
    assert linear_probe(*data) == nearest_neighbour(*data) == 1.0
    wrong = data[3].clone()
    wrong[:15] = (wrong[:15] + 1) % 3
    assert linear_probe(*data[:3], wrong) == nearest_neighbour(*data[:3], wrong) == pytest.approx(0.75)


def test_the_probe_sees_few_labels_and_does_not_depend_on_the_scale() -> None:
    features, labels = blobs(90, 0)
    features = features + torch.randn(90, 3, generator=torch.Generator().manual_seed(2))
    test = blobs(60, 1)
    test[0].add_(torch.randn(60, 3, generator=torch.Generator().manual_seed(3)))
    chosen = labelled(labels, 4, seed=5)
    found = linear_probe(features, labels, *test, per_class=4, seed=5)
    assert found == linear_probe(1000 * features + 7, labels, 1000 * test[0] + 7, test[1], per_class=4, seed=5)
    assert 1 / 3 < found < 1
    assert sorted(labels[chosen].tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert chosen.tolist() != labelled(labels, 4, seed=6).tolist()


def test_the_neighbour_is_nearest_by_cosine() -> None:
    features, labels = torch.tensor([[10.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 1])
    test = torch.tensor([[0.5, 0.1], [0.1, 0.1]])
    assert nearest_neighbour(features, labels, test, torch.tensor([0, 1])) == 1.0
    assert nearest_neighbour(features, labels, test, torch.tensor([1, 1])) == 0.5
