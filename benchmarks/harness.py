"""What the benchmarks share: fair timing, a record of the machine, ranks."""

import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from syncbn.nn.kernels import cpu

T = TypeVar("T")
_told: set[str] = set()
RESULTS = Path(__file__).parent / "results"
# Kept memory, as with jemalloc and tcmalloc. With glibc's defaults it is luck which of two alike calls gets its
# megabytes back from the kernel, page by page, and that takes longer than to compute on them.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**35)}


class Spread(NamedTuple):
    """The median of some measurements and between which values the middle 80 % of them lie."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), tenths[0], tenths[-1])


def keep_memory() -> None:
    """Starts this program anew with an allocator that keeps what it was given, unless it runs with one."""
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_KEEP_MEMORY})


def interleaved(calls: dict[str, Callable[[], Any]], seconds: float, least: int = 5) -> dict[str, list[float]]:
    """Seconds that each call took, round by round; see :func:`in_turns`."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def timed(call: Callable[[], Any]) -> float:
        wait()
        start = time.perf_counter()
        result = call()
        wait()
        took = time.perf_counter() - start
        del result
        return took

    return in_turns({name: partial(timed, call) for name, call in calls.items()}, seconds, least)


def in_turns(takes: dict[str, Callable[[], T]], seconds: float, least: int = 5) -> dict[str, list[T]]:
    """What each call says of itself, round by round, in a random order that is new each round, after two rounds unseen.

    A candidate that is timed alone in a loop runs in warm memory and looks up to twice as fast as it is. Several ranks
    take the same order and number of rounds: the first one's clock ends them.
    """
    seen: dict[str, list[T]] = {name: [] for name in takes}
    order, shuffle = list(takes), random.Random(0).shuffle
    end, done = time.perf_counter() + seconds, 0
    while _first_ranks(done < least + 2 or time.perf_counter() < end):
        shuffle(order)
        for name in order:
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.barrier()
            value = takes[name]()
            if done >= 2:
                seen[name].append(value)
        done += 1
    return seen


def _first_ranks(answer: bool) -> bool:
    """The first rank's answer, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return answer
    given = torch.tensor([answer], dtype=torch.int32, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(given, 0)
    return bool(given.item())


def agreed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """As ``interleaved``, for ranks: the same order and number of rounds on each, all starting a call together."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for done in range(rounds + 2):
        shuffle(order)
        for name in order:
            dist.barrier()
            start = time.perf_counter()
            calls[name]()
            if done >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def ratios(ours: list[float], theirs: list[float]) -> Spread:
    """Round by round, how many times the time of ``theirs`` ``ours`` took."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def on_ranks(world_size: int, fn: Callable[..., Any], *args: Any) -> Any:
    """What ``fn(rank, world_size, *args)`` returns on rank 0 of ``world_size`` processes of one thread, by gloo."""
    with tempfile.TemporaryDirectory() as place:
        mp.spawn(_rank, (world_size, place, fn, args), nprocs=world_size)
        return json.loads((Path(place) / "result").read_text(encoding="utf-8"))


def _rank(rank: int, world_size: int, place: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=world_size)
    result = fn(rank, world_size, *args)
    if rank == 0:
        (Path(place) / "result").write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def alone(device: str) -> None:
    """A process group of one."""
    store = tempfile.NamedTemporaryFile(delete=False)  # noqa: SIM115  # lives as long as the group
    _join(device, init_method=f"file://{store.name}", rank=0, world_size=1)


def together(device: str) -> tuple[int, int]:
    """This rank and how many there are: those of torchrun, a GPU each; a process group of one where it is alone.

    Ends the program with a line that says what would work, where the device is missing.
    """
    here, ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda":
        if not torch.cuda.is_available():
            sys.exit(f"error: torch {torch.__version__} sees no GPU: run this where there is one, or with --device cpu")
        gpus = torch.cuda.device_count()
        if here >= gpus:
            sys.exit(f"error: a GPU each for the ranks of this machine, which has {gpus}: --nproc-per-node {gpus}")
        torch.cuda.set_device(here)
    if ranks == 1:
        alone(device)
    else:
        _join(device, init_method="env://")
    return dist.get_rank(), ranks


def _join(device: str, **how: Any) -> None:
    if device == "cuda":
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()), **how)
    else:
        dist.init_process_group("gloo", **how)


def told(error: Exception) -> str:
    """An error in a line; all of it goes to the standard error stream, the first time."""
    first = next(iter(str(error).strip().splitlines()), "")
    line = f"{type(error).__name__}: {first}"[:160]
    if line not in _told:
        _told.add(line)
        traceback.print_exception(error)
    return line


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiled passes": cpu.built() and os.environ.get("SYNCBN_NATIVE") != "0",
        "system": platform.platform(aliased=True, terse=True),
    } | (_gpu() if device == "cuda" else {})


def save(path: Path, result: dict[str, Any]) -> None:
    """Writes ``result`` as JSON, all of it or nothing: what was there stays until the new file is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def _commit() -> str:
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    return _says(git) or "unknown"


def _says(command: list[str]) -> str:
    """What a program prints; nothing where there is no such program."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8").stdout.strip()
    except OSError:
        return ""


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = _says(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split()
    return {
        "GPUs here": torch.cuda.device_count(),
        "GB": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "L2 MB": round(properties.L2_cache_size / 1e6, 1),
        "driver": driver[0] if driver else "unknown",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": _nccl(),
        "triton": _triton(),
    }


def _nccl() -> str:
    return ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "none"


def _triton() -> str:
    """The module's version: its distribution goes by several names."""
    try:
        import triton
    except Exception:  # one that does not start here is none
        return "none"
    return str(getattr(triton, "__version__", "unknown"))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
