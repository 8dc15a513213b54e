"""The operations of a network's forward and backward pass are counted by their formulas."""

import torch
from torch import Tensor, nn

from syncbn.training.models import flops
from syncbn.training.models.flops import Flops
from syncbn.training.models.networks import ResNet
from syncbn.training.network import checkpoint_activations


class Small(nn.Module):
    """A convolution of 3 to 4 channels, 3 x 3, on 8 x 8 pixels, and a layer of 256 to 5."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


CONV, HEAD = 2 * 64 * 4 * 3 * 9, 2 * 256 * 5


def counted(network: nn.Module, inputs: Tensor) -> Flops | None:
    shadow = flops.shadow(network)
    assert shadow is not None
    found = flops.count_training(shadow, flops.first(inputs))
    assert flops.count(shadow, flops.first(inputs)) == (None if found is None else found.forward)
    return found


def test_the_numbers_are_those_of_the_formulas() -> None:
    # Backward: the weights' gradients of both, and the input's of the second alone.
    assert counted(Small(), torch.rand(6, 3, 8, 8)) == Flops(CONV + HEAD, CONV + 2 * HEAD)


def test_a_frozen_part_has_no_gradients_of_its_weights() -> None:
    network = Small()
    network.conv.requires_grad_(False)
    network.norm.requires_grad_(False)
    assert counted(network, torch.rand(1, 3, 8, 8)) == Flops(CONV + HEAD, HEAD)


def test_counting_leaves_no_gradient_and_no_trace() -> None:
    network = Small()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    assert counted(network, torch.ones(2, 3, 8, 8)) is not None
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert all(each.grad is None for each in network.parameters())


def test_a_network_that_takes_no_such_input_has_no_number() -> None:
    assert counted(Small(), torch.rand(2, 7)) is None


def test_attention_is_counted_forward_and_backward() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    tokens = torch.rand(2, 5, 16, requires_grad=True)
    projections, scores = 2 * 5 * 16 * (3 * 16 + 16 + 32 + 32), 2 * 2 * 5 * 5 * 16
    found = counted(layer, tokens)
    assert found is not None
    assert found.forward == projections + scores
    # Two products backward for each one forward; the first projection's input needs no gradient.
    assert found.backward == 2 * (projections + scores) - 2 * 5 * 16 * 3 * 16


def test_recomputed_activations_count_once() -> None:
    images = torch.rand(2, 1, 8, 8)
    network = ResNet()
    plain = counted(network, images)
    checkpoint_activations.checkpoint(network, ["*"])
    assert plain is not None
    assert counted(network, images) == plain


def test_other_types_of_weights() -> None:
    images = torch.rand(2, 1, 8, 8)
    plain = counted(ResNet(), images)
    assert plain is not None
    assert counted(ResNet().double(), images) == plain
    assert counted(ResNet().to(torch.bfloat16), images) == plain
