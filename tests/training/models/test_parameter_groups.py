"""Learning rates of layers: by depth, and by globs on names; weight decay is divided as without them."""

from functools import partial

import pytest
import torch
from torch import nn

from syncbn.training import MLP, Classifier, ResNet, parameter_groups
from syncbn.training.errors import AgreedError
from syncbn.training.models.parameter_groups import blocks
from tests.support.refuses import refuses


def factors(module: nn.Module, **options: object) -> dict[str, tuple[float, bool]]:
    """The factor of each parameter, and whether it decays, by name."""
    names = {id(p): name for name, p in module.named_parameters()}
    groups = parameter_groups(module, **options)  # type: ignore[arg-type]
    return {names[id(p)]: (g["lr_scale"], "weight_decay" not in g) for g in groups for p in g["params"]}


def test_blocks_of_a_residual_network_share_a_depth() -> None:
    depths = blocks(ResNet(blocks=[1, 1, 1]))
    by_block: dict[str, set[int]] = {}
    for name, depth in depths.items():
        by_block.setdefault(".".join(name.split(".")[:2]), set()).add(depth)
    assert all(len(found) == 1 for found in by_block.values()), by_block
    assert len(set(depths.values())) == 5  # the stem, three blocks, and the head
    assert max(depths.values()) == depths[list(depths)[-1]]


def test_the_rate_falls_from_the_head_to_the_stem_and_norms_do_not_decay() -> None:
    network = MLP(depth=2)
    found = factors(network, layer_decay=0.5)
    # body: 0 Linear, 1 BatchNorm, 2 ReLU, 3 Linear, 4 BatchNorm, 5 ReLU, 6 Linear
    expected = {0: 0.25, 1: 0.25, 3: 0.5, 4: 0.5}
    for name, (factor, decays) in found.items():
        number = int(name.split(".")[1]) if name.startswith("body.") else 9
        assert factor == expected.get(number, 1.0), name
        assert decays == (number not in (1, 4)), name
    assert len(found) == len(list(network.parameters()))


def test_globs_multiply() -> None:
    module = Classifier(MLP(depth=2), partial(torch.optim.SGD, lr=0.1, weight_decay=0.1), num_classes=10)
    found = factors(module, layer_decay=0.5, lr_scale={"*body.0.*": 0.1, "*.weight": 3.0})
    assert found["network.body.0.weight"] == (pytest.approx(0.25 * 0.1 * 3), True)
    assert found["network.body.1.bias"] == (0.25, False)
    with refuses("optimizer.lr_scale", "*stem*", "names are network.body.0.weight", kind=AgreedError):
        parameter_groups(module, lr_scale={"*stem*": 0.1})


def test_the_optimizer_steps_with_these_rates() -> None:
    module = Classifier(
        MLP(depth=2), partial(torch.optim.SGD, lr=0.8), num_classes=10, layer_decay=0.5, lr_scale={"*body.4*": 0.5}
    )
    before = {name: p.clone() for name, p in module.named_parameters()}
    optimizer = module.configure_optimizers()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = {name: float((before[name] - p).detach().mean()) for name, p in module.named_parameters()}
    assert moved["network.body.0.weight"] == pytest.approx(0.2, rel=1e-4)
    assert moved["network.body.4.bias"] == pytest.approx(0.2, rel=1e-4)
    assert moved[list(moved)[-1]] == pytest.approx(0.8, rel=1e-4)


def test_a_norm_at_the_beginning_of_a_block_belongs_to_it() -> None:
    def block() -> nn.Module:
        part = nn.Module()
        part.norm, part.layer = nn.LayerNorm(4), nn.Linear(4, 4)
        return part

    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(block(), block()), nn.LayerNorm(4), nn.Linear(4, 2))
    depths = blocks(network)
    assert depths["1.0.norm.weight"] == depths["1.0.layer.weight"] == 1
    assert depths["1.1.norm.weight"] == depths["1.1.layer.weight"] == depths["2.weight"] == 2
    assert depths["3.weight"] == 3
