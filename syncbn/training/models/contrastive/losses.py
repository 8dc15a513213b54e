"""The losses of contrastive learning, and the accuracy of its task: to find the other view of an image."""

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent, the loss of SimCLR (Chen et al. 2020, arXiv:2002.05709, eq. 1 and algorithm 1).

    Of N images there are 2N views ``z``. With ``s_ij`` the cosine of views i and j, and j the other view of i's image::

        l_ij = -log( exp(s_ij / temperature) / sum over k != i of exp(s_ik / temperature) )

    Args:
        first, second: embeddings of the two views of N images, shapes ``(N, D)``, in the same order.
        temperature: above 0.

    Returns:
        The mean of ``l`` over all 2N views, a scalar.
    """
    similarity, partner = _among_all(first, second)
    return F.cross_entropy(similarity / temperature, partner)


def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE, the loss of MoCo (He et al. 2020, arXiv:1911.05722, eq. 1).

    With ``k+`` the key of the query's image and ``k_i`` over this key and the K keys of the queue::

        l_q = -log( exp(q . k+ / temperature) / sum over i of exp(q . k_i / temperature) )

    Args:
        queries, keys: embeddings of length 1 of the two views of N images, shapes ``(N, D)``; keys have no gradient.
        queue: keys of earlier images, shape ``(K, D)``.
        temperature: above 0.

    Returns:
        ``l`` of each query, shape ``(N,)``.
    """
    scores = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], dim=1)
    positive = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    return F.cross_entropy(scores / temperature, positive, reduction="none")


@torch.no_grad()
def nearest_is_partner(first: Tensor, second: Tensor) -> Tensor:
    """For each view, whether the nearest other view of the batch, by cosine, is of the same image.

    The share of these is the pretext accuracy. By chance it is ``1 / (2N - 1)``.

    Args:
        first, second: embeddings of the two views of N images, shapes ``(N, D)``, in the same order.

    Returns:
        Booleans of shape ``(2N,)``: of the first views, then of the second ones.
    """
    similarity, partner = _among_all(first, second)
    return similarity.argmax(1) == partner


@torch.no_grad()
def nearest_key_is_partner(queries: Tensor, keys: Tensor) -> Tensor:
    """For each query, whether the nearest key of the batch, by cosine, is of the same image; by chance ``1 / N``.

    Args:
        queries, keys: embeddings of the two views of N images by two networks, shapes ``(N, D)``.

    Returns:
        Booleans of shape ``(N,)``.
    """
    similarity = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T
    return similarity.argmax(1) == torch.arange(len(queries), device=queries.device)


def _among_all(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines of all 2N views, -inf with themselves, shape ``(2N, 2N)``; and the index of each view's partner."""
    views = F.normalize(torch.cat([first, second]), dim=1)
    similarity = (views @ views.T).fill_diagonal_(float("-inf"))
    return similarity, torch.arange(len(views), device=views.device).roll(len(first))
