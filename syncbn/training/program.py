"""How this program was called, for the commands and hints that it prints: ``python train.py`` or ``syncbn train``."""

import sys
from pathlib import Path


def name() -> str:
    """The program as a sentence names it."""
    return "syncbn train" if _is_command() else "python train.py"


def words() -> list[str]:
    """The words that start the program, as they were typed."""
    if not _is_command():
        return ["python", sys.argv[0]]
    return ["python", "-m", "syncbn", "train"] if is_module() else ["syncbn", "train"]


def for_torchrun() -> list[str]:
    """The words that follow torchrun's options."""
    return ["-m", "syncbn", "train"] if _is_command() else [sys.argv[0]]


def for_slurm() -> list[str]:
    """The words that submit a job; a checkout has a script for it."""
    return ["srun", *words()] if _is_command() else ["sbatch", "slurm/train.sbatch"]


def command_line() -> list[str]:
    """The command that started this process, with the interpreter."""
    if not _is_command():
        return [sys.executable, *sys.argv]
    return [sys.executable, "-m", "syncbn", "train", *sys.argv[1:]]


def is_module() -> bool:
    """Whether the program is ``python -m syncbn``."""
    return Path(sys.argv[0]).parts[-2:] == ("syncbn", "__main__.py")


def _is_command() -> bool:
    """Whether the program is ``syncbn``, however it was started. ``sys.argv`` of a rank is that of its launcher."""
    return is_module() or Path(sys.argv[0]).name == "syncbn"
