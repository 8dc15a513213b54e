"""The losses against their formulas, term by term, and the accuracy of finding the other view."""

import math

import torch
from torch import Tensor

from syncbn.training.models.contrastive.losses import (
    info_nce,
    nearest_is_partner,
    nearest_key_is_partner,
    nt_xent,
)

TEMPERATURE = 0.3


def views(seed: int, images: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, images, 4, generator=generator, dtype=torch.float64)
    return first, second


def test_nt_xent_is_equation_1_of_chen() -> None:
    first, second = views(0)
    z = [*first, *second]

    def exp_of_cosine(i: int, j: int) -> float:
        return math.exp(float(z[i] @ z[j] / (z[i].norm() * z[j].norm())) / TEMPERATURE)

    losses = []
    for i in range(10):
        others = sum(exp_of_cosine(i, k) for k in range(10) if k != i)
        losses.append(-math.log(exp_of_cosine(i, (i + 5) % 10) / others))
    torch.testing.assert_close(nt_xent(first, second, TEMPERATURE), first.new_tensor(sum(losses) / 10))


def test_info_nce_is_equation_1_of_he() -> None:
    queries, keys = (each / each.norm(dim=1, keepdim=True) for each in views(1))
    queue = torch.cat(views(2))
    for query, key, loss in zip(queries, keys, info_nce(queries, keys, queue, TEMPERATURE), strict=True):
        positive = math.exp(float(query @ key) / TEMPERATURE)
        negatives = sum(math.exp(float(query @ each) / TEMPERATURE) for each in queue)
        torch.testing.assert_close(loss, -query.new_tensor(positive / (positive + negatives)).log())


def test_a_view_is_right_if_its_nearest_is_its_partner() -> None:
    def at(*degrees: float) -> Tensor:
        angles = torch.tensor(degrees).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[3.0], [0.5], [1.0]])

    first, second = at(0, 90, 180), at(10, 200, 185)
    # 0 and 10 are a pair; 90 is nearest to 10, and 200 to 185; 180 and 185 are a pair.
    assert nearest_is_partner(first, second).tolist() == [True, False, True, True, False, True]
    # Among the second views alone 90 is nearest to 10.
    assert nearest_key_is_partner(first, second).tolist() == [True, False, True]
    assert nearest_key_is_partner(at(0, 95, 180), at(10, 90, 50)).tolist() == [True, True, False]
