"""Private attributes of other packages are reached in the ``*_internals.py`` modules and in c10d.py alone."""

from pathlib import Path

import pytest

from tests.support.private_names import private_names
from tests.training.support.train_command import REPO

FILES = sorted((REPO / "syncbn").rglob("*.py")) + sorted((REPO / "hydra_plugins").rglob("*.py")) + [REPO / "train.py"]


def is_internals(path: Path) -> bool:
    return path.name.endswith("_internals.py") or path.parts[-3:] == ("nn", "comm", "c10d.py")


def test_no_other_module_reaches_for_a_private_attribute() -> None:
    found = {str(path.relative_to(REPO)): private_names(path) for path in FILES if not is_internals(path)}
    assert len(found) > 150
    assert {path: names for path, names in found.items() if names} == {}


def test_each_of_these_modules_has_a_test_of_its_name() -> None:
    modules = [path for path in FILES if is_internals(path)]
    assert len(modules) == 9
    for path in modules:
        test = REPO / "tests" / path.relative_to(REPO / "syncbn").with_name(f"test_{path.name}")
        assert test.is_file(), test


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("trainer.fit_loop._results", {"_results"}),
        ("from torch.utils._pytree import tree_map", {"_pytree"}),
        ("from torch.nn.modules.conv import _ConvNd", {"_ConvNd"}),
        ("import torch._dynamo", {"_dynamo"}),
        ("getattr(strategy, '_layer_sync', None)", {"_layer_sync"}),
        ("setattr(axis, '_scale', 1)", {"_scale"}),
        ("SWEEPER = 'hydra._internal.Sweeper'", {"_internal"}),
        ("Popen._execute_child = _ours", {"_execute_child"}),
        ("self._own = cls._own2 = row._asdict()", set()),
        ("cfg._target_, x.__dict__, os._exit(1)", set()),
        ("name = 'model._target_'", set()),
    ],
)
def test_the_scan_finds_each_way_to_reach_one(tmp_path: Path, code: str, names: set[str]) -> None:
    path = tmp_path / "module.py"
    path.write_text(code, encoding="utf-8")
    assert private_names(path) == names
