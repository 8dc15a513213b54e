"""Collects and restores the state of metrics, logged values and running statistics for resume points.

Lightning's checkpoints leave out what metrics and ``self.log`` have accumulated so far in an epoch.
"""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from syncbn.nn.torch_internals import NormBase
from syncbn.training.checkpoint.torchmetrics_internals import forget_result, set_update_count

State = dict[str, Any]


def running_statistics(trainer: pl.Trainer) -> Iterator[tuple[str, Tensor]]:
    """The buffers of all normalization layers, each with its name."""
    for name, layer in trainer.lightning_module.named_modules():
        if isinstance(layer, NormBase):
            yield from ((f"{name}.{key}", buffer) for key, buffer in layer.named_buffers(recurse=False))


def _metric_modules(trainer: pl.Trainer) -> Iterator[tuple[str, Metric]]:
    for name, module in trainer.lightning_module.named_modules():
        if isinstance(module, Metric):
            yield name, module


def metrics_state(trainer: pl.Trainer) -> State:
    """The state that every metric of the module has accumulated on this rank, by the metric's name."""
    return {
        name: {"updates": metric.update_count, "states": on_cpu(metric.metric_state)}
        for name, metric in _metric_modules(trainer)
    }


def set_metrics(trainer: pl.Trainer, saved: State) -> None:
    """Restores this rank's metrics from a state that :func:`metrics_state` returned."""
    for name, metric in _metric_modules(trainer):
        if name in saved:
            set_update_count(metric, saved[name]["updates"])
            forget_result(metric)
            for state in metric.metric_state.keys() & saved[name]["states"].keys():
                setattr(metric, state, _on_device(saved[name]["states"][state], metric.device))


def merge_metrics(trainer: pl.Trainer, other: State) -> None:
    """Adds the state that another rank's metrics had accumulated to this rank's metrics."""
    for name, metric in _metric_modules(trainer):
        if name in other and other[name]["updates"]:
            set_update_count(metric, metric.update_count + other[name]["updates"])
            metric.merge_state({k: _on_device(v, metric.device) for k, v in other[name]["states"].items()})


def merge_results(ranks: list[State]) -> State:
    """Merges the logged values of all ranks into those of one rank."""
    merged: State = {}
    for key, saved in (item for rank in ranks for item in rank.items()):
        if key not in merged:
            merged[key] = {"fold": saved["fold"], "states": dict(saved["states"])}
            continue
        states = merged[key]["states"]
        for name, value in saved["states"].items():
            states[name] = fold(saved["fold"], states[name], value)
    return merged


def fold(how: str, a: Tensor, b: Tensor) -> Tensor:
    """Merges two values elementwise: ``how`` is "add", "max" or "min"."""
    if how == "add":
        return a + b
    return torch.maximum(a, b) if how == "max" else torch.minimum(a, b)


def on_cpu(value: Any) -> Any:
    """Copies nested dicts and lists, with all tensors moved to the CPU."""
    if isinstance(value, dict):
        return {name: on_cpu(each) for name, each in value.items()}
    if isinstance(value, list):
        return [on_cpu(each) for each in value]
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_on_device(each, device) for each in value]
    return value.to(device).clone() if isinstance(value, Tensor) else value
