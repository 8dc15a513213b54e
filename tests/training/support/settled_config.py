"""Settings as a run has them, without a run."""

import pickle
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from syncbn.training.config.machine import Machine, this_machine
from syncbn.training.config.plan import Plan
from syncbn.training.config.settle import settle
from syncbn.training.launch import main  # noqa: F401  # launch registers what conf/ names
from tests.support import read_once
from tests.training.support.train_command import REPO

read_once.install()


def composed(*overrides: str) -> DictConfig:
    """The settings of ``train.py`` with these overrides, as Hydra gives them."""
    return pickle.loads(_composed(overrides))


@cache
def _composed(overrides: tuple[str, ...]) -> bytes:
    """The same to be copied, as it takes a fifth of a second, and tests ask for the same many times."""
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        found = OmegaConf.to_container(compose("config", list(overrides)), enum_to_str=True)  # as config.yaml has it
    cfg = OmegaConf.create(_placed(found))
    assert isinstance(cfg, DictConfig)
    return pickle.dumps(cfg)


def _placed(tree: Any) -> Any:
    """A tree of settings with a run directory in it."""
    if isinstance(tree, dict):
        return {key: _placed(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_placed(value) for value in tree]
    return tree.replace("${hydra:runtime.output_dir}", "somewhere") if isinstance(tree, str) else tree


def settled(*overrides: str, machine: Machine | None = None, run_dir: Path = Path("somewhere")) -> Plan:
    """The plan that follows from them, on this machine unless another is given."""
    return settle(composed(*overrides), machine or this_machine(), run_dir)
