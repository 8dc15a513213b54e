"""Calls a program under Hydra: errors of its composition end the program with one line, before torch is imported."""

import functools
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from syncbn.training import import_paths
from syncbn.training.composition import composition_errors, full_error, unread_settings
from syncbn.training.config import ranges, validate_data
from syncbn.training.console import print_line
from syncbn.training.distributed import environment, signals
from syncbn.training.errors import SettingError

ALONE = 10.0  # seconds in which rank 0 prints an error that this rank has found too
COMPOSITION = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)  # what Hydra raises for bad input


def run_hydra(task: Callable[[DictConfig], Any], config_path: str, config_name: str = "config") -> None:
    """Composes the settings of the command line and calls ``task`` with them, or for each job of a sweep.

    A setting that Hydra refuses ends the program with a one-line error and exit code 1. ``HYDRA_FULL_ERROR=1`` prints
    Hydra's traceback instead.

    Args:
        task: the program; Hydra names the job after the file or module that defines it.
        config_path: directory of the settings, absolute or ``pkg://...``.
        config_name: name of the main file there.
    """
    began = False

    @functools.wraps(task)
    def job(cfg: DictConfig) -> Any:
        nonlocal began
        began = True
        full_error.restore()
        _check(cfg)
        result = task(cfg)
        if not full_error.wanted():  # a sweeper composes the next jobs; after an exception Hydra prints its traceback
            full_error.hide()
        return result

    main = hydra.main(version_base="1.3", config_path=config_path, config_name=config_name)
    if full_error.wanted():
        main(job)()
        return
    try:
        composition_errors.check_options(sys.argv[1:])
        full_error.hide()
        main(job)()
    except SettingError as error:
        if began:
            raise
        refuse(error)
    except COMPOSITION as error:
        if began and os.environ.get(full_error.NAME) != "1":  # an exception of the job
            raise
        refuse(composition_errors.explained(error, sys.argv[1:], config_path, config_name))
    finally:
        full_error.restore()


def _check(cfg: DictConfig) -> None:
    """Checks what needs no import of torch, and refuses it within a second."""
    try:
        _check_settings(cfg)
    except SettingError as error:
        if full_error.wanted():
            raise
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            refuse(error)
        print_line(f"error: {error}", error=True)
        raise  # the sweep catches it and runs the next job


def _check_settings(cfg: DictConfig) -> None:
    try:
        _allow_own_modules(cfg)
        unread_settings.check(cfg, HydraConfig.get())
        if cfg.study is None:  # a study checks the settings of each of its runs
            ranges.check(_with_facts(cfg))
            if cfg.mode != "test":  # the network is that of the checkpoint's run, which is read later
                validate_data.check(cfg)
    except OmegaConfBaseException as error:
        raise ranges.unresolved(error) from error


def _allow_own_modules(cfg: DictConfig) -> None:
    for resolve in (False, True):
        with suppress(OmegaConfBaseException):  # of an interpolation; it is reported later
            import_paths.allow(OmegaConf.to_container(cfg, resolve=resolve))


def _with_facts(cfg: DictConfig) -> DictConfig:
    """The settings with a number in place of the facts of the data that are found in its files later."""
    cfg = cfg.copy()
    data = cfg.get("data")
    for name in ("num_classes", "in_channels") if isinstance(data, DictConfig) else ():
        if name in data and data[name] is None:
            data[name] = 1
    return cfg


def refuse(error: SettingError) -> None:
    """Prints the error and ends the program. All ranks of a launcher find it; rank 0 prints it if it lives."""
    if environment.rank() == 0 or not signals.wait(ALONE):
        print_line(f"error: {error}", error=True)
    sys.exit(1)
