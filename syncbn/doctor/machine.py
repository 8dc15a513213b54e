"""Checks of the installation and the machine: packages, processors, backends, limits and disk."""

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
from torch.utils import collect_env

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


def platform_and_build() -> list[Row]:
    """Report the operating system with its C library, and which build of torch is installed.

    From torch.utils.collect_env only functions that read files and modules are used (torch 2.13). Others start
    programs: nvidia-smi, nvcc, gcc, pip.
    """
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    return [ok("platform", f"{collect_env.get_python_platform()}; torch {torch.__version__} for {build}")]


def python() -> list[Row]:
    """Check the version of Python against the range that the package requires."""
    found = platform.python_version()
    try:
        needed = metadata("syncbn")["Requires-Python"]
    except PackageNotFoundError:
        return [ok("Python", found)]  # packages() reports that syncbn is not installed
    if not SpecifierSet(needed).contains(found, prereleases=True):
        return [failed("Python", f"{found} at {sys.executable}", f"use Python {needed}")]
    return [ok("Python", found)]


def packages() -> list[Row]:
    """Check the versions of the required packages; one further row for each package outside its range."""
    try:
        requirements = [Requirement(line) for line in requires("syncbn") or []]
    except PackageNotFoundError:
        return [warning("packages", "syncbn is not installed, so the required versions are not known", INSTALL)]
    found, wrong = [f"syncbn {version('syncbn')}"], []
    for requirement in requirements:
        optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        fix = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            if not optional:
                wrong.append(failed(f"package {requirement.name}", "not installed", fix))
            continue
        if not optional:
            found.append(f"{requirement.name} {installed}")
        if not requirement.specifier.contains(installed, prereleases=True):
            row = warning if optional else failed
            wrong.append(row(f"package {requirement.name}", installed, fix))
    return [ok("packages", ", ".join(found)), *wrong]


def newer_than_tested() -> list[Row]:
    """Warn of each package whose private parts syncbn uses, and which is newer than the tested version."""
    rows = []
    for name, tested in TESTED.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue  # packages() reports it
        if Version(installed).release > Version(tested).release:
            found = f"{installed} is newer than {tested}, the newest version that syncbn was tested with"
            rows.append(warning(f"package {name}", found, f"if something fails: pip install '{name}=={tested}'"))
    return rows


def imports() -> list[Row]:
    """Import the modules that a rank imports. The most frequent failure is a torchvision built for another torch."""
    from syncbn.training.errors import SettingError
    from syncbn.training.launch.job import import_run
    from syncbn.training.vision_packages import allow_missing_operators, lacks_operators

    start = time.monotonic()
    allow_missing_operators()  # as the program does
    try:
        import_run()
    except SettingError as error:
        return [failed("imports", error.setting, error.hint)]
    except Exception as error:
        return [failed("imports", f"{type(error).__name__}: {' '.join(str(error).split())}", INSTALL)]
    rows = [ok("imports", f"Lightning and all other modules of a rank, in {time.monotonic() - start:.1f} s")]
    if lacks_operators():
        found = f"{version('torchvision')} was built for another torch than {version('torch')}: its operators (nms, "
        found += "roi_align) are missing; networks, transforms and data sets work"
        rows.append(warning("torchvision", found, "if you need them, install it from where this torch came from"))
    return rows


def processors() -> list[Row]:
    """Check the number of cores for this process; in a container or a job it is lower than the machine's."""
    usable, total = cores(), os.cpu_count() or 1
    of = f", of {total}" if usable != total else ""
    found = f"{usable} {'core' if usable == 1 else 'cores'} for this process{of}"
    if usable == 1:
        return [warning("CPU", found, "two ranks on the CPU share it; request 2 or more (Slurm: --cpus-per-task)")]
    return [ok("CPU", found)]


def cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[Row]:
    """List the GPUs that torch sees; warn if there is an NVIDIA driver, but torch sees no GPU."""
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = [f"{d.name}, {d.total_memory / GB:.0f} GB" for d in devices]
        return [ok("GPUs", "; ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)))]
    if Path("/proc/driver/nvidia/version").exists():
        if not torch.backends.cuda.is_built():
            fix = "install the build of torch for CUDA to train on the GPU"
            return [warning("GPUs", f"there is an NVIDIA driver, but torch {torch.__version__} is for the CPU", fix)]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        setting = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
        fix = "run nvidia-smi; in a container or a job, request a GPU"
        return [warning("GPUs", f"there is an NVIDIA driver, but torch sees no GPU{setting}", fix)]
    return [ok("GPUs", "none: training runs on the CPU")]


def backends() -> list[Row]:
    """Check which backends of torch.distributed are built in: gloo for the CPU, NCCL for GPUs."""
    if not dist.is_available() or not dist.is_gloo_available():
        return [failed("backend", "this torch was built without gloo", "install a build of torch that has it")]
    if dist.is_nccl_available():
        return [ok("backend", "gloo for the CPU, nccl for GPUs")]
    if torch.cuda.is_available():
        fix = "install a build of torch that has it (Linux); gloo is slow on GPUs"
        return [warning("backend", "gloo; no nccl for the GPUs", fix)]
    return [ok("backend", "gloo; no nccl, which only GPUs need")]


def kernels() -> list[Row]:
    """Check whether the layer's Triton kernels for GPUs can run; no row without a GPU."""
    if not torch.cuda.is_available():
        return []
    if reason := gpu.why_not():
        return [warning("GPU kernels", f"none, so torch's slower kernels are used: {reason}", gpu.WANTS)]
    return [ok("GPU kernels", "Triton can start them")]


def passes() -> list[Row]:
    """Check whether the layer's compiled code for the CPU is built and enabled."""
    if not cpu.built():
        fix = f"install a C compiler, then: {INSTALL}"
        return [warning("compiled passes", "none: on the CPU the layer takes two to six times as long", fix)]
    if cpu.disabled:
        return [warning("compiled passes", "built, but disabled by SYNCBN_NATIVE=0", "unset SYNCBN_NATIVE")]
    return [ok("compiled passes", "built for these sources and this machine")]


def open_files(least: int = 1024) -> list[Row]:
    """Check how many files a process may have open; loader workers pass each batch in an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < least:
        within = "" if hard == resource.RLIM_INFINITY or hard >= 4096 else f" (at most {hard} here)"
        fix = f"ulimit -n 4096{within}: loader workers pass batches in open files"
        return [warning("open files", f"at most {soft} per process", fix)]
    return [ok("open files", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft:,} per process")]


def shared_memory(directory: Path = Path("/dev/shm"), least: float = GB) -> list[Row]:
    """Check the free shared memory, in which loader workers pass batches. Docker's default is 64 MB."""
    if not directory.is_dir():
        return [ok("shared memory", f"there is no {directory}; loader workers use files")]
    free = shutil.disk_usage(directory).free
    if free < least:
        fix = "data.num_workers=0, or more space (docker run --shm-size=8g)"
        return [warning("shared memory", f"{_size(free)} free in {directory}", fix)]
    return [ok("shared memory", f"{_size(free)} free in {directory}")]


def disk(outputs: Path, slow: float = 1.0) -> list[Row]:
    """Check that a file can be written, synced and renamed in the directory of run directories; it is removed again.

    Args:
        outputs: the directory in which run directories would be created.
        slow: seconds for a small file from which on the disk counts as slow.
    """
    elsewhere = "run this in another directory, or name one with --outputs (train.py: hydra.run.dir=...)"
    name, contents = f"{outputs}", os.urandom(1 << 16)
    start = time.monotonic()
    try:
        existing = next(d for d in (outputs, *outputs.absolute().parents) if d.exists())
        if existing != outputs:
            name = f"{outputs} (to be created in {existing})"
        with TemporaryDirectory(prefix=".syncbn-doctor-", dir=existing) as directory:
            draft, renamed = Path(directory) / "draft", Path(directory) / "file"
            with draft.open("wb") as file:
                file.write(contents)
                file.flush()
                os.fsync(file.fileno())
            draft.rename(renamed)
            if renamed.read_bytes() != contents:
                return [failed("disk", f"{name}: a file was read back with wrong contents", elsewhere)]
    except OSError as error:
        return [failed("disk", f"{name}: cannot be written to ({error.strerror})", elsewhere)]
    seconds, free = time.monotonic() - start, shutil.disk_usage(existing).free
    found = f"{name}: {_size(free)} free; writing a small file took {1e3 * seconds:.0f} ms"
    if free < GB:
        return [warning("disk", found, f"free some space, or {elsewhere}")]
    if seconds > slow:
        return [warning("disk", found, f"checkpoints will be slow; for a faster disk {elsewhere}")]
    return [ok("disk", found)]


def _size(number: float) -> str:
    return f"{number / GB:,.0f} GB" if number >= 10 * GB else f"{number / 1e6:,.0f} MB"
