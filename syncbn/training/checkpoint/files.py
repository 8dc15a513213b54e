"""Checkpoint files: which are sound, and the newest of a run that is."""

import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from syncbn.training.errors import AgreedError


def link(path: Path, name: str) -> None:
    """Makes ``name``, beside ``path``, the same file; a copy where the file system links no files."""
    draft = path.with_name(f".{name}.part")
    draft.unlink(missing_ok=True)
    try:
        os.link(path, draft)
    except OSError:
        _copy(path, draft)
    draft.replace(path.with_name(name))


def _copy(path: Path, draft: Path) -> None:
    try:
        draft.write_bytes(path.read_bytes())
    except OSError:  # no space left, say
        draft.unlink(missing_ok=True)
        raise


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file; None where it can be loaded and its contents are as written (CRC-32)."""
    if path.exists() and not path.is_file():  # the opening of a named pipe would wait for a writer
        return "it is no file"
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
        if broken is None:
            load(path)  # zipfile overlooks changes in headers that torch reads
    except Exception as error:  # zipfile raises a dozen classes, of zlib, of text and its own
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None if broken is None else f"{broken} is not what was written"


def points(directory: Path) -> list[Path]:
    """The resume points in ``directory``, oldest first: ``step-00000036.ckpt``. Other names are of other callbacks."""
    found = [path for path in directory.glob("step-*.ckpt") if re.fullmatch(r"step-[0-9]{8,}", path.stem)]
    return sorted(found, key=step_of)


def step_of(point: Path) -> int:
    """The training step after which a resume point was saved."""
    return int(point.stem.removeprefix("step-"))


def newest(directory: Path, report: Callable[[str], None]) -> Path | None:
    """The newest resume point in ``directory`` that is sound; others are reported and passed over.

    Args:
        directory: of ``step-*.ckpt``, and of ``last.ckpt`` for where none of these is sound.
        report: takes a line about each file that is damaged.
    """
    for path in [*reversed(points(directory)), *(p for p in (directory / "last.ckpt",) if p.exists())]:
        wrong = damage(path)
        if wrong is None:
            return path
        report(f"{path.name} is damaged ({wrong}): it is passed over for the one before")
    return None


def load(path: Path) -> Any:
    """What a file of ``torch.save`` holds, if that is plain data; tensors are mapped from the file where they can be.

    torch 2.13 opens a file to be mapped by its name in UTF-8, and a name may be in another encoding.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def load_weights(module: Any, path: str) -> None:
    """Loads the weights of a checkpoint into a LightningModule, and nothing else of it.

    Raises:
        RuntimeError: it is of another network, as torch says.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    module.on_load_checkpoint(checkpoint)  # as Lightning does: a module may keep more in it, or rename
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)


def other_optimizer(states: Sequence[dict[str, Any]], optimizers: Sequence[Optimizer]) -> str | None:
    """Why the optimizers cannot go on with what a checkpoint holds of its own; None where they can.

    torch refuses another number of parameters by itself. It takes the state of another class without a word, and then
    fails in the first step or computes something else. Each class has its own options, by whose names it is known
    here; a version of torch that adds one, or leaves one out, makes no other class.
    """
    if len(states) != len(optimizers):
        return f"it has {len(states)} of them, and this training {len(optimizers)}"
    for state, optimizer in zip(states, optimizers, strict=True):
        name, sizes = type(optimizer).__name__, [len(group["params"]) for group in optimizer.param_groups]
        groups = state.get("param_groups") or []
        if [len(group["params"]) for group in groups] != sizes:
            return f"its groups have {', '.join(str(len(g['params'])) for g in groups)} parameters, and here {sizes}"
        own = {"params", "initial_lr", "param_names", *optimizer.defaults}
        theirs = {key for group in groups for key in group}
        if theirs - own and set(optimizer.defaults) - theirs:
            return f"its options are {', '.join(sorted(theirs - {'params', 'initial_lr'}))}, not those of {name}"
    return None


@contextmanager
def named(path: str | None) -> Iterator[None]:
    """Within this context, that a checkpoint is of another model or optimizer is told in a line.

    Raises:
        AgreedError: it does not fit, as every rank finds.
    """
    try:
        yield
    except OtherOptimizerError as error:
        raise AgreedError(
            f"ckpt_path={path}: it is of a training with another optimizer ({error}); use that one, or begin "
            "another run with its weights (run.id=NAME ckpt_restore=weights)"
        ) from error
    except RuntimeError as error:
        kind, *problems = str(error).splitlines() or [""]
        if path is None or "Error(s) in loading state_dict" not in kind:
            raise
        what = " ".join(problems[0].split())[:300] if problems else kind
        raise AgreedError(
            f"ckpt_path={path}: it is not of this model ({what}); use the model and norm that it was trained with"
        ) from error


class OtherOptimizerError(Exception):
    """A checkpoint holds the state of another optimizer; the message says how that is seen."""
