"""The main function of ``train.py``, which Hydra calls. It imports torch late, so a mistyped setting fails fast."""

from omegaconf import DictConfig, OmegaConf

from syncbn.training import standard_streams
from syncbn.training.config import schema
from syncbn.training.distributed import environment, signals
from syncbn.training.launch import preload
from syncbn.training.processes import fork_server, temporary_directory
from syncbn.training.processes.quick_imports import no_garbage_collection
from syncbn.training.run_directory import paths
from syncbn.training.search import objective

standard_streams.accept_any_text()  # at import: Hydra prints before it calls main()
schema.register()
OmegaConf.register_new_resolver("run_dir", paths.run_dir)
OmegaConf.register_new_resolver("search_direction", objective.direction)
OmegaConf.register_new_resolver("sweep_dir", paths.sweep_dir, use_cache=True)


def main(cfg: DictConfig) -> float | None:
    """Runs one job under Hydra. An invalid setting or a failed rank ends it with a one-line error and exit code 1.

    ``HYDRA_FULL_ERROR=1`` prints the traceback instead.

    Returns:
        The metric that ``objective`` names, for a sweeper that optimizes it. The default is the best value of the
        metric ``callbacks.checkpoint.monitor``, or with ``mode=test`` the test metric of that name. If the run had
        finished before, it is the recorded value. None if there is no such value, and on ranks other than 0.
    """
    if environment.launcher() is None:
        signals.end_at_once()  # also in an interactive step of Slurm
        # The server imports the modules of the ranks in the background, while this process imports torch.
        fork_server.start_server(*preload.modules(cfg))
    else:
        signals.listen()  # before the import of torch, which takes seconds
        temporary_directory.make()
    with no_garbage_collection():
        from syncbn.training.launch import job

    return job.run(cfg)
