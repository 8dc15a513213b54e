"""A process group that the user made is used as it is, and found again where the module goes."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import syncbn
from syncbn.nn.comm import c10d, groups
from tests.nn.comm.test_groups import saved
from tests.nn.comm.test_own_groups import another_world
from tests.support.ranks import Ranks

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": saved,
}


def a_layer(group: object) -> nn.Module:
    return syncbn.convert(nn.Sequential(nn.BatchNorm1d(3)), group=group)


def resolved(net: nn.Module) -> dist.ProcessGroup | None:
    return groups.resolve(net[0].group)


def batch(rank: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))


def trained(net: nn.Module, rank: int) -> Tensor:
    net(batch(rank)).sum().backward()
    return net[0].running_mean.clone()


def unequally_many(rank: int, world_size: int) -> Tensor | None:
    made = [dist.new_group(list(range(count))) for count in (1, 2, 3, 4)]
    return trained(a_layer(made[1]), rank) if rank < 2 else None


def test_ranks_in_unequally_many_groups(ranks: Ranks) -> None:
    first, second, *_ = ranks.run(unequally_many, world_size=4, timeout=20, fresh=True)
    assert torch.equal(first, second)


def used_as_they_are(rank: int, world_size: int) -> None:
    made = [dist.new_group([0, 1], timeout=timedelta(seconds=n)) for n in (50, 60)]
    made.append(dist.group.WORLD)
    before = c10d.registered()
    nets = [a_layer(group) for group in (made if rank == 0 else made[::-1])]  # registered in another order
    for net, group in zip(nets if rank == 0 else nets[::-1], made, strict=True):
        trained(net, rank)
        assert resolved(net) is group
        for copy in COPIES.values():
            copied = copy(net)
            assert copied[0].group == (0, 1)
            assert resolved(copied) is group
            trained(copied, rank)
    assert c10d.registered() == before  # nothing was made


def test_groups_of_the_same_ranks_are_told_apart(ranks: Ranks) -> None:
    ranks.run(used_as_they_are, world_size=2, fresh=True)


def own_time_out(rank: int, world_size: int) -> str:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))  # the default group's is half an hour
    net, store = a_layer(group), c10d.default_store()
    trained(net, rank)
    if rank == 1:
        store.wait(["rank 0 ends"], timedelta(seconds=60))
        return ""
    with pytest.raises(RuntimeError) as refusal:
        trained(net, rank)
    store.set("rank 0 ends", "")
    return str(refusal.value)


def test_its_time_out_is_kept(ranks: Ranks) -> None:
    message, _ = ranks.run(own_time_out, world_size=2, timeout=30, fresh=True)
    assert message.startswith("layer 0 forward: ")
    assert message.endswith(" did not come within 2 s")


def after_a_restart(rank: int, world_size: int, file: Path, store: Path) -> str:
    if rank < 2:
        group = dist.new_group([0, 1], use_local_synchronization=True)
        if rank == 0:
            torch.save(a_layer(group), file)
    dist.barrier()
    another_world(rank, world_size, store, 60)
    net = torch.load(file, weights_only=False)
    said = refusal(net, rank)
    dist.new_group([2, 0])
    made = dist.new_group([1, 0])  # equal ranks
    if rank == 2:
        assert refusal(net, rank) == said
    else:
        assert resolved(net) is made
        trained(net, rank)
    return said


def refusal(net: nn.Module, rank: int) -> str:
    with pytest.raises(ValueError, match=r"^layer 0 forward: ") as refused:
        net(batch(rank))
    return str(refused.value)


def test_after_a_restart_it_is_found_by_its_ranks(ranks: Ranks, tmp_path: Path) -> None:
    first, second, out = ranks.run(after_a_restart, tmp_path / "net.pt", tmp_path / "store", world_size=3, fresh=True)
    assert first == second
    assert "group=(0, 1): this process has no process group of these ranks; make one with new_group" in first
    assert "\n" not in first
    assert "rank 2 is not in group (0, 1)" in out


def of_an_earlier_version(rank: int, world_size: int) -> None:
    net = a_layer("world")
    net[0].group = (0, 1)  # what was pickled then
    own = trained(a_layer("world"), rank)
    assert resolved(net) is dist.group.WORLD
    assert torch.equal(trained(net, rank), own)


def test_a_tuple_of_ranks_from_an_earlier_version_is_looked_up(ranks: Ranks) -> None:
    ranks.run(of_an_earlier_version, world_size=2, fresh=True)


def stale(rank: int, world_size: int, store: Path) -> None:
    group = dist.new_group([0])
    net = a_layer(group) if rank == 0 else None
    if net is not None:
        resolved(net)
        dist.destroy_process_group(group)
        with pytest.raises(ValueError, match=r"layer 0 forward: group=\(0,\): this process has no process group"):
            net(batch(rank))
        with pytest.raises(ValueError, match="group=ProcessGroup: it was destroyed"):
            a_layer(group)
    world = dist.group.WORLD
    another_world(rank, world_size, store, 60)
    with pytest.raises(ValueError, match="group=ProcessGroup: it was destroyed"):
        a_layer(world)


def test_a_destroyed_group_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(stale, tmp_path / "store", world_size=2, fresh=True)


def not_a_member(rank: int, world_size: int) -> str:
    group = dist.new_group([0, 1])
    if rank < 2:
        return str(trained(a_layer(group), rank).tolist())
    net = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="rank 2 is not a member of the passed group") as refusal:
        syncbn.convert(net, group=group)
    assert type(net[0]) is nn.BatchNorm1d
    with pytest.raises(
        TypeError, match=r"group=None: .*use_local_synchronization gives it to ranks that are not members"
    ):
        syncbn.convert(net, group=dist.new_group([0, 1], use_local_synchronization=True))
    return str(refusal.value)


def test_a_rank_outside_the_passed_group_is_told_so(ranks: Ranks) -> None:
    *members, message = ranks.run(not_a_member, world_size=3, fresh=True)
    assert len(set(members)) == 1
    assert "-100" not in message
    assert "\n" not in message


def meshes(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for name in ("replicate", "shard"):
        net = a_layer(mesh[name])
        assert resolved(net) is mesh.get_group(name)
        trained(net, rank)
    with pytest.raises(ValueError, match=r"group=DeviceMesh of 2 dimensions: .*group=mesh\['replicate'\]"):
        a_layer(mesh)
    with pytest.raises(ValueError, match=r"mesh\.get_group\(0\)"):
        a_layer(init_device_mesh("cpu", (2, 2)))
    part = dist.DeviceMesh("cpu", [0, 1])
    if rank < 2:
        trained(a_layer(part), rank)
    else:
        with pytest.raises(ValueError, match=rf"group=DeviceMesh: rank {rank} is not a member"):
            a_layer(part)


def test_a_device_mesh_of_one_dimension_is_its_process_group(ranks: Ranks) -> None:
    ranks.run(meshes, world_size=4, fresh=True)


def torchs_own(rank: int, world_size: int) -> None:
    made = [dist.new_group([0, 1]) for _ in range(2)]
    outside = dist.new_group([1 - rank]) if rank else dist.new_group([1])
    for group in (*made, dist.group.WORLD, None, dist.GroupMember.NON_GROUP_MEMBER):
        layer = syncbn.convert(nn.SyncBatchNorm(3, process_group=group), group=made[0])
        assert layer.group.name == made[0].group_name
        assert syncbn.revert(layer).process_group is group or group == dist.GroupMember.NON_GROUP_MEMBER
        assert layer.process_group == group
    assert outside is not None
    dist.destroy_process_group(made[1])
    net = nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3, process_group=made[1]))
    with pytest.raises(ValueError, match="1 is a SyncBatchNorm: group=ProcessGroup: it was destroyed"):
        syncbn.convert(net)
    assert [type(layer) for layer in net] == [nn.BatchNorm1d, nn.SyncBatchNorm]


def test_the_process_group_of_torchs_layer_is_given_back_itself(ranks: Ranks) -> None:
    ranks.run(torchs_own, world_size=2, fresh=True)


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # torch's own doing
@pytest.mark.parametrize("form", ["layers", "function"])
def test_a_graph_keeps_groups_of_the_same_ranks_apart(ranks: Ranks, form: str) -> None:
    ranks.run(compiled, form, world_size=2, timeout=100, fresh=True)


def compiled(rank: int, world_size: int, form: str) -> None:
    torch._dynamo.reset()
    made = [dist.new_group([0, 1]) for _ in range(2)]
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        seen.extend(node.args[2] for node in graph.graph.nodes if "all_reduce" in str(node.target))
        return graph.forward

    nets = nn.Sequential(*(a_layer(group) for group in (*made, "world")))

    def twice(x: Tensor) -> Tensor:
        for group in made:
            x = syncbn.sync_batch_norm(x, None, None, training=True, group=group)
        return x

    model = nets if form == "layers" else twice
    torch.compile(model, fullgraph=True, backend=backend)(batch(rank))
    expected = [group.group_name for group in made]
    if form == "layers":  # and the layer's own, which was made while the graph was
        expected.append(groups.resolve("world").group_name)
    assert seen == expected
