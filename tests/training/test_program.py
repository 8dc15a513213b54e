"""Commands that are printed are those that were typed."""

import sys

import pytest

from syncbn.training import program


@pytest.mark.parametrize(
    ("argv0", "name", "words", "torchrun", "slurm"),
    [
        ("../train.py", "python train.py", "python ../train.py", "../train.py", "sbatch slurm/train.sbatch"),
        ("/venv/bin/syncbn", "syncbn train", "syncbn train", "-m syncbn train", "srun syncbn train"),
        (
            *("/lib/syncbn/__main__.py", "syncbn train", "python -m syncbn train"),
            *("-m syncbn train", "srun python -m syncbn train"),
        ),
    ],
)
def test_the_program_is_named_as_it_was_called(
    monkeypatch: pytest.MonkeyPatch, argv0: str, name: str, words: str, torchrun: str, slurm: str
) -> None:
    monkeypatch.setattr(sys, "argv", [argv0, "seed=1"])
    assert program.name() == name
    assert " ".join(program.words()) == words
    assert " ".join(program.for_torchrun()) == torchrun
    assert " ".join(program.for_slurm()) == slurm
    assert program.command_line()[-1] == "seed=1"
    assert ("train" in program.command_line()) == (name == "syncbn train")
