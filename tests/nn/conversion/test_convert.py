"""``convert`` and its exact inverse ``revert``: only the class changes, and all that hangs on a layer stays."""

import warnings
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.nn.modules import Synchronized
from tests.nn.support.oracle import each_option
from tests.nn.support.own_forward import NormAct
from tests.support.ranks import Ranks

TWINS = {
    nn.BatchNorm1d: syncbn.SyncBatchNorm1d,
    nn.BatchNorm2d: syncbn.SyncBatchNorm2d,
    nn.BatchNorm3d: syncbn.SyncBatchNorm3d,
    nn.SyncBatchNorm: syncbn.SyncBatchNorm,
}
INPUTS = {
    nn.BatchNorm1d: (4, 3),
    nn.BatchNorm2d: (4, 3, 2, 2),
    nn.BatchNorm3d: (4, 3, 2, 2, 2),
    nn.SyncBatchNorm: (4, 3, 2),
}
PAIRS = pytest.mark.parametrize(("original", "twin"), TWINS.items(), ids=lambda cls: cls.__name__)
OPTIONS = each_option(
    *({}, {"affine": False}, {"bias": False}, {"track_running_stats": False}),
    *({"momentum": None, "eps": 0.1}, {"dtype": torch.float64}),
)


class Block(nn.Module):
    """A residual block with a layer used twice, as detection heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.instance = nn.InstanceNorm2d(3)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.instance(x))


def an_input() -> Tensor:
    return torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def classes(module: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(child) for name, child in module.named_modules(remove_duplicate=False)}


def synchronized(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, Synchronized)]


def identities(module: nn.Module) -> dict[str, int]:
    things = [*module.named_modules(remove_duplicate=False), *module.named_parameters(remove_duplicate=False)]
    return {name: id(thing) for name, thing in [*things, *module.named_buffers(remove_duplicate=False)]}


def state(module: nn.Module) -> dict[str, dict[str, object]]:
    """Everything that torch or the user keeps on each module, but for the containers of its children."""
    return {name: dict(child.__dict__) for name, child in module.named_modules(remove_duplicate=False)}


@OPTIONS
@PAIRS
def test_there_and_back_leaves_the_layer_as_it_was(original: type, twin: type, options: dict) -> None:
    layer, fresh = original(3, **options), original(3, **options)
    before, ids = state(layer), identities(layer)
    assert syncbn.convert(layer) is layer
    assert type(layer) is twin
    assert layer.group == "world"
    assert identities(layer) == ids
    assert syncbn.revert(layer) is layer
    assert type(layer) is original
    assert identities(layer) == ids
    assert state(layer) == before
    assert layer.__dict__.keys() == fresh.__dict__.keys()
    assert repr(layer) == repr(fresh)


@OPTIONS
@PAIRS
def test_revert_of_a_layer_built_synchronized_gives_the_torch_class(original: type, twin: type, options: dict) -> None:
    layer, fresh = twin(3, **options), original(3, **options)
    ids = identities(layer)
    syncbn.revert(layer)
    assert type(layer) is original
    assert identities(layer) == ids
    assert layer.__dict__.keys() == fresh.__dict__.keys()
    assert repr(layer) == repr(fresh)
    if original is not nn.SyncBatchNorm:  # which does not run on the CPU
        assert torch.equal(*(module(torch.ones(INPUTS[original], dtype=torch.float64).cumsum(0).to(
            options.get("dtype", torch.float32))) for module in (layer, fresh)))  # fmt: skip


@OPTIONS
@PAIRS
def test_a_layer_built_is_the_same_as_one_converted(original: type, twin: type, options: dict) -> None:
    built, converted = twin(3, **options), syncbn.convert(original(3, **options))
    for module in (built, converted):
        module.__dict__.pop("_torch_group", None)  # what the converted one was before
        module.__dict__.pop("process_group", None)
    assert built.__dict__.keys() == converted.__dict__.keys()
    assert repr(built) == repr(converted)


def test_a_network_there_and_back_is_as_it_was() -> None:
    net = Net()
    before, was, ids = state(net), classes(net), identities(net)
    syncbn.convert(net, group="node")
    norms = {name for name, cls in was.items() if cls in TWINS}
    assert set(synchronized(net)) == norms
    assert classes(net) == {name: TWINS.get(cls, cls) for name, cls in was.items()}
    assert all(net.get_submodule(name).group == "node" for name in norms)
    assert identities(net) == ids
    syncbn.revert(net)
    assert classes(net) == was
    assert identities(net) == ids
    assert state(net) == before


def test_converting_twice_changes_nothing_and_keeps_the_first_group() -> None:
    net = syncbn.convert(Net(), group="node")
    before = state(net)
    syncbn.convert(net, group="world")
    assert state(net) == before


def test_reverting_a_network_without_synchronized_layers_changes_nothing() -> None:
    net = Net()
    before, was = state(net), classes(net)
    assert syncbn.revert(net) is net
    assert (state(net), classes(net)) == (before, was)


def test_a_process_alone_computes_what_it_did_before() -> None:
    net, x = Net(), an_input()
    twin = syncbn.convert(deepcopy(net))
    for _ in range(3):
        assert torch.equal(net(x), twin(x))
    assert all(map(torch.equal, net.state_dict().values(), twin.state_dict().values()))
    assert torch.equal(net.eval()(x), twin.eval()(x))


@PAIRS
def test_the_input_may_be_named_as_torch_names_it(original: type, twin: type) -> None:
    x = torch.randn(INPUTS[original])
    assert torch.equal(twin(3)(input=x), twin(3)(x))
    if original is nn.BatchNorm2d:
        assert torch.equal(syncbn.convert(NormAct(3))(x=x), NormAct(3)(x))  # its own class's name


def test_training_flags_stay_and_a_frozen_layer_stays_frozen() -> None:
    net = Net().train()
    net.stem[1].eval()
    for parameter in net.stem[1].parameters():
        parameter.requires_grad_(False)
    flags = {name: module.training for name, module in net.named_modules()}
    for turn in (syncbn.convert, syncbn.revert):
        turn(net)
        assert {name: module.training for name, module in net.named_modules()} == flags
        mean = net.stem[1].running_mean.clone()
        net(an_input())
        assert torch.equal(net.stem[1].running_mean, mean)
        assert net.stem[1].num_batches_tracked == 0
        assert not any(parameter.requires_grad for parameter in net.stem[1].parameters())


def test_hooks_still_fire() -> None:
    net, fired = Net(), []
    layer = net.stem[1]
    layer.register_forward_pre_hook(lambda *_: fired.append("before"))
    layer.register_forward_hook(lambda *_: fired.append("after"))
    layer.register_full_backward_hook(lambda *_: fired.append("backward"))
    for turn in (syncbn.convert, syncbn.revert):
        turn(net)
        fired.clear()
        net(an_input()).sum().backward()
        assert fired == ["before", "after", "backward"]


def test_attributes_of_the_users_stay() -> None:
    net = Net()
    net.stem[1].note, net.stem[1].scale = "mine", torch.ones(2)
    for turn in (syncbn.convert, syncbn.revert):
        turn(net)
        assert net.stem[1].note == "mine"
        assert torch.equal(net.stem[1].scale, torch.ones(2))


def test_a_layer_shared_by_two_parents_stays_shared() -> None:
    net = Net()
    net.blocks[1].norm = net.blocks[0].norm
    for turn, cls in ((syncbn.convert, syncbn.SyncBatchNorm2d), (syncbn.revert, nn.BatchNorm2d)):
        turn(net)
        assert net.blocks[1].norm is net.blocks[0].norm
        assert type(net.blocks[0].norm) is cls


def test_a_layer_with_two_names_is_chosen_by_either() -> None:
    for name in ("first", "second"):
        net = nn.Module()
        net.first = net.second = nn.BatchNorm2d(3)
        syncbn.convert(net, only=name)
        assert net.first is net.second
        assert type(net.first) is syncbn.SyncBatchNorm2d


def test_two_layers_that_share_a_weight_still_do() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    net[1].weight = net[0].weight
    for turn in (syncbn.convert, syncbn.revert):
        turn(net)
        assert net[1].weight is net[0].weight


def test_state_dicts_have_the_same_keys_and_load_both_ways() -> None:
    trained, converted = Net(), syncbn.convert(Net())
    trained(an_input())
    assert list(trained.state_dict()) == list(converted.state_dict())
    assert trained.state_dict()._metadata == converted.state_dict()._metadata
    converted.load_state_dict(trained.state_dict())
    converted(an_input())
    back = Net()
    back.load_state_dict(converted.state_dict())
    assert all(map(torch.equal, back.state_dict().values(), converted.state_dict().values()))


@PAIRS
def test_a_layers_state_dict_loads_both_ways(original: type, twin: type) -> None:
    source = original(3)
    source.running_mean += 1
    middle = twin(3)
    middle.load_state_dict(source.state_dict())
    target = original(3)
    target.load_state_dict(middle.state_dict())
    assert torch.equal(target.running_mean, torch.ones(3))


def test_a_state_dict_from_before_batches_were_counted_loads() -> None:
    old = nn.BatchNorm2d(3).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    layer = syncbn.SyncBatchNorm2d(3)
    layer.load_state_dict(old)
    assert layer.num_batches_tracked == 0


def test_an_optimizer_built_before_still_trains_the_network() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    for turn in (syncbn.convert, syncbn.revert):
        turn(net)
        assert held == [id(parameter) for parameter in net.parameters()]
        weight = net.stem[1].weight.detach().clone()
        optimizer.zero_grad()
        net(an_input()).square().sum().backward()
        optimizer.step()
        assert not torch.equal(net.stem[1].weight, weight)


@pytest.mark.parametrize(
    ("only", "chosen"),
    [
        (None, ["stem.1", "blocks.0.norm", "blocks.1.norm", "head.2"]),
        (lambda name, module: module.num_features == 6, ["head.2"]),
        (lambda name, module: name.startswith("blocks"), ["blocks.0.norm", "blocks.1.norm"]),
        (lambda name, module: False, []),
        ("blocks.*", ["blocks.0.norm", "blocks.1.norm"]),
        ("*.1*", ["stem.1", "blocks.1.norm"]),
        ("stem.1", ["stem.1"]),
        ("nothing", []),
        (["stem.*", "head.*"], ["stem.1", "head.2"]),
        (("blocks.[0]*",), ["blocks.0.norm"]),
        ((glob for glob in ("stem.*", "blocks.1*")), ["stem.1", "blocks.1.norm"]),
        ([], []),
    ],
    ids=[
        "all",
        "predicate",
        "names",
        "never",
        "glob",
        "infix",
        "name",
        "nothing",
        "list",
        "tuple",
        "iterator",
        "empty",
    ],
)
def test_only_chooses_layers(only: object, chosen: list[str]) -> None:
    assert synchronized(syncbn.convert(Net(), only=only)) == chosen


def test_only_chooses_layers_to_revert() -> None:
    net = syncbn.revert(syncbn.convert(Net()), only=["stem.*", "*.0.norm"])
    assert synchronized(net) == ["blocks.1.norm", "head.2"]
    assert synchronized(syncbn.revert(net, only=lambda name, module: name == "head.2")) == ["blocks.1.norm"]


def test_layers_may_be_converted_to_different_groups() -> None:
    net = syncbn.convert(syncbn.convert(Net(), only="stem.*", group="node"), group=2)
    assert [net.get_submodule(name).group for name in synchronized(net)] == ["node", 2, 2, 2]


def test_a_subclass_of_a_synchronized_layer_is_not_reverted_to_a_guess() -> None:
    class Mine(syncbn.SyncBatchNorm2d):
        pass

    net = nn.Sequential(nn.Conv2d(3, 3, 1), syncbn.SyncBatchNorm2d(3), Mine(3))
    was = classes(net)
    with pytest.raises(TypeError, match=r"2 is a .*Mine"):
        syncbn.revert(net)
    assert classes(net) == was


def test_an_unknown_group_leaves_the_model_untouched() -> None:
    net = Net()
    was, before = classes(net), state(net)
    with pytest.raises(ValueError, match="cluster"):
        syncbn.convert(net, group="cluster")
    assert (classes(net), state(net)) == (was, before)


def test_torchs_synchronized_layers_are_taken_over_and_given_back() -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Net())
    was, before, x = classes(net), state(net), an_input()
    syncbn.convert(net)
    assert set(synchronized(net)) == {"stem.1", "blocks.0.norm", "blocks.1.norm", "head.2"}
    net(x)  # which torch's own layers refuse on the CPU
    assert not isinstance(net.stem[1], nn.SyncBatchNorm)
    syncbn.revert(net)
    assert (classes(net), state(net)) == (was, before)


def test_checkpoints_of_torchs_synchronized_layers_load_both_ways() -> None:
    trained = syncbn.convert(nn.SyncBatchNorm.convert_sync_batchnorm(Net()))
    for _ in range(3):
        trained(an_input())
    checkpoint = deepcopy(syncbn.revert(trained).state_dict())  # as torch's layers leave it
    assert isinstance(trained.stem[1], nn.SyncBatchNorm)
    fresh = {
        "converted from torch's": syncbn.convert(nn.SyncBatchNorm.convert_sync_batchnorm(Net())),
        "converted": syncbn.convert(Net()),
        "plain": Net(),
    }
    for there in fresh.values():
        there.load_state_dict(checkpoint)
        assert torch.equal(there.eval()(an_input()), trained.eval()(an_input()))
        there.train()(an_input())
        back = nn.SyncBatchNorm.convert_sync_batchnorm(Net())
        back.load_state_dict(there.state_dict())
        assert list(there.state_dict()) == list(checkpoint)
        assert there.state_dict()._metadata == checkpoint._metadata
        assert back.stem[1].num_batches_tracked == 4
        assert torch.equal(back.eval()(an_input()), there.eval()(an_input()))


def test_the_process_group_of_torchs_layers_is_given_back(ranks: Ranks) -> None:
    ranks.run(takes_over_and_gives_back, world_size=2)


def takes_over_and_gives_back(rank: int, world_size: int) -> None:
    mine = dist.new_group([0]), dist.new_group([1])
    for group, members in ((mine[rank], (rank,)), (dist.group.WORLD, (0, 1))):
        layer = syncbn.convert(nn.SyncBatchNorm(3, process_group=group))
        assert layer.group == "world"
        copy = deepcopy(layer)  # the process group itself would not copy
        for each in (layer, copy):
            syncbn.revert(each)
            assert type(each) is nn.SyncBatchNorm
            assert tuple(dist.get_process_group_ranks(each.process_group)) == members
            assert each.__dict__.keys() == nn.SyncBatchNorm(3).__dict__.keys()


def test_torchs_conversion_on_top_of_ours_raises_and_says_what_to_drop() -> None:
    net = syncbn.convert(Net())
    was = classes(net)
    with pytest.raises(TypeError, match=r"drop torch\.nn\.SyncBatchNorm\.convert_sync_batchnorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert classes(net) == was
    for twin in TWINS.values():
        with pytest.raises(TypeError, match=r"drop torch\.nn\.SyncBatchNorm\.convert_sync_batchnorm"):
            nn.SyncBatchNorm.convert_sync_batchnorm(twin(3))
    nn.SyncBatchNorm.convert_sync_batchnorm(syncbn.revert(net))


@pytest.mark.parametrize(
    "make", [lambda: syncbn.SyncBatchNorm2d(3), lambda: syncbn.convert(nn.BatchNorm2d(3))], ids=["built", "converted"]
)
def test_a_qconfig_may_be_asked_for_set_and_deleted(make: Callable[[], nn.Module]) -> None:
    layer = make()
    assert not hasattr(layer, "qconfig")
    assert getattr(layer, "qconfig", None) is None
    layer.qconfig = "int8"
    assert layer.qconfig == "int8"
    assert deepcopy(layer).qconfig == "int8"
    assert syncbn.revert(layer).qconfig == "int8"
    assert syncbn.convert(layer).qconfig == "int8"
    del layer.qconfig  # as torch's own quantization does when it is done
    assert not hasattr(layer, "qconfig")
    layer.qconfig = None
    assert hasattr(layer, "qconfig")


def test_torchs_quantization_reads_and_cleans_up_its_setting() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao moves to another package, and says so in several ways
        from torch.ao.quantization import get_default_qconfig, propagate_qconfig_
        from torch.ao.quantization.quantize import _remove_qconfig

        net = syncbn.convert(Net())
        net.qconfig = get_default_qconfig("fbgemm")
        propagate_qconfig_(net)
        assert net.stem[1].qconfig is not None
        _remove_qconfig(net)
    assert not any(hasattr(module, "qconfig") for module in net.modules())


@PAIRS
def test_the_twin_is_what_torch_and_ddp_take_for_a_batch_norm(original: type, twin: type) -> None:
    assert issubclass(twin, nn.modules.batchnorm._BatchNorm)
    assert not issubclass(twin, nn.SyncBatchNorm)
    if original is not nn.SyncBatchNorm:
        assert issubclass(twin, original)
