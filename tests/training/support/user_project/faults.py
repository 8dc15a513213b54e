"""Things that go wrong, and a training in which everything that can be forgotten matters: all by _target_."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from syncbn.training import Classifier, Digits
from syncbn.training.data.loaders import train_loader
from syncbn.training.distributed import signals


def kill_everything() -> None:
    """SIGKILL to every process of this session, so to the launcher too; this one last.

    They are stopped first: a rank that lives on for a moment would notice the launcher's death and tidy up.
    """
    ours, others = os.getsid(0), []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            session = int(stat.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[3])
        except OSError:
            continue
        pid = int(stat.parent.name)
        if session == ours and pid != os.getpid():
            others.append(pid)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in others:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(directory: Path) -> None:
    """Leaves no byte on the file system of ``directory``."""
    with (directory / "filler").open("wb", buffering=0) as file:
        for size in (2**16, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


GROUP = {"control_c": signal.SIGINT, "terminate_group": signal.SIGTERM, "hang_up": signal.SIGHUP}


class Fault(pl.Callback):
    """Does ``what`` once, on one rank: at a hook, in an epoch, at a batch of it; or so many seconds after the start.

    Args:
        what: see ``do``.
        once: a file that says that it has been done, and at which step.
        hook: on_train_batch_start, on_train_batch_end, on_validation_batch_end, on_train_epoch_end, on_test_batch_end,
            on_save_checkpoint, or "clock", where ``after`` counts.
    """

    def __init__(
        self, what: str, once: str, hook="on_train_batch_end", epoch=0, batch=0, rank=0, after: float = 0.0
    ) -> None:
        self.what, self.once, self.rank, self.after = what, Path(once), rank, after
        self.where = (hook, epoch, batch)

    def do(self, trainer) -> None:
        launcher = os.getsid(0)  # it leads the session
        if self.what == "kill_everything":
            kill_everything()
        elif self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.what == "kill_launcher":
            os.kill(launcher, signal.SIGKILL)
            time.sleep(60)
        elif self.what == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.what == "pause":
            time.sleep(4)
        elif self.what == "sleep":
            time.sleep(300)
        elif self.what == "sleep_until_terminated":  # torchrun waits half a minute for one that only notes a SIGTERM
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(300)
        elif self.what == "wait_for_warning":
            deadline = time.monotonic() + 150
            while not signals.asked() and time.monotonic() < deadline:
                time.sleep(0.1)
        elif self.what == "fail":
            raise ValueError("something of the user's")
        elif self.what in ("terminate", "interrupt"):
            os.kill(launcher, signal.SIGTERM if self.what == "terminate" else signal.SIGINT)
            time.sleep(1)  # so that it arrives in this step
        elif self.what in GROUP:  # what a terminal, timeout and others do: to the whole process group
            os.killpg(os.getpgid(launcher), GROUP[self.what])
            time.sleep(1)
        elif self.what == "lose_reader":  # of the output: it ends once it sees the file that has just been written
            time.sleep(1)
        elif self.what == "lose_reader_and_control_c":  # what a terminal does where the reader is tee
            time.sleep(1)
            os.killpg(os.getpgid(launcher), signal.SIGINT)
            time.sleep(1)
        elif self.what == "kill_server":  # which ranks are forked from
            os.kill(os.getppid(), signal.SIGKILL)
        elif self.what == "interrupt_twice":
            os.kill(launcher, signal.SIGINT)
            time.sleep(1)
            os.kill(launcher, signal.SIGINT)
            time.sleep(60)
        elif self.what == "terminate_and_sleep":
            os.kill(launcher, signal.SIGTERM)
            time.sleep(60)
        elif self.what == "warn_job":  # Slurm's job, that its time is up; twice
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # scancel inherits that; it is signalled too
            for _ in range(2):
                subprocess.run(["scancel", "--signal=USR1", os.environ["SLURM_JOB_ID"]], check=True)
                time.sleep(0.2)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        elif self.what == "fill_disk":
            fill_disk(Path(trainer.default_root_dir))
        else:
            raise AssertionError(self.what)

    def setup(self, trainer, pl_module, stage):
        if self.where[0] == "clock" and stage == "fit":
            threading.Thread(target=self._later, args=(trainer,), daemon=True).start()

    def _later(self, trainer):
        time.sleep(self.after)
        self._at(trainer, *self.where)

    def _at(self, trainer, hook, epoch, batch):
        if trainer.global_rank != self.rank or self.where != (hook, epoch, batch):
            return
        with suppress(FileExistsError):
            with self.once.open("x", encoding="utf-8") as file:  # of runs that come here at once, one
                file.write(str(trainer.global_step))
            self.do(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._at(trainer, "on_train_batch_start", trainer.current_epoch, batch_idx)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._at(trainer, "on_train_batch_end", trainer.current_epoch, batch_idx)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._at(trainer, "on_validation_batch_end", trainer.current_epoch, batch_idx)

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._at(trainer, "on_test_batch_end", 0, batch_idx)

    def on_train_epoch_end(self, trainer, pl_module):
        self._at(trainer, "on_train_epoch_end", trainer.current_epoch, 0)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self._at(trainer, "on_save_checkpoint", trainer.current_epoch, 0)


class Breaks(nn.Module):
    """A layer that raises in the middle of a forward pass, once: on rank 1, at its ``at``-th."""

    def __init__(self, at: int = 20) -> None:
        super().__init__()
        self.left = at

    def forward(self, x):
        self.left -= self.training
        if self.left == 0 and os.environ["RANK"] == "1":
            raise ValueError("a layer of the user's")
        return x


class Nested(pl.Callback):
    """Starts the run that it is part of once more, and writes down what that said.

    A rank has the arguments of its launcher. Both are forks of a process that has imported everything.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer, pl_module):
        from tests.support.warm_process import WarmProcess  # a process that is not warm does not find it

        if trainer.is_global_zero:
            ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE")
            environment = {name: value for name, value in os.environ.items() if name not in ranks}
            second = WarmProcess(
                [sys.executable, *sys.argv], env=environment, encoding="utf-8",
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            try:
                _, error = second.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                second.kill()
                raise
            self.path.write_text(f"{second.returncode} {error}", encoding="utf-8")


class WritePid(pl.Callback):
    """Notes the process of each rank."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_fit_start(self, trainer, pl_module):
        with Path(self.path).open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")


class Net(nn.Sequential):
    """Dropout: the random numbers of each rank matter."""

    def __init__(self, num_classes: int = 10, breaks: bool = False) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(64, 32),
            nn.BatchNorm1d(32),
            Breaks() if breaks else nn.Identity(),
            nn.Dropout(0.2),
            nn.ReLU(),
            nn.Linear(32, num_classes),
        )


class Lit(Classifier):
    """Accumulates plain numbers over the epoch, and steps a scheduler with each batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/plain_mean", loss.detach(), on_step=True, on_epoch=True, sync_dist=True)
        self.log("train/plain_max", loss.detach(), on_step=False, on_epoch=True, reduce_fx="max", sync_dist=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=1000)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Noisy(Dataset):
    """Augmentation by all three generators."""

    def __init__(self, dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i):
        x, y = self.dataset[i]
        return x + 0.1 * torch.randn(x.shape) + 0.1 * random.random() + 0.1 * np.random.rand(), y


class Data(Digits):
    def train_dataloader(self):
        return train_loader(Noisy(self.train), self.batch_size, seed=self.seed, num_workers=self.num_workers)


class Unequal(Digits):
    """Rank 1 has a batch more than rank 0."""

    def train_dataloader(self):
        rank = int(os.environ["RANK"])
        share = Subset(self.train, range(32 * (5 + rank)))
        return DataLoader(share, 32, sampler=DistributedSampler(share, num_replicas=1, rank=0))


class WriteStatistics(pl.Callback):
    """Each rank writes what its first batch norm layer has seen of the first batch."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            self.directory.mkdir(exist_ok=True)
            layer = next(m for m in pl_module.modules() if getattr(m, "running_mean", None) is not None)
            torch.save([layer.running_mean, layer.running_var], self.directory / f"{trainer.global_rank}.pt")
