"""What is sent: one message forward, one backward, none in eval. Counted at c10d's own operations."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from syncbn.nn import statistics
from syncbn.nn.autograd import measure
from syncbn.nn.kernels import dispatch
from syncbn.testing import force_exchange
from tests.nn.support.oracle import CHANNELS, LAYERS, SPATIAL, each_option, make_steps
from tests.support.ranks import Messages, Ranks, messages

SUMS = ("all_reduce", [2 * CHANNELS + 2], "double")  # count, sums, sums of squares, ranks that need a gradient
GRADIENT_SUMS = ("all_reduce", [2 * CHANNELS], "double")


def one_step(
    rank: int, world_size: int, module: nn.Module, pieces: list[Tensor], forced: bool = False
) -> tuple[Messages, Messages]:
    x = pieces[rank].requires_grad_()
    with force_exchange() if forced else nullcontext():
        with messages() as forward:
            y = module(x)
        with messages() as backward:
            y.sum().backward()
    return forward, backward


def pieces(world_size: int, kind: str = "4d", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    cut = [4, 2, 3][:world_size]
    return make_steps(cut, SPATIAL[kind], dtype=dtype)[0].x


def assert_one_each_way(forward: Messages, backward: Messages) -> None:
    assert forward.operations == backward.operations == ["allreduce"]
    assert forward.payloads == [SUMS]
    assert backward.payloads == [GRADIENT_SUMS]


def assert_silent(forward: Messages, backward: Messages) -> None:
    assert forward.operations == backward.operations == []
    assert forward.payloads == backward.payloads == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_training_sends_one_message_each_way(ranks: Ranks, world_size: int, kind: str, dtype: torch.dtype) -> None:
    layer = LAYERS[kind](CHANNELS)
    if dtype == torch.float64:
        layer.double()
    for sent in ranks.run(one_step, layer, pieces(world_size, kind, dtype), world_size=world_size):
        assert_one_each_way(*sent)


@each_option({"momentum": None}, {"affine": False}, {"bias": False}, {"track_running_stats": False})
def test_no_option_adds_a_message(ranks: Ranks, options: dict) -> None:
    for sent in ranks.run(one_step, syncbn.SyncBatchNorm2d(CHANNELS, **options), pieces(2), world_size=2):
        assert_one_each_way(*sent)


@pytest.mark.parametrize("cut", [[0, 8], [1, 1]], ids=str)
def test_empty_and_single_batches_send_the_same(ranks: Ranks, cut: list[int]) -> None:
    (step,) = make_steps(cut, (1, 1), dtype=torch.float32)
    for sent in ranks.run(one_step, syncbn.SyncBatchNorm2d(CHANNELS), step.x, world_size=2):
        assert_one_each_way(*sent)


@pytest.mark.parametrize("tracks", [True, False], ids=["running", "no_running_stats"])
@pytest.mark.parametrize("forced", [True, False], ids=["forced", "plain"])
@pytest.mark.parametrize("group", ["world", "node", 2, 1])
def test_eval_sends_nothing(ranks: Ranks, group: object, forced: bool, tracks: bool) -> None:
    layer = syncbn.SyncBatchNorm2d(CHANNELS, track_running_stats=tracks, group=group).eval()
    for sent in ranks.run(one_step, layer, pieces(2), forced, world_size=2, fresh=True):
        assert_silent(*sent)


@pytest.mark.parametrize(("world_size", "group"), [(1, "world"), (1, 1), (2, 1), (3, 1)])
def test_a_group_of_one_rank_sends_nothing(ranks: Ranks, world_size: int, group: object) -> None:
    layer = syncbn.SyncBatchNorm2d(CHANNELS, group=group)
    for sent in ranks.run(one_step, layer, pieces(world_size), world_size=world_size):
        assert_silent(*sent)


@pytest.mark.parametrize(("world_size", "group"), [(1, "world"), (1, 1), (2, 1)])
def test_a_group_of_one_rank_can_be_forced_to_exchange(ranks: Ranks, world_size: int, group: object) -> None:
    layer = syncbn.SyncBatchNorm2d(CHANNELS, group=group)
    for sent in ranks.run(one_step, layer, pieces(world_size), True, world_size=world_size):
        assert_one_each_way(*sent)


@pytest.mark.parametrize("forced", [True, False], ids=["forced", "plain"])
def test_without_a_process_group_nothing_is_sent(forced: bool) -> None:
    assert_silent(*one_step(0, 1, syncbn.SyncBatchNorm2d(CHANNELS), pieces(1), forced))


def test_forcing_ends_with_its_context(ranks: Ranks) -> None:
    layer = syncbn.SyncBatchNorm2d(CHANNELS)
    for forced, check in ((True, assert_one_each_way), (False, assert_silent)):
        (sent,) = ranks.run(one_step, layer, pieces(1), forced, world_size=1)
        check(*sent)


def test_a_network_sends_two_messages_a_layer_and_nothing_else(ranks: Ranks) -> None:
    net = syncbn.convert(
        nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.BatchNorm2d(CHANNELS))
    )
    for forward, backward in ranks.run(one_step, net, pieces(2), world_size=2):
        assert forward.payloads == [SUMS] * 2
        assert backward.payloads == [GRADIENT_SUMS] * 2
        assert len(forward) == len(backward) == 2


def through_the_function(rank: int, world_size: int, x: Tensor, training: bool) -> Messages:
    mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    with messages() as sent:
        syncbn.sync_batch_norm(x, mean, var, training=training)
    return sent


@pytest.mark.parametrize(("training", "payloads"), [(True, [SUMS]), (False, [])], ids=["training", "eval"])
def test_the_function_sends_one_message_in_training_and_none_in_eval(
    ranks: Ranks, training: bool, payloads: list
) -> None:
    for sent in ranks.run(through_the_function, pieces(1)[0], training, world_size=2):
        assert sent.payloads == payloads
        assert len(sent) == len(payloads)


class Reads(TorchDispatchMode):
    """Counts the values that are read back to the host: ``item()``, ``bool(tensor)`` and the like."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads_of_a_step(rank: int, world_size: int, layer: nn.Module, pieces: list[Tensor]) -> int:
    x = pieces[rank].requires_grad_()
    with pytest.MonkeyPatch.context() as patch, Reads() as reads:
        for module in (measure, dispatch, statistics):
            patch.setattr(module, "may_read", lambda x: False)  # the answer for any device but the CPU
        layer(x).sum().backward()
    return reads.count


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_full_batch_reads_no_value_back_to_the_host_but_on_the_cpu(ranks: Ranks, momentum: float | None) -> None:
    # On a GPU each such read waits for the device, and it breaks the graph of torch.compile.
    layer = syncbn.SyncBatchNorm2d(CHANNELS, momentum=momentum)
    assert ranks.run(reads_of_a_step, layer, pieces(2), world_size=2) == [0, 0]


def test_the_count_of_reads_sees_one() -> None:
    with Reads() as reads:
        assert torch.ones(1)
        torch.ones(()).item()
    assert reads.count == 2
