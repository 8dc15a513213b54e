"""Finds batch norm that is not in a layer of torch's, which ``convert`` cannot synchronize and refuses by name.

It is in the graph of a module that was scripted, traced, exported or made by ``torch.fx``; or in the forward pass of
another class, which calls ``torch.nn.functional.batch_norm`` with its own running statistics or those of a layer in it.
"""

import ast
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from syncbn.nn.torch_internals import BatchNormBase, NormBase

_OF_TORCH = ("torch.nn.modules.module", "torch.nn.modules.container")
_STATISTICS = ("running_mean", "running_var", "moving_mean", "moving_var", "moving_variance")
_TRAINING = 5  # position of ``training`` in the call of torch.nn.functional.batch_norm


def reason(module: nn.Module) -> str | None:
    """Why this module, without its children, contains batch norm outside torch's layers; None if it contains none."""
    if isinstance(module, BatchNormBase):
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return _in_script(module)
    graph = module.graph if isinstance(module, fx.GraphModule) else vars(module).get("graph")
    if isinstance(graph, fx.Graph):  # the second is that of torch.export.unflatten
        return _in_graph(graph)
    if _calls_batch_norm(type(module)) or any(map(_is_batch_norm, vars(module).values())):
        return "its forward pass calls torch.nn.functional.batch_norm with running statistics; use a torch.nn.BatchNorm"
    return None


def learns_by_itself(module: nn.Module) -> bool:
    """Whether this is another kind of normalization with running statistics that training moves; not a frozen one."""
    if isinstance(module, NormBase | torch.jit.ScriptModule | fx.GraphModule):
        return False
    if all(getattr(module, name, None) is None for name in _STATISTICS):
        return False
    return any("training" in _named(function.__code__) for function in _methods(type(module)))


def _in_script(module: torch.jit.ScriptModule) -> str | None:
    """Returns the innermost scripted module, so that ``only`` excludes as little as possible."""
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


def _in_graph(graph: fx.Graph) -> str | None:
    for node in graph.nodes:
        name = getattr(node.target, "overloadpacket", node.target)
        if node.op == "call_function" and getattr(name, "__name__", "") in _OPERATORS:
            return f"its graph calls {name.__name__}; use the module that it was made from, or keep layers as leaves"
    return None


@cast(Callable[[Any], Any], cache)  # classes are hashable, but Module's annotations hide it from mypy
def _calls_batch_norm(kind: type[nn.Module]) -> bool:
    named = set[str]()
    for function in _methods(kind):
        if _trains_from(function):
            return True
        named |= _named(function.__code__)
    return any(_is_batch_norm(vars(base)[name]) for base in kind.__mro__ for name in named & vars(base).keys())


def _methods(kind: type[nn.Module]) -> Iterator[types.FunctionType]:
    """Its forward pass and all methods that this names, directly or not; of its bases those called through super()."""
    names, seen = ["forward"], set()
    while names:
        if (name := names.pop()) in seen:
            continue
        seen.add(name)
        for base in kind.__mro__:
            function = _function(vars(base).get(name))
            if function is None:
                continue
            if function.__module__ in _OF_TORCH:
                break
            yield function
            named = _named(function.__code__)
            names += named
            if "super" not in named and not named & {each.__name__ for each in kind.__mro__}:
                break


def _function(found: Any) -> types.FunctionType | None:
    """The function in a method of any kind, a partial, or a function of autograd's; None where there is none."""
    if isinstance(found, type) and issubclass(found, torch.autograd.Function):
        found = found.forward
    if isinstance(found, property):
        found = found.fget
    while (inner := getattr(found, "__func__", None) or getattr(found, "func", None)) is not None:
        found = inner  # a method, static or class method; a partial, partial method or cached property
    found = inspect.unwrap(found) if callable(found) else None
    return found if isinstance(found, types.FunctionType) else None


def _is_batch_norm(found: Any, seen: frozenset[Any] = frozenset()) -> bool:
    """Whether calling this object may train a batch norm: an operator of torch's, or a function that calls one."""
    if isinstance(found, torch.jit.ScriptFunction):
        graph: Any = found.inlined_graph  # a property, against torch's annotation
        return any(graph.findAllNodes(f"aten::{name}", True) for name in _OPERATORS)
    if isinstance(found, dict):
        return any(_is_batch_norm(each, seen) for each in found.values() if callable(each))
    if isinstance(found, nn.Module) or not callable(found):
        return False
    if _is_operator(found):
        return True
    function = _function(found)
    return function is not None and (_is_operator(function) or _trains_from(function, seen))


def _is_operator(found: Any) -> bool:
    of_torch = str(getattr(found, "__module__", None) or "torch").partition(".")[0] == "torch"
    return of_torch and callable(found) and getattr(found, "__name__", "") in _OPERATORS


def _trains_from(function: types.FunctionType, seen: frozenset[Any] = frozenset()) -> bool:
    """Whether this calls ``batch_norm``, directly or through a function of its module or closure."""
    if function.__code__ in seen or str(function.__module__).partition(".")[0] in ("torch", "syncbn"):
        return False
    return _trains(function) or any(
        _is_batch_norm(each, seen | {function.__code__})
        for name, each in _around(function).items()
        if name not in _OPERATORS  # its calls have been read
    )


def _around(function: types.FunctionType) -> dict[str, Any]:
    """The objects that the code names: of its module, of other modules that it names, and of its closure."""
    named, found = _named(function.__code__), dict[str, Any]()
    for name in named & function.__globals__.keys():
        each = function.__globals__[name]
        if not isinstance(each, types.ModuleType):
            found[name] = each
        elif each.__name__.partition(".")[0] != "torch":
            found |= {inner: vars(each)[inner] for inner in named & vars(each).keys()}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # nothing is in it yet
            found[name] = cell.cell_contents
    return found


def _named(code: types.CodeType) -> set[str]:
    within = (_named(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*within)


def _trains(function: types.FunctionType) -> bool:
    """Whether the code of this calls ``batch_norm`` with running statistics, not always in evaluation mode."""
    if not _named(function.__code__) & {*_OPERATORS, "forward"}:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):  # no source: its names must do
        return bool(_named(function.__code__) & set(_OPERATORS))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name_of(node.func) in _OPERATORS]
    if any(_may_train(call, function) for call in calls):
        return True
    called = {id(call.func) for call in calls}
    others = (node for node in ast.walk(tree) if _name_of(node) in _OPERATORS and id(node) not in called)
    # Passed as an argument, or called by another name.
    if any(_is_operator(_resolved(node, function)) for node in others):
        return True
    every = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    owners = [
        _resolved(each.value, function) for each in every if isinstance(each, ast.Attribute) and each.attr == "forward"
    ]
    return any(isinstance(each, type) and issubclass(each, BatchNormBase) for each in owners)  # of a layer, not called


def _name_of(node: ast.AST) -> str:
    return str(getattr(node, "attr", getattr(node, "id", "")))


def _resolved(node: ast.AST, function: types.FunctionType) -> Any:
    """What a name or an attribute of a module is, seen from this function; None for anything else."""
    if isinstance(node, ast.Attribute):
        owner = _resolved(node.value, function)
        return getattr(owner, node.attr, None) if isinstance(owner, types.ModuleType) else None
    return function.__globals__.get(node.id) if isinstance(node, ast.Name) else None


def _may_train(call: ast.Call, function: types.FunctionType) -> bool:
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if None in named or any(isinstance(each, ast.Starred) for each in call.args):
        return True
    called, at = _resolved(call.func, function), dict(enumerate(call.args))
    if "with_update" in _name_of(call.func):  # such operators are for training only
        return True
    means = [named.get("running_mean"), at.get(1), at.get(3)]  # torch.batch_norm has weight and bias before it
    if called is not None or "running_mean" in named:
        means = [named.get("running_mean") or at.get(1 if called is F.batch_norm else 3)]
    training = at.get(_TRAINING, named.get("training"))
    without = all(each is None or _is_false(each) for each in means) and any(each is not None for each in means)
    return not without and training is not None and not _is_false(training)


def _is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and not node.value
