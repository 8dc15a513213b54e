"""Exports the network of a run to ONNX or with ``torch.export``, and compares the file with the network."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.inference import formats, metadata, sample_inputs
from syncbn.inference.trained import Trained, open_run
from syncbn.training.atomic_write import replacing
from syncbn.training.errors import SettingError
from syncbn.training.run_directory.paths import short

SAMPLES = 8  # test images that the file is compared on
TOLERANCE = 1e-4  # of the largest output
SMALLEST = 1e-30  # a network whose outputs are all 0 has no larger one
LARGEST = 2**31 - 2**26  # bytes; an ONNX file has at most 2 GiB


@dataclass(frozen=True)
class Exported:
    """A file that was exported.

    Attributes:
        path: the file.
        difference: the largest absolute difference between its outputs and those of the network.
        largest: the largest absolute value of an output.
        inputs: what the two were compared on, in words.
    """

    path: Path
    difference: float
    largest: float
    inputs: str


def export(
    run: Path,
    *,
    to: str = "onnx",
    out: Path | None = None,
    part: str | None = None,
    shape: str | None = None,
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    trust: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Export the best checkpoint of a run, in float32, with torch's batch norm and any batch size.

    The file is compared with the network on test images of the run, one by one and together. Only then it gets its
    name, so a file that is there is one that was compared.

    Args:
        run: a run directory, a checkpoint file, or a directory that holds exactly one run.
        to: "onnx", or "torch" for a program of ``torch.export`` (``.pt2``).
        out: the file; None for ``network.onnx`` or ``network.pt2`` in the run directory, or beside the checkpoint.
        part: the part of the LightningModule to export, if it has several networks.
        shape: of one input, ``"3,224,224"``; None for that of the test images.
        tolerance: the largest difference that is accepted, as a share of the largest output.
        overwrite: replace a file of this name.
        trust: allow classes that the run's ``config.yaml`` names to be imported and called.
        report: called with lines for the user.

    Raises:
        SettingError: the run has no checkpoint, the network cannot be exported, or the file computes something else.
        OSError: the file cannot be written.
    """
    kind = formats.find(to)
    trained = open_run(run, trust=trust, part=part, as_trained=False)
    home = trained.run_dir or trained.checkpoint.parent
    path = out or home / f"network{kind.suffix}"
    _refuse_file(path, overwrite=overwrite)
    _refuse_large(trained.network, to)
    report(_about(trained))
    if trained.note:
        report(f"{trained.note}; --part '' exports the whole module")
    x, inputs = _inputs(trained, shape, trust=trust, report=report)
    with replacing(path) as draft:
        try:
            draft.touch()  # a directory that cannot be written to is reported before the network is traced
            difference, largest = _written(trained, x, kind, draft)
            if not difference <= tolerance * max(largest, SMALLEST):  # also for NaN
                hint = f"the file computes something else than the network on {inputs}: a difference of "
                hint += f"{difference:.2g} in outputs up to {largest:.2g}; nothing was written"
                raise SettingError("--to", to, hint)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    return Exported(path, difference, largest, inputs)


@torch.no_grad()
def _written(trained: Trained, x: Tensor, kind: formats.Format, file: Path) -> tuple[float, float]:
    """Write the file, and return the largest difference of its outputs, and the largest output."""
    program = formats.traced(trained.network, x)
    kind.write(program, file, metadata.of(trained, x))
    return _compared(trained.network, kind.runner(file), x)


def _refuse_file(path: Path, *, overwrite: bool) -> None:
    if path.is_dir():
        raise SettingError("--out", path, "this is a directory; use the name of a file in it")
    if not path.parent.is_dir():
        raise SettingError("--out", path, f"there is no directory {path.parent}; make it, or use another")
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise SettingError(
            "--out", short(path, resolve=False), "there is such a file; use another name, or --overwrite"
        )


def _refuse_large(network: nn.Module, to: str) -> None:
    size = sum(each.numel() * each.element_size() for each in network.state_dict().values() if isinstance(each, Tensor))
    if to == "onnx" and size > LARGEST:
        raise SettingError(
            "--to", to, f"the weights have {size / 2**30:.1f} GiB, and an ONNX file at most 2; use torch"
        )


def _inputs(trained: Trained, shape: str | None, *, trust: bool, report: Callable[[str], None]) -> tuple[Tensor, str]:
    """Inputs to compare on, and what they are: test images of the run, or random numbers where there are none."""
    size = _shape(shape)
    if size is None:
        try:
            found = sample_inputs.images(trained, SAMPLES, trust=trust)
        except Exception as error:  # a data module of the user's may raise anything
            what = "" if isinstance(error, SettingError | OSError) else f"{type(error).__name__}: "
            report(f"no test images: {what}{' '.join(str(error).split())[:300]}")
            known = trained.preprocessing
            size = None if known is None else (known.channels, *known.size)
        else:
            found = found.float() if found.is_floating_point() else found
            return _several(found), f"{len(found)} test {'images' if found.dim() == 4 else 'samples'}"
    if size is None:
        hint = "the run does not say which shape an input has; give it, such as --shape 3,224,224, or use --trust"
        raise SettingError("--shape", hint=hint)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, *size, generator=generator), f"{SAMPLES} random inputs"


def _several(x: Tensor) -> Tensor:
    """At least two samples: torch.export takes a batch of one sample as always one."""
    return x if len(x) > 1 else torch.cat([x, x])


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        size = tuple(int(each) for each in text.split(","))
    except ValueError:
        size = (0,)
    if min(size) < 1:
        raise SettingError("--shape", text, "use the sizes of one input, such as 3,224,224")
    return size


def _compared(network: nn.Module, run: Callable[[Tensor], list[Tensor]], x: Tensor) -> tuple[float, float]:
    """The largest difference of any output, and the largest output, for the samples one by one and together."""
    differences, sizes = [0.0], [0.0]
    for batch in (x[:1], x):
        expected = formats.tensors(network(batch))
        found = run(batch)
        if [each.shape for each in found] != [each.shape for each in expected]:
            shapes = ", ".join(str(tuple(each.shape)) for each in found)
            raise SettingError("export", hint=f"for {len(batch)} samples the outputs have other shapes ({shapes})")
        for theirs, ours in zip(found, expected, strict=True):
            theirs, ours = theirs.double(), ours.double()
            # The maximum of a NaN would be lost in max().
            differences.append(float((theirs - ours).abs().max()) if ours.numel() else 0.0)
            sizes.append(float(ours.abs().max()) if ours.numel() else 0.0)
    return float(torch.tensor(differences, dtype=torch.float64).max()), float(torch.tensor(sizes).max())


def _about(trained: Trained) -> str:
    """One line about what is exported."""
    text = f"network of {short(trained.checkpoint, resolve=False)}"
    precision: Any = (trained.settings.get("trainer") or {}).get("precision")
    if str(precision).endswith("-true") and not str(precision).startswith("32"):
        text += f", trained in {precision} and exported in float32"
    return text


def lines(exported: Exported) -> list[str]:
    """What the command prints of an exported file."""
    size = exported.path.stat().st_size
    shown = f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"
    return [
        f"compared on {exported.inputs}, one by one and together: largest difference {exported.difference:.2g}, "
        f"in outputs up to {exported.largest:.3g}",
        f"written: {short(exported.path, resolve=False)} ({shown})",
    ]
