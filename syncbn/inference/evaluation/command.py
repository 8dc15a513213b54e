"""The start of ``syncbn evaluate``: sorts its arguments, and has Hydra compose the settings of all tests."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from syncbn.inference.evaluation import data_sets
from syncbn.inference.evaluation.options import Options
from syncbn.training.errors import SettingError

if TYPE_CHECKING:
    from omegaconf import DictConfig

# A test needs no W&B run; logger=wandb overrides it.
COMMON = ("mode=test", "logger=csv")
# Settings that all data sets have, so that they need not be repeated for each.
OF_ANY_DATA = tuple(f"data.{name}" for name in ("batch_size", "global_batch_size", "num_workers", "prefetch_factor"))


def evaluate(words: Sequence[str], options: Options) -> None:
    """Evaluates the runs among ``words`` with the settings among them; see :mod:`.evaluate`. Ends the program.

    Raises:
        SettingError: there is no run, or a setting belongs elsewhere.
    """
    runs, settings = sorted_out(words)
    if options.out is not None and options.out.is_dir():
        raise SettingError("--out", options.out, "this is a directory; name a file in it")
    if options.out is not None and not options.out.parent.is_dir():
        hint = f"there is no directory {options.out.parent}; make it, or use another"
        raise SettingError("--out", options.out, hint)
    from syncbn.training import import_paths, torchvision_internals
    from syncbn.training.config.conf_directory import conf_directory
    from syncbn.training.run_directory.paths import new_id

    root = options.directory or Path("outputs") / f"evaluate-{new_id()}"
    own = [] if options.config_dir is None else ["--config-dir", str(options.config_dir)]
    sys.argv = [sys.argv[0], *own, *COMMON, *settings, f"hydra.run.dir={data_sets.quoted(root)}"]
    import_paths.add(sys.argv[1:])
    torchvision_internals.allow_missing_operators()
    import syncbn.training.launch.main  # noqa: F401  # registers the types and names that conf/ uses
    from syncbn.training.composition.run_hydra import run_hydra

    def job(cfg: "DictConfig") -> None:
        from syncbn.training.launch import preload
        from syncbn.training.processes import fork_server
        from syncbn.training.processes.quick_imports import no_garbage_collection

        fork_server.start_server(*preload.modules(cfg))
        with no_garbage_collection():
            from syncbn.inference.evaluation import evaluate as under_hydra
        under_hydra.evaluate(cfg, runs, options)

    run_hydra(job, str(conf_directory()))


def sorted_out(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The runs and the settings among the arguments: what exists is a run, what has a = is a setting.

    Raises:
        SettingError: there is no run, or a setting is that of the data or names the run.
    """
    settings = [word for word in words if "=" in word and not Path(word).exists()]
    runs = list(dict.fromkeys(word for word in words if word not in settings))
    if not runs:
        raise SettingError("RUN", hint="name run directories or checkpoints, such as outputs/RUN")
    for each in settings:
        name, _, value = each.lstrip("+~").partition("=")
        if name.split(".")[0].split("@")[0] == "data" and name not in OF_ANY_DATA:
            raise SettingError(name, value, f"use --data={each}, once for each data set")
        if name in ("ckpt_path", "mode", "run.id") or name.startswith("hydra."):
            raise SettingError(name, value, "syncbn evaluate sets it; leave it out (--directory is for the results)")
    return runs, settings
