"""Train one network: ``python train.py [group=choice] [setting=value] ...``; ``python train.py --help`` lists them."""

from syncbn.training import standard_streams
from syncbn.training.distributed import signals

if __name__ == "__main__":  # before all other imports, which take seconds
    signals.begin()
    standard_streams.outlive_reader()

from pathlib import Path

from omegaconf import DictConfig

from syncbn.study.runner.main import main as study
from syncbn.training import main
from syncbn.training.composition.run_hydra import run_hydra


def train(cfg: DictConfig) -> float | None:
    """Runs one job: starts the ranks, watches them, and prints what came out. With ``+study=NAME``, a study's jobs.

    Returns the best value of the monitored metric, which a sweeper such as Optuna's optimizes.
    """
    if cfg.study is not None:
        study(cfg)
        return None
    best: float | None = main(cfg)
    return best


if __name__ == "__main__":
    try:
        run_hydra(train, str(Path(__file__).resolve().parent / "conf"))
    finally:
        signals.ignore()
