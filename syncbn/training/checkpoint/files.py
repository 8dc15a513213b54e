"""Reads checkpoint files: checks their integrity, finds the newest intact one of a run, and loads them."""

import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from syncbn.training.errors import AgreedError
from syncbn.training.read_file import DamagedError, read_json


def link(path: Path, name: str) -> None:
    """Makes ``name`` a hard link to ``path`` in the same directory; a copy where the file system has no hard links."""
    draft = path.with_name(f".{name}.part")
    draft.unlink(missing_ok=True)
    try:
        os.link(path, draft)
    except OSError:
        try:
            draft.write_bytes(path.read_bytes())
        except OSError:  # no space left, for example
            draft.unlink(missing_ok=True)
            raise
    draft.replace(path.with_name(name))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file; None if its checksums (CRC-32) match and it can be loaded."""
    if path.exists() and not path.is_file():  # opening a named pipe would block until there is a writer
        return "it is not a regular file"
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
        if broken is None:
            load(path)  # zipfile does not check all headers that torch reads
    except Exception as error:  # zipfile raises a dozen classes: of zlib, of text decoding and its own
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None if broken is None else f"the checksum of {broken} does not match"


def points(directory: Path) -> list[Path]:
    """The resume points in ``directory``, oldest first, such as ``step-00000036.ckpt``.

    Checkpoints with other names belong to other callbacks.
    """
    found = [path for path in directory.glob("step-*.ckpt") if re.fullmatch(r"step-[0-9]{8,}", path.stem)]
    return sorted(found, key=step_of)


def step_of(point: Path) -> int:
    """The training step after which a resume point was saved."""
    return int(point.stem.removeprefix("step-"))


def newest(directory: Path, report: Callable[[str], None]) -> Path | None:
    """The newest intact resume point in ``directory``, or None; damaged ones are reported and skipped.

    ``last.ckpt`` is tried if no ``step-*.ckpt`` is intact.
    """
    for path in [*reversed(points(directory)), *(p for p in (directory / "last.ckpt",) if p.exists())]:
        wrong = damage(path)
        if wrong is None:
            return path
        report(f"{path.name} is damaged ({wrong}): it is skipped, and the previous checkpoint is tried")
    return None


def best(run_dir: Path) -> Path | None:
    """The best checkpoint of a run, by its name in ``result.json``; without one the newest. None if there is none."""
    directory = run_dir / "checkpoints"
    named = [directory / "best.ckpt", directory / "last.ckpt"]
    with suppress(OSError, DamagedError):
        # Only the name: the directory may have been moved, and a file elsewhere is not read.
        named.insert(0, directory / Path(str(read_json(run_dir / "result.json").get("checkpoint"))).name)
    return next((path for path in named if path.suffix == ".ckpt" and os.path.isfile(path)), None)  # noqa: PTH113


def load(path: Path) -> Any:
    """Loads a file of ``torch.save`` that holds plain data only, on the CPU.

    Tensors are memory-mapped from the file. torch 2.13 opens a file to be mapped by its name in UTF-8, so a file whose
    name is in another encoding is read without mapping.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return load_unmapped(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def load_unmapped(path: Path) -> Any:
    """Loads a file like :func:`load`, without mapping it."""
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def load_weights(module: Any, path: str) -> None:
    """Loads the weights of a checkpoint into a LightningModule, without optimizer, scheduler and counters.

    Raises:
        RuntimeError: of ``load_state_dict``, for the checkpoint of another network.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    module.on_load_checkpoint(checkpoint)  # as Lightning does: a module may store more in it, or rename keys
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)


def other_optimizer(states: Sequence[dict[str, Any]], optimizers: Sequence[Optimizer]) -> str | None:
    """Why the optimizers cannot continue from the optimizer states of a checkpoint; None if they can.

    torch refuses another number of parameters. It accepts the state of another class without an error, and then fails
    in the first step or computes something else. A state does not store its class, so the names of its options tell the
    class here. It is another class if the state has options that this one lacks, and lacks options that this one has.
    One of the two alone is another version of torch, which added or removed an option.
    """
    if len(states) != len(optimizers):
        return f"the checkpoint has {len(states)} optimizers, and this training {len(optimizers)}"
    for state, optimizer in zip(states, optimizers, strict=True):
        name, sizes = type(optimizer).__name__, [len(group["params"]) for group in optimizer.param_groups]
        groups = state.get("param_groups") or []
        if [len(group["params"]) for group in groups] != sizes:
            found = ", ".join(str(len(group["params"])) for group in groups)
            return f"its parameter groups have {found} parameters, and those of this training {sizes}"
        own = {"params", "initial_lr", "param_names", *optimizer.defaults}
        theirs = {key for group in groups for key in group}
        if theirs - own and set(optimizer.defaults) - theirs:
            return f"its options are {', '.join(sorted(theirs - {'params', 'initial_lr'}))}, not those of {name}"
    return None


@contextmanager
def explain_mismatch(path: str | None) -> Iterator[None]:
    """Within this context, a checkpoint of another model or optimizer raises a one-line error.

    Raises:
        AgreedError: the checkpoint does not fit the model or the optimizer. Every rank finds that and raises it.
    """
    try:
        yield
    except OtherOptimizerError as error:
        raise AgreedError(
            f"ckpt_path={path}: it was saved with another optimizer ({error}); use that one, or begin another run "
            "with its weights (run.id=NAME ckpt_restore=weights)"
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
    """A checkpoint holds the state of another optimizer; the message is the difference that was found."""
