"""What a notebook sets for itself, and a program that it starts must not use."""

import os


def leave_backend() -> None:
    """Removes ``MPLBACKEND`` if it names a module, as IPython's kernel sets it.

    The program shows no windows, and its environment may lack the module. matplotlib would refuse to be imported then,
    and torchmetrics imports it.
    """
    if os.environ.get("MPLBACKEND", "").startswith("module://"):
        del os.environ["MPLBACKEND"]
