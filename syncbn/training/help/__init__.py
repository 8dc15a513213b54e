"""``--help``: explains every setting by the comment beside it in ``conf/``. Imports neither Hydra nor torch."""

from collections.abc import Sequence

OPTIONS = ("--help", "-h")


def is_asked(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for help. ``--hydra-help`` is Hydra's own."""
    return any(each in OPTIONS for each in arguments)


def show(arguments: Sequence[str]) -> int:
    """Prints the help that the command line asks for.

    Returns:
        The exit code: 1 if no setting has the name that was asked for.
    """
    from syncbn.training.help import pages

    return pages.show([each for each in arguments if each not in OPTIONS])
