"""Imports, in the fork server, the modules that an environment variable names, so that ranks need not import them.

A module that cannot be imported is skipped. An exception would end the server here, and the rank that needs the module
reports it.
"""

import os
from contextlib import suppress
from importlib import import_module

VARIABLE = "SYNCBN_SERVER_IMPORTS"  # names of modules, separated by commas

for name in filter(None, os.environ.get(VARIABLE, "").split(",")):
    with suppress(Exception):
        import_module(name)
