"""The program ``syncbn``, also ``python -m syncbn``: ``syncbn train`` is ``train.py``; the others are in ``cli.py``."""

import sys

from syncbn.training import import_paths, standard_streams
from syncbn.training.distributed import signals


def main() -> None:
    """The entry point."""
    trains = sys.argv[1:2] == ["train"]
    # Before all other imports, which take seconds. A rank that torchrun or srun started stops together with the others.
    (signals.begin if trains else signals.end_at_once)()
    standard_streams.outlive_reader()
    import_paths.begin()
    if trains:
        from syncbn import train

        del sys.argv[1]  # Hydra parses the rest; syncbn.training.program remembers how the program was called
        train.main()
    else:
        from syncbn import cli

        cli.main()


if __name__ == "__main__":
    main()
