"""Checks the settings about the network before ranks start, without Lightning."""

import os
import shutil
import sysconfig
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig

from syncbn.training.config.plan import Plan
from syncbn.training.config.ranges import plain
from syncbn.training.errors import SettingError
from syncbn.training.models import libraries
from syncbn.training.network import weights_source
from syncbn.training.read_file import DamagedError
from syncbn.training.run_directory import record


def located(composed: DictConfig, run_dir: Path) -> DictConfig:
    """The settings with the file that ``init_from`` names; globs that are one word as a list.

    A run that exists keeps the file that it began from, which it does not read again: it need not be there anymore.

    Raises:
        SettingError: ``init_from`` names no weights.
    """
    cfg = composed.copy()
    for name in ("freeze", "checkpoint_activations"):
        if isinstance(cfg.get(name), str):
            cfg[name] = [cfg[name]]
    if cfg.init_from is not None:
        cfg.init_from = _kept(cfg.init_from, run_dir) or weights_source.located(cfg.init_from)
    return cfg


def check(plan: Plan) -> None:
    """Refuse settings about the network that cannot work on this machine, or together.

    Raises:
        SettingError: for the first of them.
    """
    cfg = plan.cfg
    libraries.check(plain(cfg.model))
    if cfg.compile:
        _check_compiler(plan.accelerator)
    if cfg.compile_mode is not None and not cfg.compile:
        raise SettingError("compile_mode", cfg.compile_mode, "nothing is compiled; use compile=true too")
    if cfg.mode == "test" and cfg.init_from is not None:
        hint = "mode=test tests the weights of ckpt_path; use init_from=null"
        raise SettingError("init_from", cfg.init_from, hint)


def _kept(source: str, run_dir: Path) -> str | None:
    """The file that an existing run began from, if ``source`` names it or the run that it lies in."""
    before = None
    with suppress(DamagedError):
        before = record.settings(run_dir)
    began = None if before is None else before.get("init_from")
    if began is None or not (began == source or Path(began).is_relative_to(Path(source).absolute())):
        return None
    return str(began)


def _check_compiler(accelerator: str) -> None:
    """Refuse ``compile=true`` where torch's compiler lacks another one: of C++ for the CPU, Triton and C for GPUs."""
    if accelerator == "cpu":
        compiler = os.environ.get("CXX", "g++")
        lacks = None if shutil.which(compiler) else f"C++ compiler ({compiler})"
        if lacks is None and not Path(sysconfig.get_path("include"), "Python.h").is_file():
            lacks = "Python.h"
        works = "apt install g++ python3-dev, or set CXX to a compiler"
    else:
        lacks = None if find_spec("triton") else "package triton"
        works = "pip install triton"
    if lacks is not None:
        raise SettingError("compile", True, f"there is no {lacks} here; {works}, or use compile=false")
