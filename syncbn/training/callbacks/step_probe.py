"""A look at one training step, on one rank: what its batch norm layers saw, and how long their messages took."""

import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.nn import functional
from syncbn.nn.comm import all_reduce, observer
from syncbn.nn.conversion import third_party
from syncbn.nn.kernels import dispatch
from syncbn.nn.modules import Synchronized
from syncbn.nn.torch_internals import BatchNormBase
from syncbn.training.callbacks import device_spread

Mark = float | torch.cuda.Event


class Look:
    """Watches the layers from when it is made until :meth:`close`; an :class:`~syncbn.nn.comm.observer.Observer`.

    Of a layer that runs several times in a step (for several batches of it, or at several places of the network) the
    first time counts; a recomputation does not. Compiled layers cannot be seen, nor what CUDA graphs capture.

    Args:
        layers: the batch norm layers by the names that they themselves go by.
        device: that they are on.
    """

    def __init__(self, layers: dict[str, BatchNormBase], device: torch.device) -> None:
        self._layers, self._device = layers, device
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}  # its sums, and how many values share statistics
        self._spans: list[tuple[str, Mark, Mark]] = []
        self._hooks = [
            layer.register_forward_pre_hook(self._before(name), with_kwargs=True) for name, layer in layers.items()
        ]
        observer.begin(self)
        self._start = self._end = _now(device)

    def close(self) -> None:
        """The step is over; may be called again."""
        if self._hooks:
            self._end = _now(self._device)
            observer.end()
        while self._hooks:
            self._hooks.pop().remove()

    def message(self, layout: device_spread.Layers) -> Tensor:
        """What this rank adds: the seconds of the step, of all the messages of its layers, and of those of each layer;
        then its :meth:`~.device_spread.Layers.share`. On a GPU the host waits for the end of the step.
        """
        seconds: dict[str, float] = defaultdict(float)
        step = _between(self._start, self._end)
        for place, start, end in self._spans:
            seconds[re.sub(" (forward|backward).*", "", place)] += _between(start, end)
        times = [step, sum(seconds.values()), *(seconds[name] for name in self._layers)]
        seen = [self._seen.get(name, (None, None)) for name in self._layers]
        share = layout.share([sums for sums, _ in seen], [shared for _, shared in seen])
        return torch.cat([share.new_tensor(times), share])

    def measured(self, name: str, local: Tensor, total: Tensor) -> None:
        if name in self._layers and name not in self._seen and not functional.recomputing() and not _captures(local):
            self._seen[name] = local, total[:1]

    @contextmanager
    def sending(self, place: str, message: Tensor) -> Iterator[None]:
        if _captures(message):
            yield
            return
        start = _now(message.device)
        yield
        self._spans.append((place, start, _now(message.device)))

    def _before(self, name: str) -> Any:
        """A hook that takes the sums of a layer that exchanges none."""

        def look(layer: BatchNormBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling() or not layer.training or name in self._seen or functional.recomputing():
                return
            given = [*args, *kwargs.values()]
            if _exchanges(layer) or not _fits(layer, given) or _captures(given[0]):
                return
            x, mask = third_party.inputs(layer, args, kwargs)
            with torch.no_grad():
                sums = dispatch.local_sums(x.detach(), mask).sums
                self._seen[name] = sums, sums[:1] * _shared(layer, len(x))

        return look


def _exchanges(layer: BatchNormBase) -> bool:
    """Whether the layer will tell by itself."""
    if not isinstance(layer, Synchronized) or layer.ghost_batch is not None:
        return False
    return all_reduce.partners(layer.group, layer.name_in_errors()) is not None


def _fits(layer: BatchNormBase, given: list[Any]) -> bool:
    """Whether the layer's input is one; what is none is for the layer to refuse."""
    x = given[0] if given else None
    return isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == layer.num_features


def _shared(layer: BatchNormBase, samples: int) -> float:
    """Values that share statistics, as a multiple of this device's; torch's own layer takes equal batches on trust."""
    if isinstance(layer, nn.SyncBatchNorm):
        return dist.get_world_size(layer.process_group)
    ghost = layer.ghost_batch if isinstance(layer, Synchronized) else None
    return 1.0 if ghost is None else 1 / max(samples // ghost, 1)


def _captures(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _now(device: torch.device) -> Mark:
    """The moment: on a GPU that of its stream, which the host does not wait for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Mark, end: Mark) -> float:
    """Seconds; waits for a GPU to come to ``end``."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
