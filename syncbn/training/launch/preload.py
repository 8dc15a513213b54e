"""What the server that ranks are forked from imports, so that they need not.

An import that fails is left to the rank, which says so; here it would end the server.
"""

from contextlib import suppress
from importlib import import_module

for name in (
    "syncbn.training.launch.rank",
    "wandb.sdk.launch",
):  # the second is what wandb imports when a run starts, slowly
    with suppress(Exception):
        import_module(name)
