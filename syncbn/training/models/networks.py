"""Two small networks with batch norm: a convolutional ResNet and an MLP."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from syncbn.nn import norm_act
from syncbn.training.errors import SettingError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
INITS = ("he", "torch")


class ResNet(nn.Module):
    """A residual network (He et al. 2016) for images of 8x8 to 32x32; about 77,000 parameters with the defaults.

    Args:
        in_channels: 1 for grey images, 3 for colour.
        num_classes: number of outputs.
        width: channels of the first stage; each further stage has twice as many as the one before.
        blocks: number of residual blocks in each stage; each stage after the first halves the image size.

    Shape:
        Input ``(N, in_channels, H, W)``, output ``(N, num_classes)``.
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, width: int = 16, blocks: Sequence[int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.stem = _Stem(_conv3x3(in_channels, width), nn.BatchNorm2d(width))
        stages: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            out = width * 2**stage
            for block in range(count):
                stages.append(_Block(channels, out, stride=2 if stage and not block else 1))
                channels = out
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        _he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.stages(self.stem(x)).mean(dim=(2, 3)))
        return scores


class MLP(nn.Module):
    """``depth`` times Linear, BatchNorm1d and an activation, then a Linear.

    Without image positions, a channel has one value per sample, so the batch size alone determines the quality of the
    statistics.

    Args:
        in_features: numbers per sample; images are flattened.
        num_classes: number of outputs.
        depth: number of hidden layers.
        width: number of features of each hidden layer.
        activation: "relu", "sigmoid" or "tanh".
        init: initialization of the weights. "he": normal with variance ``g^2 / fan_in`` (He et al. 2015; g is the
            activation's gain in ``torch.nn.init.calculate_gain``: sqrt 2 for ReLU, 5/3 for tanh, 1 for sigmoid), and
            zero biases, also in the head. "torch": the default of Linear, for the head's bias too. Biases that
            ``norm=none`` adds to the hidden layers are zero with both.
        gain: factor on the initial weights of the hidden layers, with either ``init``. The head is not scaled: no
            normalization follows it, so the factor would only act as a temperature of the softmax.

    Shape:
        Input ``(N, *)`` with ``in_features`` numbers per sample, output ``(N, num_classes)``.

    Raises:
        SettingError: unknown ``activation`` or ``init``; a gain that is not above 0.
    """

    def __init__(
        self,
        in_features: int = 64,
        num_classes: int = 10,
        depth: int = 4,
        width: int = 64,
        activation: str = "relu",
        init: str = "he",
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise SettingError("model.activation", activation, "use relu, sigmoid or tanh")
        if init not in INITS:
            raise SettingError("model.init", init, "use he, or torch for the default of torch's Linear")
        if isinstance(gain, str) or not 0 < gain < math.inf:
            raise SettingError("model.gain", gain, "use a number above 0; 1 leaves the weights as drawn")
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(in_features, width, bias=False), nn.BatchNorm1d(width), ACTIVATIONS[activation]()]
            in_features = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(in_features, num_classes)
        if init == "he":
            _he_init(self, activation)
        for layer in self.body if gain != 1 else ():
            if isinstance(layer, nn.Linear):
                layer.weight.data.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(x.flatten(1)))
        return scores


class _Stem(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self
        return norm_act(norm, conv(x))


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = norm_act(self.bn1, self.conv1(x))
        return norm_act(self.bn2, self.conv2(out), residual=self.shortcut(x))


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def _he_init(module: nn.Module, activation: str = "relu") -> None:
    """Initialize weights with variance 2 / fan (He et al. 2015, eq. 10); networks without normalization need it.

    For other activations than ReLU, the 2 is replaced by the square of the activation's gain.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity=activation)  # type: ignore[arg-type]
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
