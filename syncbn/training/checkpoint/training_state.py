"""What a resume point holds besides weights and optimizer: metrics, results and running statistics."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torchmetrics import Metric

State = dict[str, Any]


def _running_statistics(trainer: pl.Trainer) -> Iterator[tuple[str, Tensor]]:
    for name, layer in trainer.lightning_module.named_modules():
        if isinstance(layer, _NormBase):
            yield from ((f"{name}.{key}", buffer) for key, buffer in layer.named_buffers(recurse=False))


def _metric_modules(trainer: pl.Trainer) -> Iterator[tuple[str, Metric]]:
    for name, module in trainer.lightning_module.named_modules():
        if isinstance(module, Metric):
            yield name, module


def _metrics(trainer: pl.Trainer) -> State:
    """What every metric of the module has accumulated on this rank."""
    return {
        name: {"updates": metric._update_count, "states": _on_cpu(metric.metric_state)}
        for name, metric in _metric_modules(trainer)
    }


def _set_metrics(trainer: pl.Trainer, saved: State) -> None:
    for name, metric in _metric_modules(trainer):
        if name in saved:
            metric._update_count, metric._computed = saved[name]["updates"], None
            for state in metric.metric_state.keys() & saved[name]["states"].keys():
                setattr(metric, state, _on_device(saved[name]["states"][state], metric.device))


def _merge_metrics(trainer: pl.Trainer, other: State) -> None:
    for name, metric in _metric_modules(trainer):
        if name in other and other[name]["updates"]:
            metric._update_count += other[name]["updates"]
            metric.merge_state({k: _on_device(v, metric.device) for k, v in other[name]["states"].items()})


def _merge_results(ranks: list[State]) -> State:
    merged: State = {}
    for key, saved in (item for rank in ranks for item in rank.items()):
        if key not in merged:
            merged[key] = {"fold": saved["fold"], "states": dict(saved["states"])}
            continue
        states = merged[key]["states"]
        for name, value in saved["states"].items():
            states[name] = _fold(saved["fold"], states[name], value)
    return merged


def _fold(how: str, a: Tensor, b: Tensor) -> Tensor:
    if how == "add":
        return a + b
    return torch.maximum(a, b) if how == "max" else torch.minimum(a, b)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _on_cpu(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_on_cpu(each) for each in value]
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_on_device(each, device) for each in value]
    return value.to(device).clone() if isinstance(value, Tensor) else value
