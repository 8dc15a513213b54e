"""What is installed, and what the machine has: packages, processors, backends, limits, disk."""

import os
import platform
import resource
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from syncbn.doctor.rows import Row, failed, ok, warning
from syncbn.nn import torch_internals
from syncbn.nn.kernels import cpu, gpu
from syncbn.training import lightning_internals
from syncbn.training.checkpoint import torchmetrics_internals
from syncbn.training.launch import hydra_internals
from syncbn.training.loggers import wandb_internals

TESTED = {
    "torch": torch_internals.TESTED,
    "lightning": lightning_internals.TESTED,
    "torchmetrics": torchmetrics_internals.TESTED,
    "hydra-core": hydra_internals.TESTED,
    "wandb": wandb_internals.TESTED,
}
INSTALL = "pip install -c constraints.txt ."
GB = 1e9


def python() -> list[Row]:
    """The version of Python, against the one that the package asks for."""
    found = platform.python_version()
    try:
        needed = metadata("syncbn")["Requires-Python"]
    except PackageNotFoundError:
        return [ok("Python", found)]  # the row on packages says so
    if not SpecifierSet(needed).contains(found, prereleases=True):
        return [failed("Python", f"{found} at {sys.executable}", f"use Python {needed}")]
    return [ok("Python", found)]


def packages() -> list[Row]:
    """The versions of what the package needs, against its ranges; a row more for each that is outside."""
    try:
        needs = [Requirement(line) for line in requires("syncbn") or []]
    except PackageNotFoundError:
        return [warning("packages", "syncbn is not installed: which versions it needs is not known", INSTALL)]
    found, wrong = [f"syncbn {version('syncbn')}"], []
    for need in needs:
        optional = need.marker is not None and not need.marker.evaluate({"extra": ""})
        try:
            here = version(need.name)
        except PackageNotFoundError:
            if not optional:
                wrong.append(failed(f"package {need.name}", "not installed", f"pip install '{_plain(need)}'"))
            continue
        if not optional:
            found.append(f"{need.name} {here}")
        if not need.specifier.contains(here, prereleases=True):
            say = warning if optional else failed
            wrong.append(say(f"package {need.name}", here, f"pip install '{_plain(need)}'"))
    return [ok("packages", ", ".join(found)), *wrong]


def newer_than_tested() -> list[Row]:
    """A row for each package that is newer than any that the tests have run with, and whose private parts are used."""
    rows = []
    for name, tested in TESTED.items():
        try:
            here = version(name)
        except PackageNotFoundError:
            continue  # the row on packages reports it
        if Version(here).release > Version(tested).release:
            found = f"{here} is newer than {tested}, the newest version that syncbn was tested with"
            rows.append(warning(f"package {name}", found, f"if something fails: pip install '{name}=={tested}'"))
    return rows


def _plain(need: Requirement) -> str:
    return f"{need.name}{need.specifier}"


def imports() -> list[Row]:
    """Whether what a rank imports can be imported. A torchvision of another torch is what most often stops it."""
    from syncbn.training.errors import SettingError
    from syncbn.training.launch.job import import_run

    start = time.monotonic()
    try:
        import_run()
    except SettingError as error:
        return [failed("imports", error.setting, error.hint)]
    except Exception as error:
        return [failed("imports", f"{type(error).__name__}: {' '.join(str(error).split())}", INSTALL)]
    return [ok("imports", f"Lightning and all that a rank needs, in {time.monotonic() - start:.1f} s")]


def processors() -> list[Row]:
    """The cores that this process may use, which in a container or a job are fewer than the machine has."""
    mine, all_ = cores(), os.cpu_count() or 1
    found = f"{mine} {'core' if mine == 1 else 'cores'} for this process{f', of {all_}' if mine != all_ else ''}"
    if mine == 1:
        return [warning("CPU", found, "two ranks on the CPU share it; ask for 2 or more (Slurm: --cpus-per-task)")]
    return [ok("CPU", found)]


def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[Row]:
    """The GPUs that torch sees."""
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = [f"{d.name}, {d.total_memory / GB:.0f} GB" for d in devices]
        return [ok("GPUs", "; ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)))]
    if Path("/proc/driver/nvidia/version").exists():
        if not torch.backends.cuda.is_built():
            fix = "install the build of torch for CUDA, if you mean to train on the GPU"
            return [warning("GPUs", f"there is an NVIDIA driver, but torch {torch.__version__} is for the CPU", fix)]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
        fix = "see what nvidia-smi says; in a container or a job, ask for a GPU"
        return [warning("GPUs", f"there is an NVIDIA driver, but torch sees no GPU{why}", fix)]
    return [ok("GPUs", "none: training is on the CPU")]


def backends() -> list[Row]:
    """What carries messages between ranks."""
    if not dist.is_available() or not dist.is_gloo_available():
        return [failed("backend", "this torch was built without gloo", "install a build of torch that has it")]
    if dist.is_nccl_available():
        return [ok("backend", "gloo for the CPU, nccl for GPUs")]
    if torch.cuda.is_available():
        fix = "install a build of torch that has it (Linux); gloo is slow on GPUs"
        return [warning("backend", "gloo; no nccl for the GPUs", fix)]
    return [ok("backend", "gloo; no nccl, which GPUs would need")]


def kernels() -> list[Row]:
    """The layer's own code for GPUs."""
    if not torch.cuda.is_available():
        return []
    if reason := gpu.why_not():
        return [warning("GPU kernels", f"none, torch's take longer: {reason}", gpu.WANTS)]
    return [ok("GPU kernels", "Triton starts them")]


def passes() -> list[Row]:
    """The layer's compiled code for the CPU."""
    if not cpu.built():
        fix = f"install a C compiler, then: {INSTALL}"
        return [warning("compiled passes", "none: on the CPU the layer takes two to six times as long", fix)]
    if cpu.disabled:
        return [warning("compiled passes", "built, but SYNCBN_NATIVE=0 keeps them out", "unset SYNCBN_NATIVE")]
    return [ok("compiled passes", "built for these sources and this machine")]


def open_files(least: int = 1024) -> list[Row]:
    """How many files a process may have open; loader workers pass batches by open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < least:
        within = "" if hard == resource.RLIM_INFINITY or hard >= 4096 else f" (at most {hard} here)"
        fix = f"ulimit -n 4096{within}: loader workers pass batches by open files"
        return [warning("open files", f"at most {soft} a process", fix)]
    return [ok("open files", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft:,} a process")]


def shared_memory(place: Path = Path("/dev/shm"), least: float = GB) -> list[Row]:
    """Room for the batches that loader workers hand over. Docker gives 64 MB if not told otherwise."""
    if not place.is_dir():
        return [ok("shared memory", f"there is no {place}; loader workers use files")]
    free = shutil.disk_usage(place).free
    if free < least:
        fix = "data.num_workers=0, or more room (docker run --shm-size=8g)"
        return [warning("shared memory", f"{_size(free)} free in {place}", fix)]
    return [ok("shared memory", f"{_size(free)} free in {place}")]


def disk(outputs: Path, slow: float = 1.0) -> list[Row]:
    """Whether a file can be written, forced to the disk and renamed where run directories are made; it is removed."""
    elsewhere = "call it in another directory, or give one with --outputs (train.py: hydra.run.dir=...)"
    name, contents = f"{outputs}", os.urandom(1 << 16)
    start = time.monotonic()
    try:
        there = next(d for d in (outputs, *outputs.absolute().parents) if d.exists())
        if there != outputs:
            name = f"{outputs} (to be made in {there})"
        with TemporaryDirectory(prefix=".syncbn-doctor-", dir=there) as place:
            probe, kept = Path(place) / "draft", Path(place) / "file"
            with probe.open("wb") as file:
                file.write(contents)
                file.flush()
                os.fsync(file.fileno())
            probe.rename(kept)
            if kept.read_bytes() != contents:
                return [failed("disk", f"{name}: a file comes back with other contents than were written", elsewhere)]
    except OSError as error:
        return [failed("disk", f"{name}: cannot be written to ({error.strerror})", elsewhere)]
    seconds, free = time.monotonic() - start, shutil.disk_usage(there).free
    found = f"{name}: {_size(free)} free; writing a small file took {1e3 * seconds:.0f} ms"
    if free < GB:
        return [warning("disk", found, f"make room, or {elsewhere}")]
    if seconds > slow:
        return [warning("disk", found, f"checkpoints will be slow; a faster disk: {elsewhere}")]
    return [ok("disk", found)]


def _size(number: float) -> str:
    return f"{number / GB:,.0f} GB" if number >= 10 * GB else f"{number / 1e6:,.0f} MB"
