"""The entry point of ``train.py`` for ``+study=NAME``. Slow imports are delayed.

The reason is the same as in :mod:`syncbn.training.launch.main`.
"""

from omegaconf import DictConfig

from syncbn.training.distributed import signals
from syncbn.training.launch import preload
from syncbn.training.processes import fork_server
from syncbn.training.processes.quick_imports import no_garbage_collection


def main(cfg: DictConfig) -> None:
    """Executes the study's runs and writes its report; see :mod:`syncbn.study.runner.run_study`."""
    signals.end_at_once()
    # The fork server imports the modules of the ranks while this process imports torch.
    fork_server.start_server(*preload.modules(cfg))
    with no_garbage_collection():
        from syncbn.study.runner import run_study

    run_study.main(cfg)
