"""Batch norm that ``convert`` cannot synchronize since it is in no layer of torch's class: found, so that it is named.

It is in the graph of a module that was scripted, traced, exported or made by ``torch.fx``; or in the forward pass of
another class, which calls ``torch.nn.functional.batch_norm`` with running statistics of its own or of a layer in it.
"""

import ast
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

_OF_TORCH = ("torch.nn.modules.module", "torch.nn.modules.container")
_TRAINING = 5  # position of ``training`` in the call of torch.nn.functional.batch_norm


def reason(module: nn.Module) -> str | None:
    """Why this module, by itself, has batch norm in it that no layer of torch's class does; None where it has none."""
    if isinstance(module, _BatchNorm):
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return _in_script(module)
    if isinstance(module, fx.GraphModule):
        return _in_graph(module)
    forward = vars(module).get("forward")
    if _calls_batch_norm(type(module)) or (forward is not None and _trains(inspect.unwrap(forward))):
        return "its forward pass calls torch.nn.functional.batch_norm with running statistics; use a torch.nn.BatchNorm"
    return None


def learns_by_itself(module: nn.Module) -> bool:
    """Whether this is another kind of normalization with running statistics that training moves; not a frozen one."""
    if isinstance(module, _NormBase | torch.jit.ScriptModule | fx.GraphModule):
        return False
    if any(getattr(module, name, None) is None for name in ("running_mean", "running_var")):
        return False
    return any("training" in _named(function.__code__) for function in _reached(type(module)))


def _in_script(module: torch.jit.ScriptModule) -> str | None:
    """Named is the innermost scripted module, so that ``only`` may leave out as little as possible."""
    if any(_in_script(child) for child in module.children() if isinstance(child, torch.jit.ScriptModule)):
        return None
    graph = getattr(module, "inlined_graph", None)  # None where a scripted container has no forward pass
    if graph is None or not any(graph.findAllNodes(f"aten::{name}", True) for name in _OPERATORS):
        return None
    return "it was scripted or traced, and its graph cannot be changed; use the module that it was made from"


_OPERATORS = (
    "batch_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "_batch_norm_with_update",
    "_batch_norm_with_update_functional",
    "cudnn_batch_norm",
    "miopen_batch_norm",
)


def _in_graph(module: fx.GraphModule) -> str | None:
    for node in module.graph.nodes:
        name = getattr(node.target, "overloadpacket", node.target)
        if node.op == "call_function" and getattr(name, "__name__", "") in _OPERATORS:
            return f"its graph calls {name.__name__}; use the module that it was made from, or keep layers as leaves"
    return None


@cast(Callable[[Any], Any], cache)  # a class hashes, whatever the annotations of Module say
def _calls_batch_norm(kind: type[nn.Module]) -> bool:
    return any(_trains(function) for function in _reached(kind))


def _reached(kind: type[nn.Module]) -> Iterator[types.FunctionType]:
    """Its forward pass and the methods that this names, and so on."""
    names, seen = ["forward"], set()
    while names:
        name = names.pop()
        function = inspect.unwrap(inspect.getattr_static(kind, name, None))
        if name in seen or not isinstance(function, types.FunctionType) or function.__module__ in _OF_TORCH:
            continue
        seen.add(name)
        yield function
        names += _named(function.__code__)


def _named(code: types.CodeType) -> set[str]:
    within = (_named(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*within)


def _trains(function: Any) -> bool:
    """Whether the code of this calls ``batch_norm`` with running statistics, not always in evaluation mode."""
    code = getattr(function, "__code__", None)
    if code is None or "batch_norm" not in _named(code):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):  # no source: its names must do
        return True
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(_may_train(call) for call in calls if _name_of(call) in _OPERATORS)


def _name_of(call: ast.Call) -> str:
    return str(getattr(call.func, "attr", getattr(call.func, "id", "")))


def _may_train(call: ast.Call) -> bool:
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if None in named or any(isinstance(each, ast.Starred) for each in call.args):
        return True
    at = dict(enumerate(call.args))
    of_torch = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "torch"
    mean = at.get(3 if of_torch else 1, named.get("running_mean"))  # torch.batch_norm has weight and bias before it
    training = at.get(_TRAINING, named.get("training"))
    constant = [isinstance(each, ast.Constant) and not each.value for each in (mean, training)]
    return not any(constant) and training is not None
