"""What the layer keeps for its backward pass: its input itself, not a copy, and a few numbers per channel."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import syncbn
from syncbn.testing import force_exchange
from tests.nn.support.oracle import LAYERS, SPATIAL
from tests.support.ranks import Ranks

CHANNELS = 6
NUMBERS = 64 * CHANNELS  # bytes that mean, variance, weight, bias and whatever else is per channel may take


class Saved:
    """The storages that were saved: bytes by address."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def note(self, saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return saved

    def bytes_without(self, *known: Tensor) -> int:
        """What is kept on top of tensors that are there anyway."""
        there = {tensor.untyped_storage().data_ptr() for tensor in known}
        return sum(size for address, size in self.storages.items() if address not in there)


@contextmanager
def what_is_saved() -> Iterator[Saved]:
    saved = Saved()
    with saved_tensors_hooks(saved.note, lambda tensor: tensor):
        yield saved


def an_input(kind: str, layout: torch.memory_format, dtype: torch.dtype) -> Tensor:
    x = torch.randn(16, CHANNELS, *[2 * size for size in SPATIAL[kind]]).to(dtype)
    return x.contiguous(memory_format=layout).requires_grad_()


def in_training(
    rank: int, world_size: int, layer: nn.Module, kind: str, layout: torch.memory_format, dtype: torch.dtype, mask: bool
) -> tuple[int, bool, int]:
    """Bytes kept on top of input and mask, whether the input is what is kept, and the bytes of the input."""
    x = an_input(kind, layout, dtype)
    kept = (torch.arange(16) < 12).view(-1, *[1] * (x.dim() - 2)).expand(16, *x.shape[2:]).contiguous()
    with force_exchange(), what_is_saved() as saved:
        y = layer(x, kept) if mask else layer(x)
    assert y.requires_grad
    itself = x.untyped_storage().data_ptr() in saved.storages
    return saved.bytes_without(x, kept), itself, x.untyped_storage().nbytes()


LAYOUTS = {
    "contiguous": ("4d", torch.contiguous_format),
    "2d": ("2d", torch.contiguous_format),
    "channels_last": ("4d", torch.channels_last),
    "channels_last_3d": ("5d", torch.channels_last_3d),
}


@pytest.mark.parametrize("options", [{}, {"ghost_batch": 4}], ids=["group", "ghost"])
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_only_the_input_and_numbers_per_channel_are_saved(
    ranks: Ranks, world_size: int, layout: str, dtype: torch.dtype, mask: bool, options: dict
) -> None:
    # mmcv keeps the normalized input in float32 on top, twice the memory under float16.
    kind, form = LAYOUTS[layout]
    layer = LAYERS[kind](CHANNELS, **options)
    if dtype == torch.float64:
        layer.double()
    chunks = 4 if options else 1
    for extra, itself, size in ranks.run(in_training, layer, kind, form, dtype, mask, world_size=world_size):
        assert itself
        assert extra <= chunks * NUMBERS
        assert kind == "2d" or size > 2 * chunks * NUMBERS  # so a copy of the input would be seen


def test_a_copy_would_be_seen() -> None:
    x = an_input("4d", torch.contiguous_format, torch.float32)
    with what_is_saved() as saved:
        (x + 1).square()
    assert saved.bytes_without(x) == x.untyped_storage().nbytes()


@pytest.mark.parametrize(("training", "mask"), [(True, False), (False, False), (False, True)], ids=str)
def test_a_lone_process_and_evaluation_save_no_more_than_torch(training: bool, mask: bool) -> None:
    x, kept = an_input("4d", torch.contiguous_format, torch.float32), torch.ones((), dtype=torch.bool)
    sizes = []
    for layer, arguments in (
        (nn.BatchNorm2d(CHANNELS), ()),
        (syncbn.SyncBatchNorm2d(CHANNELS), (kept,) if mask else ()),
    ):
        with what_is_saved() as saved:
            layer.train(training)(x, *arguments)
        sizes.append(saved.bytes_without(x, kept))
    # Torch has no mask: there evaluation may keep the input without what is masked, and the mask's opposite twice.
    assert sizes[1] <= sizes[0] + (x.untyped_storage().nbytes() + 2 * x.numel() if mask else 0)
