"""The names of a ``_target_``'s arguments, read from its source file, since the import of Lightning takes seconds."""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from syncbn import training
from syncbn.training import import_paths

TRAINER = "lightning.pytorch.Trainer"
HARMLESS = {"_defaults_from_env_vars", "final", "override"}  # decorators that do not change the arguments
MAKERS = ("__init__", "__new__")  # the methods that take a class's arguments
DEEPEST = 12  # imports and bases on the way to a signature
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def arguments(target: str) -> frozenset[str] | None:
    """The names of the arguments of a class or function.

    Nothing is imported and no code runs, so this also takes classes whose import is slow or has side effects.

    Args:
        target: a dotted path, as in ``_target_``.

    Returns:
        The names; None if it takes any (``**kwargs``), or if its source does not show which ones.
    """
    parts = target.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        if _file(module) is not None:
            return _of(module, parts[-1], 0) if end == len(parts) - 1 else None
    return None


def exists(module: str) -> bool:
    """Whether a top-level module can be found, without importing it."""
    try:
        return (find_spec(module) or import_paths.find(module)) is not None
    except (ImportError, ValueError):  # a module that is imported and has no specification
        return True


def _of(module: str, name: str, depth: int) -> frozenset[str] | None:
    found = _definition(module, name, depth)
    if found is None:
        return None
    where, node = found
    return _of_class(where, node, depth) if isinstance(node, ast.ClassDef) else _of_function(node)


def _of_function(node: ast.FunctionDef | ast.AsyncFunctionDef, skipped: int = 0) -> frozenset[str] | None:
    if node.args.kwarg is not None or not _is_plain(node):
        return None
    return _names(node.args, skipped)


def _of_class(module: str, node: ast.ClassDef, depth: int) -> frozenset[str] | None:
    """The arguments of the class's ``__init__`` or ``__new__``, or of the first base that has one."""
    if not _is_plain(node) or any(each.arg != "metaclass" or _last(each.value) != "ABCMeta" for each in node.keywords):
        return None
    if _is_assigned(module, node) or _is_wrapped(module, node, depth):
        return None
    for name in MAKERS:
        own = [each for each in ast.walk(node) if isinstance(each, Definition) and each.name == name]
        if own:
            first = own[0]
            if len(own) > 1 or first not in node.body or isinstance(first, ast.ClassDef):
                return None
            receiver = _receiver(first)
            if not receiver:
                return _of_function(first, skipped=1)
            above = (
                _of_bases(module, node, depth) if receiver == "super().__init__" else _of(module, receiver, depth + 1)
            )
            return None if above is None or not _is_plain(first) else _names(first.args, 1) | above
    return _of_bases(module, node, depth)


@cache
def _is_assigned(module: str, node: ast.ClassDef) -> bool:
    """Whether ``__init__`` is assigned in the class, or elsewhere in its module: ``Net.__init__ = wrapped``."""
    tree = _tree(module)
    for each in ast.walk(node):
        if isinstance(each, ast.Name) and each.id in MAKERS and isinstance(each.ctx, ast.Store):
            return True
    for each in ast.walk(tree) if tree else ():
        own = [f"{node.name}.{maker}" for maker in MAKERS]
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) and _dotted(each) in own:
            return True
        if (
            isinstance(each, ast.Call)
            and each.args
            and _last(each.func) == "setattr"
            and _last(each.args[0]) == node.name
        ):
            return True
    return False


def _is_wrapped(module: str, node: ast.ClassDef, depth: int) -> bool:
    """Whether a base may replace ``__init__``: in ``__init_subclass__``, or by a metaclass."""
    for base in node.bases:
        place = _place(module, base)
        found = None if place is None or depth > DEEPEST else _definition(*place, depth + 1)
        where, above = found if found is not None else ("", None)
        if not isinstance(above, ast.ClassDef):
            continue
        if any(isinstance(each, Definition) and each.name == "__init_subclass__" for each in above.body):
            return True
        if any(each.arg == "metaclass" and _last(each.value) != "ABCMeta" for each in above.keywords):
            return True
        if _is_wrapped(where, above, depth + 1):
            return True
    return False


def _place(module: str, base: ast.expr) -> tuple[str, str] | None:
    """The module and the name of a base class."""
    head, _, rest = _dotted(base).partition(".")
    if not rest:
        return (module, head) if head else None
    package = _imported_module(module, head)
    full = f"{package}.{rest}"
    return None if package is None else (full.rpartition(".")[0], full.rpartition(".")[2])


def _receiver(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The function that takes a method's ``**more``, if that is all that the method does with it; "" otherwise."""
    more = node.args.kwarg.arg if node.args.kwarg else None
    uses = [each for each in ast.walk(node) if isinstance(each, ast.Name) and each.id == more]
    for call in (each for each in ast.walk(node) if isinstance(each, ast.Call)):
        if len(uses) == 1 and any(each.arg is None and each.value is uses[0] for each in call.keywords):
            return _dotted(call.func)
    return ""


def _names(arguments: ast.arguments, skipped: int) -> frozenset[str]:
    return frozenset(each.arg for each in [*arguments.args[skipped:], *arguments.kwonlyargs])


def _of_bases(module: str, node: ast.ClassDef, depth: int) -> frozenset[str] | None:
    bases = [each for each in node.bases if _last(each) not in ("object", "ABC", "Generic", "Protocol")]
    if len(bases) != 1 or depth > DEEPEST:  # the order of several bases is not computed here
        return None if bases else frozenset()
    place = _place(module, bases[0])
    return None if place is None else _of(*place, depth + 1)


def _is_plain(node: Definition) -> bool:
    """Whether no decorator can change the arguments."""
    return all(_last(each) in HARMLESS for each in node.decorator_list)


def _definition(module: str, name: str, depth: int) -> tuple[str, Definition] | None:
    """Where a name of a module is defined; imports are followed. None if it is bound twice, or not by a definition."""
    tree = _tree(module)
    if tree is None or depth > DEEPEST:
        return None
    if module == training.__name__ and name in training.HOME:  # imported on first use
        return _definition(f"{module}.{training.HOME[name]}", name, depth + 1)
    bound = [found for node in _statements(tree.body) if (found := _bound(node, name)) is not None]
    if not bound:
        stars = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
        sources = (_definition(_source(module, node), name, depth + 1) for node in stars)
        return next((each for each in sources if each is not None), None)
    if len(bound) != 1:
        return None
    if isinstance(bound[0], Definition):
        return module, bound[0]
    if isinstance(bound[0], ast.ImportFrom):
        original = next(each.name for each in bound[0].names if (each.asname or each.name) == name)
        source = _source(module, bound[0])
        return _definition(source, original, depth + 1)
    return None


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements of a module, with those within ``if``, ``try`` and ``with``."""
    found = []
    for node in body:
        found.append(node)
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                found += _statements(getattr(node, part, []))
        for handler in node.handlers if isinstance(node, ast.Try) else ():
            found += _statements(handler.body)
    return found


def _bound(node: ast.stmt, name: str) -> ast.AST | None:
    """The statement if it binds the name."""
    if isinstance(node, Definition):
        return node if node.name == name else None
    if isinstance(node, ast.ImportFrom | ast.Import):
        return node if any((each.asname or each.name.partition(".")[0]) == name for each in node.names) else None
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    # Not SGD.__doc__ = ...: there the name is only read.
    stored = [each for target in targets if target for each in ast.walk(target) if isinstance(each, ast.Name)]
    return node if any(each.id == name and isinstance(each.ctx, ast.Store) for each in stored) else None


def _imported_module(module: str, name: str) -> str | None:
    """The module that ``name`` stands for in another one: ``nn`` for ``from torch import nn``."""
    tree = _tree(module)
    for node in _statements(tree.body) if tree else []:
        if isinstance(node, ast.Import):
            for each in node.names:
                if (each.asname or each.name) == name:
                    return each.name
        if isinstance(node, ast.ImportFrom):
            for each in node.names:
                if (each.asname or each.name) == name:
                    return f"{_source(module, node)}.{each.name}"
    return name if _file(name) is not None and name != module else None


def _source(module: str, node: ast.ImportFrom) -> str:
    """The absolute name of the module that an import takes names from."""
    if not node.level:
        return str(node.module)
    file = _file(module)
    inside = module.split(".") if file and file.name == "__init__.py" else module.split(".")[:-1]
    base = inside[: len(inside) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    if isinstance(node, ast.Call):
        return f"{_dotted(node.func)}()"
    return node.id if isinstance(node, ast.Name) else ""


def _last(node: ast.expr) -> str:
    if isinstance(node, ast.Call | ast.Subscript):
        return _last(node.func if isinstance(node, ast.Call) else node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _tree(module: str) -> ast.Module | None:
    file = _file(module)
    return None if file is None else _parsed(file)


@cache
def _parsed(file: Path) -> ast.Module | None:
    try:
        return ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _file(module: str) -> Path | None:
    """The source file of a module. ``find_spec`` would import the packages above it."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top) or import_paths.find(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    file = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    places = [Path(each) for each in spec.submodule_search_locations or ()]
    for part in rest:
        package = next((each / part for each in places if (each / part).is_dir()), None)
        single = next((each / f"{part}.py" for each in places if (each / f"{part}.py").is_file()), None)
        if package is not None and ((package / "__init__.py").is_file() or single is None):
            places, file = [package], package / "__init__.py" if (package / "__init__.py").is_file() else None
        elif single is not None:
            places, file = [], single
        else:
            return None
    return file
