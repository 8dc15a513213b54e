"""Measures one training step on one rank: the batch sums of its batch norm layers, and the time of their all-reduces.

:class:`~syncbn.training.callbacks.statistics_monitor.StatisticsMonitor` makes a probe for each step that it measures.
"""

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

TimeMark = float | torch.cuda.Event


class StepProbe:
    """Measures the layers from its creation until :meth:`close`; an :class:`~syncbn.nn.comm.observer.Observer`.

    Of a layer that runs several times in a step (for several batches, or at several places of the network) the sums of
    the first run are kept. Recomputed forward passes are ignored. Layers in compiled code or in a CUDA graph capture
    are not measured.

    Args:
        layers: the batch norm layers, by the name that each of them reports to the observer.
        device: the device of the layers.
    """

    def __init__(self, layers: dict[str, BatchNormBase], device: torch.device) -> None:
        self._layers, self._device = layers, device
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}  # per layer: its sums, and how many values share statistics
        self._spans: list[tuple[str, TimeMark, TimeMark]] = []  # of each all-reduce: its name, start and end
        self._hooks = [
            layer.register_forward_pre_hook(self._pre_hook(name), with_kwargs=True) for name, layer in layers.items()
        ]
        observer.install(self)
        self._start = self._end = _time_mark(device)

    def close(self) -> None:
        """Mark the end of the step and remove the hooks; later calls do nothing."""
        if self._hooks:
            self._end = _time_mark(self._device)
            observer.install(None)
        while self._hooks:
            self._hooks.pop().remove()

    def summary(self, layout: device_spread.Layers) -> Tensor:
        """This rank's term of the all-reduce, a vector.

        It holds the seconds of the step, of the all-reduces of all layers and of those of each layer, and then the
        rank's :meth:`~.device_spread.Layers.share`. On a GPU the host waits for the end of the step.
        """
        seconds: dict[str, float] = defaultdict(float)
        step = _seconds_between(self._start, self._end)
        for place, start, end in self._spans:
            seconds[re.sub(" (forward|backward).*", "", place)] += _seconds_between(start, end)
        times = [step, sum(seconds.values()), *(seconds[name] for name in self._layers)]
        seen = [self._seen.get(name, (None, None)) for name in self._layers]
        share = layout.share([sums for sums, _ in seen], [shared for _, shared in seen])
        return torch.cat([share.new_tensor(times), share])

    def measured(self, name: str, local: Tensor, total: Tensor) -> None:
        if name in self._layers and name not in self._seen and not functional.recomputing() and not _in_capture(local):
            self._seen[name] = local, total[:1]

    @contextmanager
    def sending(self, place: str, message: Tensor) -> Iterator[None]:
        if _in_capture(message):
            yield
            return
        start = _time_mark(message.device)
        yield
        self._spans.append((place, start, _time_mark(message.device)))

    def _pre_hook(self, name: str) -> Any:
        """A forward pre-hook that computes the sums of a layer that does not all-reduce them itself."""

        def add_sums(layer: BatchNormBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling() or not layer.training or name in self._seen or functional.recomputing():
                return
            inputs = [*args, *kwargs.values()]
            if _all_reduces(layer) or not _is_valid_input(layer, inputs) or _in_capture(inputs[0]):
                return
            x, mask = third_party.inputs(layer, args, kwargs)
            with torch.no_grad():
                sums = dispatch.local_sums(x.detach(), mask).sums
                self._seen[name] = sums, sums[:1] * _sharing_factor(layer, len(x))

        return add_sums


def _all_reduces(layer: BatchNormBase) -> bool:
    """Whether the layer all-reduces its sums, and so calls :meth:`StepProbe.measured`."""
    if not isinstance(layer, Synchronized) or layer.ghost_batch is not None:
        return False
    return all_reduce.partners(layer.group, layer.name_in_errors()) is not None


def _is_valid_input(layer: BatchNormBase, inputs: list[Any]) -> bool:
    """Whether the input has the layer's number of channels. For another input the layer itself raises."""
    x = inputs[0] if inputs else None
    return isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == layer.num_features


def _sharing_factor(layer: BatchNormBase, samples: int) -> float:
    """Number of values that share statistics, divided by the number of values on this device.

    torch.nn.SyncBatchNorm is assumed to get batches of equal size on all ranks.
    """
    if isinstance(layer, nn.SyncBatchNorm):
        return dist.get_world_size(layer.process_group)
    ghost = layer.ghost_batch if isinstance(layer, Synchronized) else None
    return 1.0 if ghost is None else 1 / max(samples // ghost, 1)


def _in_capture(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured; kernels and events do not run then."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _time_mark(device: torch.device) -> TimeMark:
    """The current time. On a GPU it is an event in the current stream, so the host does not wait."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(start: TimeMark, end: TimeMark) -> float:
    """Seconds from ``start`` to ``end``; on a GPU the host waits until ``end`` has been reached."""
    if isinstance(start, float):
        assert isinstance(end, float)
        return end - start
    assert not isinstance(end, float)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
