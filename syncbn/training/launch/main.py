"""What ``train.py`` calls: a job under Hydra. Imports little, so that a mistyped setting is told at once."""

from omegaconf import DictConfig, OmegaConf

from syncbn.training import standard_streams
from syncbn.training.config import schema
from syncbn.training.distributed import environment, fork_server, signals, temporary_directory
from syncbn.training.launch import preload
from syncbn.training.run_directory import paths

standard_streams.accept_any_text()  # here: Hydra prints before main() is called
schema.register()
OmegaConf.register_new_resolver("run_dir", paths.run_dir)
OmegaConf.register_new_resolver("sweep_dir", paths.sweep_dir, use_cache=True)


def main(cfg: DictConfig) -> float | None:
    """Runs one job under Hydra. A setting that cannot work, or a rank that fails, ends it with one line and code 1.

    ``HYDRA_FULL_ERROR=1`` gives the traceback instead.

    Returns:
        The best value of the metric that ``callbacks.checkpoint.monitor`` names, for a sweeper that searches; the
        recorded one if the run had finished before. None if there is no such value, and on ranks other than 0.
    """
    if environment.launcher() is None:
        signals.end_at_once()  # also in an interactive step of Slurm
        # It imports what ranks need, while this process imports torch.
        fork_server.start_server(*preload.modules(cfg))
    else:
        signals.listen()  # before imports, which take seconds
        temporary_directory.make()
    from syncbn.training.launch import job

    return job.run(cfg)
