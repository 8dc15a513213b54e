"""What ``train.py`` calls: a job under Hydra. Imports little, so that a mistyped setting is told at once."""

from omegaconf import DictConfig, OmegaConf

from syncbn.training import identity, ranks, schema

schema.register()
OmegaConf.register_new_resolver("run_dir", identity.run_dir)


def main(cfg: DictConfig) -> None:
    """Runs one job under Hydra. A setting that cannot work, or a rank that fails, ends it with one line and code 1.

    ``HYDRA_FULL_ERROR=1`` gives the traceback instead.
    """
    if not identity.under_torchrun():
        ranks.start_server("syncbn.training.preload")  # it imports what ranks need, while this process imports torch
    from syncbn.training import job

    job.run(cfg)
