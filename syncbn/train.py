"""The program ``train.py`` and ``syncbn train``: one Hydra job is one training run."""

import sys
from typing import TYPE_CHECKING

from syncbn.training import help as help_pages
from syncbn.training import import_paths, notebook, torchvision_internals
from syncbn.training.config.conf_directory import conf_directory
from syncbn.training.distributed import signals

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Runs the command line in ``sys.argv``, or prints the help that it asks for."""
    notebook.leave_backend()
    try:
        if help_pages.is_asked(sys.argv[1:]):
            sys.exit(help_pages.show(sys.argv[1:]))
        import_paths.add(sys.argv[1:])
        torchvision_internals.allow_missing_operators()
        _hydra()
    finally:
        signals.ignore()


def _hydra() -> None:
    import syncbn.training.launch.main  # noqa: F401  # registers the types and names that conf/ uses
    from syncbn.training.composition.run_hydra import run_hydra

    run_hydra(job, str(conf_directory()))


def job(cfg: "DictConfig") -> float | None:
    """Runs one job: starts the ranks, monitors them, and prints the result. With ``+study=NAME``, a study's jobs.

    Returns:
        The metric that ``objective`` names, which a sweeper such as Optuna's optimizes.
    """
    if cfg.study is not None:
        from syncbn.study.runner.main import main as study

        study(cfg)
        return None
    from syncbn.training import main as run

    best: float | None = run(cfg)
    return best
