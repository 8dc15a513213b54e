"""Imports without garbage collection."""

import gc
import importlib

import pytest

from syncbn.training.processes.quick_imports import no_garbage_collection

MADE: list[list[int]] = []


def _import_what_is_not_there() -> None:
    assert not gc.isenabled()
    MADE.extend([] for _ in range(1000))
    importlib.import_module("no.such.module")


def test_garbage_collection_is_off_within_and_skips_afterwards_what_was_made() -> None:
    gc.enable()
    before = gc.get_freeze_count()
    with pytest.raises(ModuleNotFoundError), no_garbage_collection():
        _import_what_is_not_there()
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(MADE)


def test_garbage_collection_that_was_off_stays_off() -> None:
    gc.disable()
    with no_garbage_collection():
        pass
    assert not gc.isenabled()
    gc.enable()
