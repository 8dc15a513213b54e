"""The formats of an exported network: ONNX, and programs of ``torch.export``."""

import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from syncbn.inference.metadata import INPUT, OUTPUT
from syncbn.training.errors import SettingError

EXTRA = "syncbn.json"  # the file in a .pt2 archive that holds the metadata
NEEDED = ("onnx", "onnxscript", "onnxruntime")  # for ONNX
ALLOWED = ("use --to torch", "pip install onnx onnxscript onnxruntime")
OURS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
DATA_DEPENDENT = ("GuardOnDataDependent", "data-dependent", "torch.cond", "Could not guard")
FIXED_BATCH = ("Constraints violated", "specialized", "ConstraintViolation")


class Format(NamedTuple):
    """A format.

    Attributes:
        suffix: of its files.
        write: writes a program and metadata to a file.
        runner: makes of a file the function that it computes.
    """

    suffix: str
    write: Callable[[ExportedProgram, Path, dict[str, str]], None]
    runner: Callable[[Path], Callable[[Tensor], list[Tensor]]]


def find(name: str) -> Format:
    """The format of this name.

    Raises:
        SettingError: there is no such format, or a package is missing.
    """
    if name not in FORMATS:
        raise SettingError("--to", name, f"use one of {', '.join(FORMATS)}")
    missing = [each for each in NEEDED if name == "onnx" and find_spec(each) is None]
    if missing:
        raise SettingError("--to", name, f"it needs {', '.join(missing)}; {ALLOWED[1]}, or {ALLOWED[0]}")
    return FORMATS[name]


def traced(network: nn.Module, x: Tensor) -> ExportedProgram:
    """The network as a program for any batch size.

    Raises:
        SettingError: it cannot be traced; the error names the line of the network.
    """
    try:
        with _silent():
            return torch.export.export(network, (x,), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:  # torch raises a dozen classes, and whatever the network raises
        raise SettingError("export", hint=_reason(error, network)) from error


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a network's output, which may be a tuple, a list or a dict of these."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [each for part in parts for each in tensors(part)]


def _write_torch(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    text = "{" + ", ".join(f'"{name}": {value}' for name, value in metadata.items()) + "}"
    with _silent(), path.open("wb") as file:
        torch.export.save(program, file, extra_files={EXTRA: text})


def _run_torch(path: Path) -> Callable[[Tensor], list[Tensor]]:
    with _silent(), path.open("rb") as file:
        module = torch.export.load(file).module()
    return lambda x: tensors(module(x))


def _write_onnx(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    count = sum(1 for each in program.graph_signature.user_outputs if each is not None)
    names = [OUTPUT] if count == 1 else [f"{OUTPUT}_{number}" for number in range(count)]
    try:
        with _silent():
            # The program is for any batch size already; dynamic_shapes only gives the dimension its name.
            options: dict[str, Any] = {"dynamic_shapes": ({0: "batch"},), "verbose": False}
            made: Any = torch.onnx.export(program, input_names=[INPUT], output_names=names, dynamo=True, **options)
            made.model.metadata_props.update(metadata)
            made.save(path)
    except OSError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        what = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        raise SettingError("--to", "onnx", f"it cannot be converted ({what}); {ALLOWED[0]}") from error


def _run_onnx(path: Path) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime  # type: ignore[import-not-found,unused-ignore]  # an optional package

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(each) for each in session.run(None, {INPUT: x.numpy()})]


FORMATS = {"onnx": Format(".onnx", _write_onnx, _run_onnx), "torch": Format(".pt2", _write_torch, _run_torch)}


@contextmanager
def _silent() -> Iterator[None]:
    """Drops what torch and onnxscript print, log and warn about their own parts."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _reason(error: Exception, network: nn.Module) -> str:
    """Why a network cannot be traced, in one line."""
    text = f"{type(error).__name__}: {error}"
    where = _line(error)
    at = f" at {where}" if where else ""
    if any(each in text for each in FIXED_BATCH):
        return f"{type(network).__name__} works with one batch size only{at}; take sizes from x.shape, not as numbers"
    if any(each in text for each in DATA_DEPENDENT):
        hint = "it decides by the values of a tensor, which an exported program cannot; use torch.where or torch.cond"
        return f"{type(network).__name__} cannot be exported{at}: {hint}"
    return f"{type(network).__name__} cannot be exported{at} ({' '.join(text.split())[:200]})"


def _line(error: BaseException) -> str:
    """The last line of the traceback that is neither torch's nor ours: ``net.py:12: if x.sum() > 0:``; "" if none."""
    each: BaseException | None = error
    while each is not None:
        frames = [f for f in traceback.extract_tb(each.__traceback__) if not f.filename.startswith((*OURS, "<"))]
        if frames:
            return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}"
        each = each.__cause__ or each.__context__
    return ""
