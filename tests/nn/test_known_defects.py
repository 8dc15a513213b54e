"""What torch.nn.SyncBatchNorm gets wrong (D1 to D9), each on the path on which a user would meet it.

D1: an empty rank under AMP sends half precision where its peers send float32 (torch #37198, #74944).
D2: one value over the group makes running_var infinite for good (its guard asks only for a lone rank).
D3: a batch that is empty everywhere decays the running statistics and is counted (against the spec of #36530).
D4: in a half-precision model counts are half precision: infinite above 65504 values a rank (#98332).
D5: the number of channels is not checked: access out of bounds on the GPU.
D6: conversion breaks aliases, sharing, hooks, subclasses, parametrizations and lazy layers (#187298).
D7: a module with a process group neither copies nor saves (#76927, #73825).
D8: its documentation's example does not run, and states another initialization than happens.
D9: the backward message depends on what one rank's input needs.
"""

import io
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import syncbn
from syncbn.nn.comm import groups
from tests.nn.support.oracle import CHANNELS, close
from tests.nn.support.oracle import with_parameters as parameters
from tests.nn.support.own_forward import NormAct
from tests.support.ranks import Messages, Ranks, messages

Buffers = dict[str, Tensor]
HALVES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)], ids=str)


def a_net() -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Conv2d(CHANNELS, 4, 3, bias=False), nn.Conv2d(4, 2, 1, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.BatchNorm2d(2))


def images(count: int) -> Tensor:
    return torch.randn(count, CHANNELS, 6, 5, generator=torch.Generator().manual_seed(1)) + 0.5


def buffers(net: nn.Module) -> Buffers:
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


# D1


def under_autocast(net: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor | None], Buffers]:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = net(x)
        weights = torch.arange(float(y.shape[1:].numel())).cos().view(y.shape[1:])  # sum() alone has a gradient of zero
        (y.float() * weights).sum().backward()
    return y.detach(), [parameter.grad for parameter in net.parameters()], buffers(net)


def on_a_cut_batch(
    rank: int, world_size: int, net: nn.Module, cut: list[int], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None], Buffers, Messages]:
    with messages() as sent:
        results = under_autocast(net, images(sum(cut)).split(cut)[rank], dtype)
    return *results, sent


@pytest.mark.parametrize("cut", [[0, 6], [3, 0, 3]], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 5e-2)], ids=str
)
def test_d1_an_empty_rank_under_amp(ranks: Ranks, dtype: torch.dtype, tolerance: float, cut: list[int]) -> None:
    net = a_net()
    y, gradients, after = under_autocast(deepcopy(net), images(sum(cut)), dtype)
    results = ranks.run(on_a_cut_batch, syncbn.convert(net), cut, dtype, world_size=len(cut), timeout=20)
    # One type and size on all ranks, the empty one included, whatever the type of the activations.
    layers = [[10], [6], [4], [8]]  # 2C + 2 of each layer forward, 2C of each backward
    for *_, sent in results:
        assert sent.payloads == [("all_reduce", shape, "double") for shape in layers]
    close(torch.cat([mine for mine, *_ in results]), y, tolerance, "y")
    for number, gradient in enumerate(gradients):
        shares = [mine[number] for _, mine, *_ in results]
        scale = gradient.abs().max().clamp_min(1)
        close(sum(shares) / scale, gradient / scale, tolerance, f"gradient {number}")
    for _, _, mine, _ in results:
        for name, expected in after.items():
            close(mine[name], expected, tolerance, name)
            assert torch.equal(mine[name], results[0][2][name]), name


# D2


def one_image_left(rank: int, world_size: int, net: nn.Module) -> list[Buffers]:
    """An epoch's last batch is one image on one rank, and the next epoch goes on."""
    wrapped = DistributedDataParallel(net)
    before = buffers(net)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        wrapped(images(1)[rank:])
    after = buffers(net)
    wrapped(images(5).split([2, 3])[rank]).sum().backward()
    return [before, after, buffers(net)]


def a_head() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 4), nn.BatchNorm1d(4))


def test_d2_one_value_with_an_empty_peer_raises_on_every_rank_and_poisons_nothing(ranks: Ranks) -> None:
    twin = a_head()
    twin(images(5))
    for before, after, at_last in ranks.run(one_image_left, syncbn.convert(a_head()), world_size=2, timeout=20):
        assert all(torch.equal(before[name], after[name]) for name in before)
        for name, expected in twin.named_buffers():
            close(at_last[name], expected, 1e-5, name)


# D3


def nothing_anywhere(rank: int, world_size: int, net: nn.Module) -> tuple[Buffers, Buffers, list[Tensor]]:
    net(images(4)[rank * 2 :][:2])
    before = buffers(net)
    for _ in range(3):
        under_autocast(net, images(0), torch.bfloat16)
    return before, buffers(net), [parameter.grad for parameter in net.parameters()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_d3_a_batch_that_is_empty_everywhere_moves_nothing(ranks: Ranks, world_size: int) -> None:
    for before, after, gradients in ranks.run(nothing_anywhere, syncbn.convert(a_net()), world_size=world_size):
        assert before["1.num_batches_tracked"] == 1
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not any(gradient.any() for gradient in gradients)


# D4


def many_values(rank: int, world_size: int, layer: nn.Module, counts: list[int]) -> tuple[Buffers, Tensor]:
    x = large(counts)[rank].to(layer.weight.dtype).requires_grad_()
    layer(x).square().sum().backward()
    return buffers(layer), x.grad


def large(counts: list[int]) -> list[Tensor]:
    """``counts[rank]`` values a channel: around 3 in the first, around -1 and wider in the second."""
    x = torch.randn(sum(counts), 2, generator=torch.Generator().manual_seed(2))
    return list((x * torch.tensor([1.0, 2.0]) + torch.tensor([3.0, -1.0])).split(counts))


@HALVES
@pytest.mark.parametrize("counts", [[70_001, 70_003], [3, 131_075]], ids=str)
def test_d4_more_than_65504_values_a_channel_in_a_half_precision_model(
    ranks: Ranks, counts: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    layer = syncbn.SyncBatchNorm1d(2, momentum=1.0).to(dtype)
    whole = torch.cat(large(counts)).to(dtype).double()
    eps = torch.finfo(dtype).eps  # what is stored is rounded, once
    for after, dx in ranks.run(many_values, layer, counts, world_size=2):
        assert after["running_mean"].dtype == after["running_var"].dtype == dtype
        close(after["running_mean"], whole.mean(0), eps, "running_mean")
        close(after["running_var"], whole.var(0), eps, "running_var")
        assert dx.isfinite().all()


# D5


def wrong_here(rank: int, world_size: int, wrong: list[int]) -> tuple[str, int]:
    net, x = syncbn.convert(a_net()), images(2)
    net[1].num_features -= rank in wrong  # as if built for fewer channels than come in
    with messages() as sent:
        try:
            net(x)
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}", len(sent)
    return "no error", len(sent)


def test_d5_a_wrong_number_of_channels_raises_before_any_message(ranks: Ranks) -> None:
    for said, sent in ranks.run(wrong_here, [0, 1], world_size=2, timeout=20):
        assert said.startswith("ValueError: ")
        assert "num_features" in said
        assert sent == 0


def wrong_here_in_debug_mode(rank: int, world_size: int) -> tuple[str, int]:
    groups.resolve("world")  # else rank 0 would wait for rank 1 there, and this world could make no group any more
    syncbn.debug()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SYNCBN_DEBUG_TIMEOUT", "1")
            return wrong_here(rank, world_size, [1])
    finally:
        syncbn.debug(False)


def test_d5_on_one_rank_alone_the_others_are_told_in_debug_mode(ranks: Ranks) -> None:
    (first, _), (second, sent) = ranks.run(wrong_here_in_debug_mode, world_size=2, timeout=20, fresh=True)
    assert first.startswith("RuntimeError: layer 1 forward")
    assert "rank 1 did not come within 1 s" in first
    assert second.startswith("ValueError: ")
    assert sent == 0


# D6: a network with all that torch's conversion loses, trained on two ranks.


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = self.alias = nn.BatchNorm2d(CHANNELS)
        self.left, self.right = nn.Sequential(nn.BatchNorm2d(CHANNELS)), nn.Sequential(nn.Tanh())
        self.right.append(self.left[0])
        self.activated = NormAct(CHANNELS)
        self.positive = nn.BatchNorm2d(CHANNELS)
        parametrize.register_parametrization(self.positive, "weight", nn.Softplus())
        self.seen: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.positive(self.activated(self.right(self.left(self.alias(self.norm(x))))))


def trained(rank: int, world_size: int, cut: list[int]) -> tuple[Tensor, list[str], Buffers]:
    net = Everything()
    net.norm.note = "mine"
    net.norm.register_forward_pre_hook(lambda layer, _: net.seen.append(layer.note))
    if len(cut) > 1:
        syncbn.convert(net)
        assert net.alias is net.norm  # (a) torch converts one of the two names
        assert net.left[0] is net.right[1]  # (b) torch makes two of it, which part with the next line
    net.double()
    y = net(images(sum(cut)).double().split(cut)[rank])
    y.square().sum().backward()
    return y.detach(), net.seen, {name: buffer.clone() for name, buffer in net.named_buffers(remove_duplicate=False)}


def test_d6_conversion_keeps_aliases_sharing_hooks_subclasses_and_parametrizations(ranks: Ranks) -> None:
    y, _, expected = trained(0, 1, [6])
    results = ranks.run(trained, [2, 4], world_size=2)
    close(torch.cat([mine for mine, *_ in results]), y, 1e-10, "y")  # (d) torch drops the ReLU, (e) fails on the weight
    for _, seen, mine in results:
        assert seen == ["mine"] * 2  # (c) torch drops the hook and the attribute
        for name, buffer in expected.items():
            close(mine[name], buffer, 1e-10, name)


def test_d6_a_lazy_layer_is_refused_until_it_knows_its_size() -> None:
    net = nn.Sequential(nn.Conv2d(CHANNELS, 4, 1), nn.LazyBatchNorm2d())  # (f) torch makes a SyncBatchNorm(0) of it
    with pytest.raises(TypeError, match=r"1 is a LazyBatchNorm2d: .*run a batch through the model first"):
        syncbn.convert(net)
    net(images(2))
    assert type(syncbn.convert(net)[1]) is syncbn.SyncBatchNorm2d


# D7


def copied(rank: int, world_size: int) -> None:
    group = dist.new_group([0, 1])
    net, x = syncbn.convert(a_net(), group=group), images(4).split([1, 3])[rank]
    net(x)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for copy in (deepcopy(net), torch.load(file, weights_only=False)):
        assert torch.equal(copy(x), deepcopy(net)(x))
        before = copy[1].running_mean.clone()
        copy(x)  # the copy synchronizes, and is a copy
        assert not torch.equal(copy[1].running_mean, before)
        assert not torch.equal(copy[1].running_mean, net[1].running_mean)


def test_d7_a_model_with_a_process_group_copies_and_saves(ranks: Ranks) -> None:
    ranks.run(copied, world_size=2)


# D8

REPO = Path(__file__).parents[2]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in [REPO / "docs" / name for name in ("guide/layer.md", "concepts/communication.md", "quickstart.md")]
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


def example(rank: int, world_size: int, block: str) -> type[nn.Module]:
    x = images(4).split([1, 3])[rank]
    names = {"model": nn.Sequential(a_net()), "x": x, "shortcut": x, "channels": x.shape[1], "torch": torch}
    exec(block, names)
    return next(
        type(layer) for layer in names.get("layer", names["model"]).modules() if isinstance(layer, nn.BatchNorm2d)
    )


@pytest.mark.parametrize("block", BLOCKS)
def test_d8_the_code_in_the_documentation_runs(ranks: Ranks, block: str) -> None:
    # The README's is run by tests/test_readme.py.
    assert set(ranks.run(example, block, world_size=2)) == {syncbn.SyncBatchNorm2d}


@pytest.mark.parametrize(
    "cls", [syncbn.SyncBatchNorm, syncbn.SyncBatchNorm1d, syncbn.SyncBatchNorm2d, syncbn.SyncBatchNorm3d]
)
def test_d8_a_layer_starts_as_torchs_batch_norm_does(cls: type[nn.Module]) -> None:
    # mmcv's starts with weights from U(0, 1), as torch's documentation claims.
    layer, torchs = cls(CHANNELS), nn.BatchNorm2d(CHANNELS)
    assert all(map(torch.equal, layer.state_dict().values(), torchs.state_dict().values()))


# D9


def needing(rank: int, world_size: int, net: nn.Module) -> Tensor | None:
    x = images(6).split([2, 4])[rank].double().requires_grad_(rank == 1)  # an adversarial example, on one rank
    net(x).square().sum().backward()
    return x.grad


@pytest.mark.parametrize("trains", [True, False], ids=["learning", "frozen"])
def test_d9_a_rank_whose_input_needs_no_gradient(ranks: Ranks, trains: bool) -> None:
    net = parameters(nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.Tanh(), nn.BatchNorm2d(CHANNELS))).double()
    net.requires_grad_(trains)
    x = images(6).double().requires_grad_()
    deepcopy(net)(x).square().sum().backward()
    first, second = ranks.run(needing, syncbn.convert(net), world_size=2, timeout=20)
    assert first is None
    close(second, x.grad[2:], 1e-10, "dx")
