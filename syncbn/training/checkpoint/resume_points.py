"""Saves checkpoints from which a run resumes exactly, and stops all ranks at the same step after a signal.

Lightning restores weights, optimizer, scheduler and counters. This module adds what it leaves out: the random number
generators of every rank, the position in the data, and the metrics accumulated so far in the epoch. A *resume point* is
the state between two batches, or between two epochs, after everything of the first one has been logged.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import CombinedLoader
from torch.distributed.checkpoint.stateful import Stateful

from syncbn.nn import rng
from syncbn.nn.conversion.convert import batch_norms
from syncbn.training import lightning_internals
from syncbn.training.callbacks.non_finite import NonFiniteError, first_non_finite_parameter, stopper
from syncbn.training.checkpoint import best_checkpoints, files
from syncbn.training.checkpoint.training_state import (
    State,
    fold,
    merge_metrics,
    merge_results,
    metrics_state,
    on_cpu,
    running_statistics,
    set_metrics,
)
from syncbn.training.console import print_line
from syncbn.training.distributed import signals
from syncbn.training.distributed.signals import Stopped
from syncbn.training.evaluation.precise_statistics import FROZEN
from syncbn.training.loggers import run_loggers

KEY = "resume"  # in the checkpoint


class ResumePoints(pl.Callback):
    """Saves ``step-*.ckpt`` after each epoch and at intervals within it, and links ``last.ckpt`` to the newest.

    A signal that reached any rank stops the run on all ranks here, with a checkpoint
    (:class:`~syncbn.training.distributed.signals.Stopped`). The ranks agree on that by an all-reduce of two numbers per
    step. Put this callback before all callbacks that log.

    Args:
        directory: for the files.
        every_n_steps: optimizer steps between two resume points within an epoch; None for none.
        every_n_minutes: minutes between two resume points within an epoch, by rank 0's clock; None for none.
        keep: how many files to keep; with two, an older one remains if the newest is damaged.
        global_batch_size: samples per step over all ranks, stored in the checkpoint. A resume with another one would
            not be the same training.
        counted_in: the unit of a position in the middle of an epoch, stored in the checkpoint; see
            :attr:`syncbn.training.config.plan.Plan.position_unit`.
        own_buffers: save the running statistics of every rank; for norms whose ranks have different ones.
        timeout: of the collectives here.
        on_begin: called on rank 0 when all checks have passed, before training changes any file.
    """

    def __init__(
        self,
        directory: Path,
        *,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = 10,
        keep: int = 2,
        global_batch_size: int | None = None,
        counted_in: State | None = None,
        own_buffers: bool = False,
        timeout: timedelta = timedelta(minutes=10),
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory, self.keep, self.global_batch_size = directory, keep, global_batch_size
        self.every_n_steps, self.every_n_minutes, self.on_begin = every_n_steps, every_n_minutes, on_begin
        self.counted_in, self.own_buffers, self.timeout = counted_in, own_buffers, timeout
        self._optimizers: list[State] | None = None  # optimizer states of the checkpoint to resume from
        self._group: dist.ProcessGroup | None = None
        self._saved_at = time.monotonic()
        self._saved_step = 0
        self._stop = 0  # the signal that the ranks agreed on: its index in SIGNALS, from 1; 0 for none
        self._save = False  # a resume point is requested
        self._due = False  # it is requested, and the next batch boundary is between two optimizer steps
        self._point: State | None = None  # collected between two batches, written before the next one starts
        self._earlier: list[State] | None = None  # the states of the loaders one batch ago
        self._random: State | None = None  # of the random number generators, to restore when training resumes
        self._writing = False  # the checkpoint that Lightning is saving is ours
        self._frozen: list[str] | None = None  # batch norm layers in evaluation mode; None before the first batch
        self._loaded: State | None = None  # our part of the checkpoint to resume from; {} if it has none
        self._unlogged: State = {}  # values logged before the stop, not yet merged into Lightning's results

    # Agreeing on a stop, and saving

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning 2.6 has created the optimizers by now, and loads their states after this hook.
        if self._optimizers is not None and (why := files.other_optimizer(self._optimizers, trainer.optimizers)):
            raise files.OtherOptimizerError(why)
        self._make_group(trainer)
        if self._loaded is not None:
            best_checkpoints.forget_damaged(trainer)
        lightning_internals.call_before_fetch(trainer, lambda: self._before_fetch(trainer))

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._group is None:
            self._make_group(trainer)

    def _make_group(self, trainer: pl.Trainer) -> None:
        """Creates a gloo process group if the default one has another backend."""
        if trainer.world_size > 1 and dist.get_backend() != "gloo":
            # The flags are all-reduced on the CPU. Reading a flag from a GPU would wait for all queued kernels.
            self._group = dist.new_group(backend="gloo", timeout=self.timeout)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._frozen is None:
            self._frozen = [name for name, layer in batch_norms(pl_module) if not layer.training]
        self._add_unlogged(trainer)
        self._agree(trainer)
        # Another batch of this epoch follows, and no accumulated gradients wait for it.
        boundary = lightning_internals.another_batch_follows(trainer) and not lightning_internals.accumulates(trainer)
        self._due = bool(self._stop or self._save) and boundary

    def _before_fetch(self, trainer: pl.Trainer) -> None:
        """Collects a due resume point.

        All hooks of the previous batch have returned here, with the random numbers that they draw, and nothing of the
        next batch has begun.
        """
        self._restore_random()
        loaders: list[State] | None = None
        if trainer.num_training_batches == float("inf"):
            # For data without a length Lightning 2.6 fetches a batch before the current one has begun.
            loaders, self._earlier = self._earlier, _loaders(trainer)
        elif self._due:
            loaders = _loaders(trainer)
        if self._due and loaders is not None:
            self._due, self._point = False, {"random": rng.state(), "loaders": loaders}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._point is not None:
            self._write(trainer, epoch_is_over=False)
            self._stop_if_requested()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_random()
        self._earlier = self._frozen = None
        if trainer.current_epoch > 0:
            self._after_epoch(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._after_epoch(trainer)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._agree(trainer)
        self._stop_if_requested()

    def _after_epoch(self, trainer: pl.Trainer) -> None:
        self._point = {"random": rng.state(), "loaders": _loaders(trainer)}
        self._agree(trainer)
        self._write(trainer, epoch_is_over=True)
        self._stop_if_requested()

    def _agree(self, trainer: pl.Trainer) -> None:
        """All-reduces the requests to stop and to save. All ranks call it at the same step, so all act alike."""
        late = self.every_n_minutes is not None and time.monotonic() - self._saved_at > 60 * self.every_n_minutes
        flags = torch.tensor([signals.asked(), late], dtype=torch.int32)
        if trainer.world_size > 1:
            if trainer.global_rank > 0:
                flags[1] = 0
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        many = self.every_n_steps is not None and trainer.global_step - self._saved_step >= self.every_n_steps
        self._stop = int(flags[0])
        self._save = self._save or many or bool(flags[1])

    def _stop_if_requested(self) -> None:
        if self._stop:
            raise Stopped(signals.SIGNALS[self._stop - 1])

    def _write(self, trainer: pl.Trainer, *, epoch_is_over: bool) -> None:
        path = self.directory / f"step-{trainer.global_step:08d}.ckpt"
        # Not path.exists(): all ranks have to decide alike, and a network file system may show a file to some of them.
        if trainer.global_step in (0, self._saved_step):
            self._point = None
            return
        name = first_non_finite_parameter(trainer.lightning_module)
        diverged = None if name is None else f"{name} is not finite after step {trainer.global_step}: {self._kept()}"
        stops = stopper(trainer)
        if stops is not None and stops.stops_at(trainer, diverged):
            self._point = None  # a later resume would start from weights that are not finite
            return
        if diverged is not None:
            raise NonFiniteError(diverged)
        assert self._point is not None
        self._point |= self._gathered(trainer, self._point.pop("random")) | {"epoch_is_over": epoch_is_over}
        self._writing = True
        trainer.save_checkpoint(path, weights_only=False)  # calls on_save_checkpoint below
        self._point, self._save, self._writing = None, False, False
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        if trainer.is_global_zero:
            files.link(path, "last.ckpt")
            for old in files.points(self.directory)[: -self.keep]:
                old.unlink()

    def _kept(self) -> str:
        """For the error of weights that are not finite: which checkpoint remains."""
        points = files.points(self.directory)
        return f"this state is not saved, the last checkpoint is {points[-1].name}" if points else "it is not saved"

    def _gathered(self, trainer: pl.Trainer, random_state: State) -> State:
        """Gathers the state of all ranks for the checkpoint; complete on rank 0 only, which writes it."""
        mine = {"random": random_state, "metrics": metrics_state(trainer), "results": self._results(trainer)}
        if self.own_buffers:
            mine["buffers"] = {name: on_cpu(buffer) for name, buffer in running_statistics(trainer)}
        ranks: list[Any] | None = [mine]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size if trainer.global_rank == 0 else None
            dist.gather_object(mine, ranks, dst=0, group=self._group)
        about = {"global_batch_size": self.global_batch_size, "counted_in": self.counted_in}
        return {"world_size": trainer.world_size, "ranks": ranks, **about}

    def _results(self, trainer: pl.Trainer) -> State:
        """The values that ``self.log`` has accumulated in this epoch on this rank, except those that are Metrics."""
        found = dict(self._unlogged)
        for key, result in lightning_internals.epoch_results(trainer).items():
            if result.is_tensor and result.meta.on_epoch:
                fold = "max" if result.meta.is_max_reduction else "min" if result.meta.is_min_reduction else "add"
                found[key] = {"fold": fold, "states": on_cpu(result.metric_state)}
        return found

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: State) -> None:
        if self._frozen is not None:
            checkpoint[FROZEN] = self._frozen
        if not self._writing or self._point is None:  # another callback saves, for example ModelCheckpoint
            return
        point = dict(self._point)
        point["should_stop"] = trainer.should_stop and [trainer.max_epochs, trainer.max_steps]
        loops = checkpoint["loops"]["fit_loop"]
        batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
        states = point.pop("loaders")
        if point["epoch_is_over"]:
            states = [_next_epoch(state, epochs["current"]["processed"]) for state in states]
            epochs["current"]["ready"] = epochs["current"]["processed"]
            epochs["total"]["ready"] = epochs["total"]["processed"]
        else:  # Lightning has fetched the next batch and counted it as ready, but it has not started
            batches["current"]["ready"] = batches["current"]["completed"]
            batches["total"]["ready"] = batches["total"]["completed"]
            if not _resume_within_epoch(trainer):
                point["begins_anew"], states = True, []
                loops["state_dict"].pop("combined_loader", None)
                batches["current"] = dict.fromkeys(batches["current"], 0)
                point["ranks"] = [each | {"metrics": {}, "results": {}} for each in point["ranks"] or []]
        if states:
            loops["state_dict"]["combined_loader"] = states
        point["logged"] = run_loggers.position(trainer)
        checkpoint[KEY] = point

    # Resuming

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: State) -> None:
        self._loaded = checkpoint.get(KEY, {})
        self._optimizers = checkpoint.get("optimizer_states")
        limits = self._loaded.get("should_stop")
        if limits:  # early stopping, for example; it still holds unless the limits have changed
            trainer.should_stop = limits == [trainer.max_epochs, trainer.max_steps]
        best_checkpoints.relocate(trainer, self.directory, checkpoint.get("callbacks", {}))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        loaded = self._loaded
        if trainer.is_global_zero:
            self.on_begin()
        run_loggers.restore_position(trainer, (loaded or {}).get("logged", {"rows": 0}))
        if trainer.is_global_zero:
            self._set_aside_later(trainer.global_step)
        if loaded is None:
            return
        if not loaded:
            print_line("the checkpoint has no random states, metrics and position in the data: these start over")
            return
        if loaded.get("begins_anew"):
            print_line(
                "the data loaders have no state_dict and load_state_dict, so no epoch is resumed in the middle: epoch "
                f"{trainer.current_epoch + 1} starts over, with the weights learned so far"
            )
        lightning_internals.begin_whole_epoch(trainer, fetch_anew=loaded["epoch_is_over"])
        self._restore(trainer, loaded)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._add_unlogged(trainer)
        self._unlogged = {}

    def _set_aside_later(self, step: int) -> None:
        """Renames resume points of later steps, so that the next resume does not take one.

        They are damaged, or belong to a training that is abandoned because this resume started from an earlier step.
        """
        for path in files.points(self.directory):
            if files.step_of(path) > step:
                path.replace(path.with_name(f"aside-{path.name}"))

    def _restore(self, trainer: pl.Trainer, loaded: State) -> None:
        """Restores what each rank has saved; with another number of ranks, merges it on rank 0."""
        ranks, rank = loaded["ranks"], trainer.global_rank
        if loaded["world_size"] == trainer.world_size:
            self._random = ranks[rank]["random"]
            set_metrics(trainer, ranks[rank]["metrics"])
            self._unlogged = ranks[rank]["results"]
            for name, buffer in running_statistics(trainer):
                if name in ranks[rank].get("buffers", {}):
                    buffer.copy_(ranks[rank]["buffers"][name])
            return
        # Weights, optimizer and data order do not depend on the number of ranks. Random numbers (dropout) do: each rank
        # has its own generators. The step is added so that the random numbers of the first steps are not repeated.
        torch.manual_seed(torch.initial_seed() + trainer.global_step)
        if rank == 0:
            set_metrics(trainer, ranks[0]["metrics"])
            for other in ranks[1:]:
                merge_metrics(trainer, other["metrics"])
            self._unlogged = merge_results([each["results"] for each in ranks])

    def _restore_random(self) -> None:
        """Restores the random number generators, as late as possible.

        Other callbacks may draw random numbers when training begins. The saved state is from after these draws.
        """
        if self._random is not None:
            rng.put_back(self._random)
            self._random = None

    def _add_unlogged(self, trainer: pl.Trainer) -> None:
        """Merges the values that ``self.log`` had accumulated before the stop into Lightning's results.

        Lightning creates a result when a value is first logged, so this is called after each batch.
        """
        results = lightning_internals.epoch_results(trainer)
        for key in self._unlogged.keys() & results.keys():
            before, now = self._unlogged.pop(key), results[key]
            for name in now.metric_state.keys() & before["states"].keys():
                value = before["states"][name]
                setattr(now, name, fold(before["fold"], getattr(now, name), value.to(now.value.device)))


def _flat_loaders(trainer: pl.Trainer) -> list[Any]:
    """The training loaders in the order in which Lightning 2.6 saves and loads their states."""
    loaders = trainer.train_dataloader
    return [] if loaders is None else CombinedLoader(loaders).flattened


def _loaders(trainer: pl.Trainer) -> list[State]:
    """The states of the training loaders that have ``state_dict`` and ``load_state_dict``."""
    return [each.state_dict() for each in _flat_loaders(trainer) if isinstance(each, Stateful)]


def _resume_within_epoch(trainer: pl.Trainer) -> bool:
    """Whether all loaders can resume in the middle of an epoch."""
    loaders = trainer.train_dataloader
    return loaders is not None and all(isinstance(each, Stateful) for each in _flat_loaders(trainer))


def _next_epoch(state: State, epoch: int) -> State:
    """The state of our loader at the start of this epoch.

    With ``limit_train_batches`` the loader was left before its end, so its own state is still in the previous epoch.
    The states of third-party loaders are not changed.
    """
    return {"epoch": epoch, "batch": 0} if state.keys() == {"epoch", "batch"} else state
