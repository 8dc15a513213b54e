"""The program ``syncbn``, also ``python -m syncbn``: ``syncbn train`` is ``train.py``; the others are in ``cli.py``."""

import os
import sys

# Before all other imports: python -m puts the current directory first, where a string.py would hide Python's. Only a
# checkout that is not installed is found there.
if __name__ == "__main__" and not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):  # noqa: PTH120
    del sys.path[0]

from syncbn.training import notebook, standard_streams
from syncbn.training.distributed import signals


def main() -> None:
    """The entry point."""
    trains = sys.argv[1:2] == ["train"]
    # Before all other imports, which take seconds. A rank that torchrun or srun started stops together with the others.
    (signals.begin if trains else signals.end_at_once)()
    standard_streams.outlive_reader()
    if trains:
        from syncbn import train

        del sys.argv[1]  # Hydra parses the rest; syncbn.training.program remembers how the program was called
        train.main()
    else:
        from syncbn import cli

        notebook.leave_backend()
        cli.main()


if __name__ == "__main__":
    main()
