"""Checks on every rank, before training, that the launcher, the run directory and the precision work.

Settings are checked earlier (:func:`syncbn.training.config.settle.settle`). These checks need the rank's own process.
"""

import json
import os

import torch

from syncbn.training import program
from syncbn.training.atomic_write import unlinked
from syncbn.training.config.plan import Plan
from syncbn.training.distributed import store, unresponsive_ranks
from syncbn.training.errors import AgreedError, SettingError

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check(plan: Plan) -> None:
    """Checks this rank's launcher, run directory and precision; the error of one rank is raised on all ranks.

    Raises:
        SettingError: the launcher has not set the environment variables of a rank.
        AgreedError: for the first check that fails on any rank.
    """
    missing = [name for name in LAUNCHED if name not in os.environ]
    if missing:
        hint = f"{', '.join(missing)} not set; start with {program.name()}, torchrun or srun"
        raise SettingError("launcher", hint=hint)
    world = int(os.environ["WORLD_SIZE"])
    if world != plan.world_size:
        hint = f"on each of trainer.num_nodes={plan.num_nodes} nodes, these are {plan.world_size} ranks, "
        hint += f"but the launcher started {world}; make them agree"
        raise AgreedError("trainer.devices", plan.devices, hint)
    unresponsive_ranks.register_host()
    for error in map(json.loads, store.gathered("preflight", json.dumps(_error(plan)), store.START)):
        if error is not None:
            raise AgreedError(*error)


def _error(plan: Plan) -> tuple[str, str, str] | None:
    """The setting that does not work on this rank, its value and a hint; None if all work."""
    run_dir = plan.run_dir
    kept = run_dir / "checkpoints"
    for directory in (run_dir, kept) if kept.is_dir() else (run_dir,):
        draft = directory / f".rank-{os.environ['RANK']}"
        try:
            unlinked(draft).write_text("", encoding="utf-8")
            draft.unlink()
        except OSError as error:
            where = "there" if directory == run_dir else f"in {directory}"
            hint = f"rank {os.environ['RANK']} cannot write {where} ({error.strerror}); all ranks must"
            return ("hydra.run.dir", str(run_dir), hint)
    setting, precision = "trainer.precision", str(plan.cfg.trainer.get("precision") or "32-true")
    if plan.accelerator == "cpu" and precision.startswith("16"):
        return (setting, precision, "float16 needs a GPU; on the CPU use 32-true, bf16-mixed or 64-true")
    if plan.accelerator == "gpu" and precision.startswith("bf16") and not torch.cuda.is_bf16_supported():
        return (setting, precision, "this GPU has no bfloat16; use 16-mixed or 32-true")
    return None
