"""Makes the runs of an evaluation: ``mode=test`` for each pair of a checkpoint and a data set."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from syncbn.inference import run_settings
from syncbn.inference.evaluation.data_sets import DataSet, of_run, quoted
from syncbn.inference.locate import located
from syncbn.training.checkpoint import inherit_config
from syncbn.training.composition import composition_errors
from syncbn.training.composition.run_hydra import COMPOSITION
from syncbn.training.config.conf_directory import conf_directory
from syncbn.training.config.machine import Machine
from syncbn.training.config.settle import settle
from syncbn.training.errors import SettingError
from syncbn.training.launch import run_pool
from syncbn.training.launch.run_pool import Run
from syncbn.training.network import check as check_network
from syncbn.training.os_errors import explain
from syncbn.training.run_directory import record
from syncbn.training.run_directory.paths import short


class Pair(NamedTuple):
    """One cell of the table.

    Attributes:
        run: as it was typed.
        data: the label of the data set.
        plan: of the test; None if it cannot begin.
        error: why; one line.
    """

    run: str
    data: str
    plan: Run | None
    error: str = ""


def pairs(
    runs: Sequence[str], data: Sequence[DataSet], common: Sequence[str], root: Path, machine: Machine, *, trust: bool
) -> Iterable[Pair]:
    """The tests of all checkpoints on all data sets; one that cannot begin has an error.

    Args:
        runs: run directories or checkpoints.
        data: the data sets.
        common: settings of all tests, as on the command line.
        root: directory of their run directories, which are numbered.
        machine: that they run on.
        trust: whether to call any class that the config.yaml of a run names.
    """
    for number, (run, each) in enumerate((run, each) for run in runs for each in data):
        try:
            yield Pair(run, each.label, _test(Path(run), each, common, root / str(number), machine, trust=trust))
        except SettingError as error:
            yield Pair(run, each.label, None, str(error).replace("add trust=true", "add --trust"))
        except OSError as error:
            yield Pair(run, each.label, None, explain(error, Path(run)))


def _test(run: Path, data: DataSet, common: Sequence[str], run_dir: Path, machine: Machine, *, trust: bool) -> Run:
    if not run.exists():
        raise SettingError("RUN", run, "there is no such run directory or checkpoint")
    checkpoint, run_of = located(run)
    chosen = data.overrides
    if chosen is None:
        if run_of is None:
            raise SettingError("RUN", run, "this checkpoint lies in no run directory, which has its data; use --data")
        chosen = of_run(run_settings.read(run_of), record.read(run_of, "run"), trust=trust)
    path = short(checkpoint, resolve=False)
    if "${" in path:
        raise SettingError("RUN", run, "its path has ${ in it, which settings resolve; rename the directory")
    overrides = [*common, *chosen, f"ckpt_path={quoted(path)}", *(["trust=true"] if trust else [])]
    composed = OmegaConf.create(run_pool.in_directory(_composed(overrides), str(run_dir)))
    assert isinstance(composed, DictConfig)
    cfg = inherit_config.inherited(composed, overrides, lambda line: None)
    plan = settle(check_network.located(cfg, run_dir), machine, run_dir)
    check_network.check(plan)
    return Run(plan, overrides)


def _composed(overrides: list[str]) -> Any:
    name = str(HydraConfig.get().job.config_name)
    try:
        return OmegaConf.to_container(hydra.compose(name, overrides), enum_to_str=True)
    except SettingError:
        raise
    except COMPOSITION as error:
        raise composition_errors.explained(error, overrides, str(conf_directory()), name) from error
