"""Which private names of other packages a module's source uses."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PRIVATE = re.compile(r"_(?!_)\w*[^_\W]")  # not __dunder__, and not _target_ of a configuration
DOTTED = re.compile(r"[a-z]\w*(\.\w+)+")
ACCESSORS = ("getattr", "setattr", "hasattr", "delattr")
PUBLIC = ("_asdict", "_fields", "_replace", "_exit")  # documented: of named tuples, and os._exit


def private_names(path: Path) -> set[str]:
    """The private attributes and modules that the code of ``path`` reaches for, apart from those of ``self``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {name for node in ast.walk(tree) for name in _names(node) if name not in PUBLIC and name not in own}


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
        yield from _private(node.attr)
    if isinstance(node, ast.Import | ast.ImportFrom):
        for name in [each.name for each in node.names] + [getattr(node, "module", None) or ""]:
            yield from _private(name)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ACCESSORS:
        for argument in node.args[1:2]:
            if isinstance(argument, ast.Constant):
                yield from _private(argument.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value):
        yield from _private(node.value)


def _private(dotted: str) -> list[str]:
    return [name for name in dotted.split(".") if PRIVATE.fullmatch(name)]
