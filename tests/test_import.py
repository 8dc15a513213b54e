"""Floors: an import goes down or stays, and the ground floor costs what torch costs."""

import importlib
import subprocess
import sys
from functools import cache

import pytest

import syncbn
import syncbn.nn
from syncbn.training.launch import preload
from syncbn.training.processes import server_imports
from tests.training.support.settled_config import settled

HEAVY = ("lightning", "hydra", "omegaconf", "wandb", "torchmetrics", "sklearn", "rich", "pandas")


@cache
def modules_after(statement: str) -> frozenset[str]:
    code = f"{statement}\nimport sys; print(*sys.modules)"
    return frozenset(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
        ).stdout.split()
    )


def test_import_syncbn_imports_torch_and_nothing_heavy() -> None:
    assert not modules_after("import syncbn") & set(HEAVY)
    assert len(modules_after("import syncbn") - modules_after("import torch")) < 30


@pytest.mark.parametrize("heavy", ["lightning", "wandb", "torchmetrics", "sklearn"])
def test_a_mistyped_setting_does_not_wait_for_lightning(heavy: str) -> None:
    assert heavy not in modules_after("from syncbn.training import main")


def test_the_launcher_starts_ranks_without_lightning() -> None:
    """They import it in the fork server, while the launcher would take seconds for it."""
    assert not modules_after("import syncbn.training.launch.job") & {"lightning", "torchmetrics", "matplotlib", "wandb"}


@pytest.mark.parametrize(
    "name",
    [
        *("training.corruptions.corrupt", "training.precise_statistics", "precise_statistics", "training.main"),
        *(
            f"training.data.{name}"
            for name in ("Digits", "ExactSampler", "SampleError", "exact_loader", "train_loader")
        ),
    ],
)
def test_public_names_stay(name: str) -> None:
    module, _, attribute = f"syncbn.{name}".rpartition(".")
    assert callable(getattr(importlib.import_module(module), attribute))


@pytest.mark.parametrize("module", ["syncbn", "syncbn.training", "syncbn.training.data"])
def test_each_public_name_is_there(module: str) -> None:
    package = importlib.import_module(module)
    for name in package.__all__:
        getattr(package, name)


def test_syncbn_has_the_names_of_the_layer_that_type_checkers_see() -> None:
    assert sorted(syncbn.__all__) == sorted([*syncbn.nn.__all__, "load"])


def test_ranks_are_forked_from_a_server_that_has_imported_what_they_need() -> None:
    names = ",".join(preload.modules(settled().cfg))
    environment = f"import os; os.environ[{server_imports.VARIABLE!r}] = {names!r}"
    imported = modules_after(f"{environment}; import {server_imports.__name__}")
    assert imported >= {"lightning", "wandb", "syncbn.training.launch.rank", "sklearn.datasets"}
    assert "sklearn" not in "".join(preload.modules(settled("data=imagenet", "data.root=x").cfg))


def test_garbage_collection_in_ranks_skips_what_the_server_has_imported() -> None:
    """A full collection in a rank would traverse and copy the memory of all imported modules."""
    environment = f"import os; os.environ[{server_imports.VARIABLE!r}] = 'json'"
    check = "import gc; assert gc.isenabled() and gc.get_freeze_count() > 1000"
    assert "json" in modules_after(f"{environment}; import {server_imports.__name__}; {check}")
