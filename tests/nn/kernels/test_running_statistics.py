"""Averages of a model's weights, which copy it while its group is in use: EMA, and SWA with its pass over the data."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import syncbn
from tests.nn.support.oracle import CHANNELS, close
from tests.support.ranks import Ranks, messages

State = dict[str, Tensor]
BATCHES = 4


def a_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(CHANNELS, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    return net.double()


def data(cut: list[int]) -> list[list[Tensor]]:
    """The batches, in pieces by rank: ranks and batches differ in mean and scale."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(BATCHES, sum(cut), CHANNELS, 3, 2, generator=generator, dtype=torch.float64)
    whole = whole * torch.arange(1.0, BATCHES + 1).view(-1, 1, 1, 1, 1) + torch.arange(sum(cut)).view(1, -1, 1, 1, 1)
    return [list(batch.split(cut)) for batch in whole]


def averaged(net: nn.Module, model: nn.Module, batches: list[Tensor], whole_batch: int) -> AveragedModel:
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for x in batches:
        optimizer.zero_grad()
        # DistributedDataParallel takes the mean over ranks: scaled so that it is the mean over the whole batch.
        ranks = 1 if model is net else 2
        (model(x).cos().sum() * ranks / whole_batch).backward()
        optimizer.step()
        average.update_parameters(net)
    return average


def ema(rank: int, world_size: int, net: nn.Module, cut: list[int]) -> tuple[State, Tensor, int]:
    batches = [pieces[rank] for pieces in data(cut)]
    wrapped = DistributedDataParallel(net)
    wrapped(batches[0]).sum().backward()  # the group is in use before the copy is made
    average = averaged(net, wrapped, batches, sum(cut))
    state = {name: value.clone() for name, value in average.module.state_dict().items()}
    with torch.no_grad(), messages() as sent:  # the copy synchronizes as the model does
        average.train()(batches[0])
    return state, average.eval()(data(cut)[0][0]).detach(), len(sent)


@pytest.mark.parametrize("cut", [[2, 4], [0, 6]], ids=str)
def test_an_ema_of_weights_and_statistics_is_that_of_one_process(ranks: Ranks, cut: list[int]) -> None:
    one, whole = a_net(), [torch.cat(pieces) for pieces in data(cut)]
    one(whole[0])
    expected = averaged(one, one, whole, sum(cut)).module.state_dict()
    results = ranks.run(ema, syncbn.convert(a_net()), cut, world_size=2)
    for state, y, sent in results:
        assert sent == 2
        assert torch.equal(y, results[0][1])
        for name in expected:
            close(state[name], expected[name], 1e-10, name)
            assert torch.equal(state[name], results[0][0][name]), name


def swa(rank: int, world_size: int, net: nn.Module, cut: list[int]) -> State:
    net(data(cut)[-1][rank])  # statistics that must be forgotten
    average = AveragedModel(net)
    average.update_parameters(net)
    update_bn([pieces[rank] for pieces in data(cut)], average)
    assert average.module[1].momentum == 0.1  # update_bn takes the average over all batches, and puts it back
    return average.module.state_dict()


@pytest.mark.parametrize("cut", [[3, 3], [2, 4], [0, 6]], ids=str)
def test_update_bn_gives_the_statistics_of_one_process(ranks: Ranks, cut: list[int]) -> None:
    one = a_net()
    update_bn([torch.cat(pieces) for pieces in data(cut)], one)
    results = ranks.run(swa, syncbn.convert(a_net()), cut, world_size=2)
    for state in results:
        assert state["1.num_batches_tracked"] == BATCHES
        for name, expected in one.state_dict().items():
            close(state[name], expected, 1e-10, name)
            assert torch.equal(state[name], results[0][name]), name


def test_update_bn_in_float32_stays_close(ranks: Ranks) -> None:
    one = a_net()
    update_bn([torch.cat(pieces) for pieces in data([2, 4])], one)
    net = syncbn.convert(a_net()).float()
    for state in ranks.run(swa_in_float32, net, [2, 4], world_size=2):
        for name, expected in one.state_dict().items():
            close(state[name], expected, 1e-4, name)


def swa_in_float32(rank: int, world_size: int, net: nn.Module, cut: list[int]) -> State:
    update_bn([pieces[rank].float() for pieces in data(cut)], net)
    return net.state_dict()
