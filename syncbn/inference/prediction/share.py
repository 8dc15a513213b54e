"""The work of one rank: the class probabilities of its batches of files."""

import json
import os
import stat
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from syncbn.inference.preprocessing import Preprocessing
from syncbn.inference.trained import Trained, open_run
from syncbn.training.data.images.headers import pillow
from syncbn.training.errors import SettingError

READERS = 4  # threads that decode images; Pillow decodes without the interpreter's lock
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Task(NamedTuple):
    """What all ranks need to know. It is pickled."""

    run: str
    paths: list[str]
    batch_size: int
    top: int
    trust: bool
    device: str  # cpu or cuda
    threads: int  # of torch, in each rank
    part: str | None = None  # of the LightningModule


class Row(NamedTuple):
    """The result of one file.

    Attributes:
        file: its index.
        classes: indices of the most probable classes, the best first; empty if the file cannot be read.
        probabilities: of these classes.
        error: why it cannot be read.
    """

    file: int
    classes: list[int]
    probabilities: list[float]
    error: str = ""


def work(task: Task, results: str) -> None:
    """Entry point of a rank process: writes the rows of its batches into ``results/RANK.jsonl``, in order."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(task.threads)
    trained = open_run(task.run, trust=task.trust, part=task.part)
    with (Path(results) / f"{rank}.jsonl").open("w", encoding="utf-8") as file:
        for row in rows(task, trained, rank, world):
            file.write(json.dumps(row) + "\n")
            file.flush()


def rows(task: Task, trained: Trained, rank: int = 0, world: int = 1) -> Iterator[Row]:
    """The rows of every ``world``-th batch of files, from the batch ``rank`` on.

    A batch has the same files whatever the number of ranks. It is computed while the images of the next are read.

    Raises:
        SettingError: the network does not map such images to class scores.
    """
    assert trained.preprocessing is not None
    device = torch.device(task.device, rank) if task.device == "cuda" else torch.device(task.device)
    network = trained.network.to(device)
    precision = str((trained.settings.get("trainer") or {}).get("precision"))
    numbers = range(len(task.paths))
    batches = [numbers[at : at + task.batch_size] for at in range(0, len(numbers), task.batch_size)][rank::world]
    with ThreadPoolExecutor(READERS) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about odd files: they are read, or are errors
        reading: list[list[Future[Tensor | str]]] = []
        for number, batch in enumerate(batches):
            for following in batches[number + len(reading) : number + 2]:
                reading.append([pool.submit(_read, task.paths[each], trained.preprocessing) for each in following])
            images = [each.result() for each in reading.pop(0)]
            yield from _predicted(network, batch, images, task.top, device, precision)


def _predicted(
    network: nn.Module, batch: range, images: list[Tensor | str], top: int, device: torch.device, precision: str
) -> Iterator[Row]:
    readable = [each for each in images if isinstance(each, Tensor)]
    found: Iterator[tuple[list[int], list[float]]] = iter(())
    if readable:
        found = iter(_scores(network, torch.stack(readable).to(device), top, precision))
    for number, image in zip(batch, images, strict=True):
        yield Row(number, [], [], image) if isinstance(image, str) else Row(number, *next(found))


def _scores(network: nn.Module, images: Tensor, top: int, precision: str) -> list[tuple[list[int], list[float]]]:
    half = AUTOCAST.get(precision)
    with torch.inference_mode(), nullcontext() if half is None else torch.autocast(images.device.type, half):
        try:
            scores = network(images)
        except (RuntimeError, TypeError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            hint = f"its network does not take images of shape {tuple(images.shape[1:])} ({why})"
            raise SettingError("RUN", hint=hint) from error
    if not isinstance(scores, Tensor) or scores.dim() != 2 or len(scores) != len(images):
        what = f"of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        hint = f"its network's output is {what}, and not one score for each class, (N, classes)"
        raise SettingError("RUN", hint=hint)
    # A stable sort, so that of equal scores the first is the best, as argmax has it in the test.
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :top]
    probabilities = scores.double().softmax(dim=1).gather(1, order)
    return list(zip(order.tolist(), probabilities.tolist(), strict=True))


def _read(path: str, preprocessing: Preprocessing) -> Tensor | str:
    """The input of the network, or why the file cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116  # opening a named pipe would wait for a writer
            return "it is no regular file"
        return preprocessing(path)
    except Exception as error:  # Pillow raises SyntaxError and others for damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return " ".join(f"{type(error).__name__}: {reason}".replace(path, Path(path).name).split())


def check(trained: Trained, run: Any) -> None:
    """Checks that images can be predicted with this run.

    Raises:
        SettingError: its data module does not say how an image becomes an input, or Pillow is not installed.
    """
    pillow()
    if trained.preprocessing is None:
        data = trained.settings.get("data")
        target = data.get("_target_") if isinstance(data, dict) else None
        hint = f"its data ({target}) do not say how an image file becomes an input; data=folder, cifar10, cifar100, "
        raise SettingError(
            "RUN", run, f"{hint}mnist, imagenet and digits do. syncbn.load({str(run)!r}) has the network"
        )
