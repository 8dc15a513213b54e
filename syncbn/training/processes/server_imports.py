"""Imports, in the fork server, the modules that an environment variable names, so that ranks need not import them.

A module that cannot be imported is skipped. An exception would end the server here, and the rank that needs the module
reports it. ``launch.preload`` chooses the modules.
"""

import os
from contextlib import suppress
from importlib import import_module

from syncbn.training import import_paths
from syncbn.training.processes.quick_imports import no_garbage_collection
from syncbn.training.torchvision_internals import allow_missing_operators

VARIABLE = "SYNCBN_SERVER_IMPORTS"  # names of modules, separated by commas


def import_modules(names: list[str]) -> None:
    """Imports the modules; garbage collection in the ranks, which are forked from this process, skips them."""
    import_paths.receive()
    allow_missing_operators()  # ranks are forked from this process
    with no_garbage_collection():
        for name in names:
            with suppress(Exception):
                import_module(name)


if modules := list(filter(None, os.environ.get(VARIABLE, "").split(","))):
    import_modules(modules)
