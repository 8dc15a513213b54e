"""What the fork server imports, so that ranks need not: the modules that an environment variable names.

A module that cannot be imported is skipped: the rank that needs it reports the error, which would end the server here.
"""

import os
from contextlib import suppress
from importlib import import_module

VARIABLE = "SYNCBN_SERVER_IMPORTS"  # names of modules, separated by commas

for name in filter(None, os.environ.get(VARIABLE, "").split(",")):
    with suppress(Exception):
        import_module(name)
