"""Arguments that are read from source files are those of the objects."""

import inspect
import sys
from pathlib import Path

import pytest
from hydra.utils import get_object

from syncbn.training import HOME
from syncbn.training.composition.signatures import TRAINER, arguments

TARGETS = [
    TRAINER,
    *("lightning.pytorch.callbacks.ModelCheckpoint", "lightning.pytorch.callbacks.LearningRateMonitor"),
    *("lightning.pytorch.callbacks.EarlyStopping", "lightning.pytorch.profilers.SimpleProfiler"),
    *("torch.optim.SGD", "torch.optim.AdamW", "torch.optim.lr_scheduler.ConstantLR"),
    *("torch.optim.lr_scheduler.MultiStepLR", "torch.optim.lr_scheduler.OneCycleLR", "torch.nn.Linear"),
    *("torch.nn.functional.relu", "tests.training.support.user_project.mine.Lit"),
    *(f"syncbn.training.{name}" for name in HOME if name not in ("main", "NonFiniteError", "SettingError")),
]


@pytest.mark.parametrize("target", TARGETS)
def test_they_are_those_of_the_object(target: str) -> None:
    found = arguments(target)
    parameters = inspect.signature(get_object(target)).parameters.values()
    anything = any(each.kind == each.VAR_KEYWORD for each in parameters)
    names = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    if anything:  # **more goes to a function whose arguments are known, or it is not known where
        assert found is None or found > names
    else:
        assert found == names or (found is None and target in UNKNOWN)


UNKNOWN = {"torch.nn.functional.relu", "syncbn.training.precise_statistics"}  # decorated, or bound twice


SOURCE = """
import dataclasses, functools
import helper as other
from helper import Base, function as renamed
from . import nothing
class Plain:
    def __init__(self, a, *, b=1): pass
class Child(Plain): pass
class Imported(Base): pass
class Dotted(other.Base): pass
class Any_(Base):
    def __init__(self, **more): pass
class Two(Base, Plain): pass
class More(Base):
    def __init__(self, g, **more): super().__init__(**more)
class Through(Base):
    def __init__(self, g, **more): self.options = renamed(g, **more)
class Used(Base):
    def __init__(self, g, **more): super().__init__(more.pop("h"), **more)
class Made:
    def __new__(cls, a, b): pass
class Empty: pass
@dataclasses.dataclass
class Data:
    a: int
@functools.cache
def cached(a): pass
if dataclasses:
    def twice(a): pass
else:
    def twice(b): pass
Plain.__doc__ = "text"
alias = Plain
class Assigned:
    __init__ = renamed
class Replaced:
    def __init__(self, a): pass
Replaced.__init__ = renamed
class Set(Plain):
    def __init__(self, a): pass
setattr(Set, "__init__", renamed)
class Wraps:
    def __init_subclass__(cls): pass
class Wrapped(Wraps):
    def __init__(self, a): pass
class Further(Wrapped):
    def __init__(self, a): pass
class Inner:
    if dataclasses:
        def __init__(self, a): pass
"""
EXPECTED = {
    "Plain": {"a", "b"},
    "Child": {"a", "b"},
    "Imported": {"c"},
    "Dotted": {"c"},
    "More": {"g", "c"},
    "Through": {"g", "d", "e"},
    "Used": None,
    "renamed": {"d", "e"},
    "Made": {"a", "b"},
    "Empty": set(),
    "Wraps": set(),
    **dict.fromkeys(("Assigned", "Replaced", "Set", "Wrapped", "Further")),
    **dict.fromkeys(("Any_", "Two", "Data", "cached", "twice", "alias", "Inner", "missing", "nothing", "Plain.a")),
}


def test_what_is_not_certain_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "a_users_package"
    package.mkdir()
    (package / "module.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "helper.py").write_text(
        "class Base:\n    def __init__(self, c): pass\ndef function(d, *more, e=1): pass\n", encoding="utf-8"
    )
    (tmp_path / "broken.py").write_text("def a(:\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, names in EXPECTED.items():
        found = arguments(f"a_users_package.module.{name}")
        assert found == (None if names is None else frozenset(names)), name
    assert arguments("broken.a") is None
    assert arguments("no_such_package.a") is None
    assert arguments("math.sqrt") is None
    assert arguments("a") is None
    assert "a_users_package" not in sys.modules  # nothing was imported
    assert "helper" not in sys.modules
