"""The private parts of Lightning are there, and mean what they did in Lightning 2.6."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from syncbn.training import lightning_internals
from syncbn.training.checkpoint import resume_points
from syncbn.training.data.loaders import train_loader
from tests.support.private_names import private_names

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*treespec",
    "ignore:.*LeafSpec",
    "ignore:.*is smaller than the logging interval",
    "ignore:.*but have no `val_dataloader`",
)

OWNERS = {
    "_batches_that_stepped": "trainer.fit_loop.epoch_loop",
    "_should_accumulate": "trainer.fit_loop.epoch_loop",
    "_should_check_val_fx": "trainer.fit_loop.epoch_loop",
    "_is_training_done": "trainer.fit_loop.epoch_loop",
    "_on_before_fetch": "trainer.fit_loop.epoch_loop",
    "_results": "trainer.fit_loop.epoch_loop",
    "_broadcast_sigterm_tensor": "trainer.fit_loop.epoch_loop",
    "_data_fetcher": "trainer.fit_loop",
    "_restarting": "trainer.fit_loop",
    "_resuming_from_checkpoint": "trainer.fit_loop",
    "_signal_connector": "trainer",
    "register_signal_handlers": "trainer._signal_connector",
    "_should_save_on_train_epoch_end": "checkpoint",
    "_layer_sync": "strategy",
}
REPLACED = {  # by their names in strings
    "_on_before_fetch",
    "_restarting",
    "_resuming_from_checkpoint",
    "_broadcast_sigterm_tensor",
    "register_signal_handlers",
}


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        yield from torch.ones(4, 1)


class Recorder(pl.Callback):
    """Calls a function at the end of each batch and keeps the answers."""

    def __init__(self, ask: Any) -> None:
        self.ask, self.answers = ask, list[Any]()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.answers.append(self.ask(trainer))


def a_trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False} | options
    return pl.Trainer(
        callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False, barebones=False, **options
    )


def asked(ask: Any, data: Any = None, **options: Any) -> list[Any]:
    """What ``ask`` returned at the end of each of four batches."""
    recorder = Recorder(ask)
    a_trainer(recorder, **options).fit(Net(), DataLoader(torch.ones(4, 1) if data is None else data, batch_size=1))
    return recorder.answers


@cache
def attributes() -> dict[str, set[str]]:
    """The attributes that each owner has in the midst of training."""

    def look(trainer: Any) -> dict[str, set[str]]:
        owners = {"trainer": trainer, "checkpoint": ModelCheckpoint(), "strategy": DDPStrategy()}
        return {each: set(dir(eval(each, owners))) for each in OWNERS.values()}

    return asked(look, limit_train_batches=1)[0]


@pytest.mark.parametrize("name", OWNERS)
def test_lightning_has_the_attribute(name: str) -> None:
    assert name in attributes()[OWNERS[name]], name


def test_every_private_name_in_the_module_has_an_owner() -> None:
    used = private_names(Path(lightning_internals.__file__)) - {"_replace"}
    assert used | REPLACED == OWNERS.keys()


def test_the_logged_step_is_that_of_the_batch_that_ends() -> None:
    step = partial(asked, lightning_internals.logged_step)
    assert (step(), step(accumulate_grad_batches=2)) == ([0, 1, 2, 3], [0, 0, 1, 1])


def test_a_step_of_several_batches_is_reported_until_its_last() -> None:
    accumulates = asked(lightning_internals.accumulates, accumulate_grad_batches=3)
    assert accumulates == [True, True, False, False]  # the last batch of an epoch ends a step


def test_another_batch_follows_unless_the_epoch_ends_or_a_validation_comes() -> None:
    follows = partial(asked, lightning_internals.another_batch_follows)
    assert follows() == [True, True, True, False]
    assert follows(max_steps=2, max_epochs=-1) == [True, False]

    recorder = Recorder(lightning_internals.another_batch_follows)
    data = DataLoader(torch.ones(4, 1))
    a_trainer(recorder, val_check_interval=2, num_sanity_val_steps=0).fit(Net(), data, data)
    assert recorder.answers == [True, False, True, False]


@pytest.mark.parametrize(
    ("data", "options", "ahead"),
    [(None, {}, False), (Stream(), {}, True), (Stream(), {"limit_train_batches": 3}, False)],
)
def test_data_without_a_length_are_fetched_ahead(data: Any, options: dict[str, Any], ahead: bool) -> None:
    """The public number of batches shows it (syncbn.training.checkpoint.resume_points)."""

    def ask(trainer: Any) -> tuple[bool, bool]:
        return trainer.num_training_batches == float("inf"), trainer.fit_loop._data_fetcher.length is None

    assert set(asked(ask, data, **options)) == {(ahead, ahead)}


class Order(pl.Callback):
    """Notes the order of hooks, of fetches, and of the calls before them."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_fit_start(self, trainer: pl.Trainer, *_: Any) -> None:
        lightning_internals.call_before_fetch(trainer, lambda: self.events.append("before"))

    def on_train_batch_start(self, *_: Any) -> None:
        self.events.append("start")

    def on_train_batch_end(self, *_: Any) -> None:
        self.events.append("end")


def test_the_call_before_a_fetch_comes_after_all_hooks_of_a_batch() -> None:
    order = Order()

    class Data(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Tensor:
            order.events.append("fetch")
            return torch.ones(1)

    net = Net()
    net.on_train_batch_end = lambda *_: order.events.append("last hook")  # type: ignore[method-assign]
    a_trainer(order).fit(net, DataLoader(Data()))
    assert order.events == ["before", "fetch", "start", "end", "last hook"] * 2


def test_results_of_an_epoch_accumulate() -> None:
    def ask(trainer: pl.Trainer) -> tuple[str, int]:
        ((name, result),) = lightning_internals.epoch_results(trainer).items()
        assert (result.is_tensor, result.meta.on_epoch) == (True, True)
        assert result.metric_state.keys() == {"value", "cumulated_batch_size"}
        return name, int(result.cumulated_batch_size)

    assert asked(ask) == [("training_step.loss", count) for count in (1, 2, 3, 4)]


@pytest.mark.parametrize("fetch_anew", [False, True])
def test_flags_of_a_resume_are_taken_back(fetch_anew: bool) -> None:
    loop = (trainer := a_trainer()).fit_loop
    loop.load_state_dict(loop.state_dict())
    loop._restarting = loop.epoch_loop.restarting = True
    lightning_internals.begin_whole_epoch(trainer, fetch_anew=fetch_anew)
    assert (loop._restarting, loop.epoch_loop.restarting) == (False, not fetch_anew)
    assert loop.is_resuming is not fetch_anew


def test_a_checkpoint_saves_at_an_epochs_end_where_that_was_asked_or_nothing_validates() -> None:
    def ask(trainer: pl.Trainer) -> list[bool]:
        each = [ModelCheckpoint(save_on_train_epoch_end=when) for when in (True, False, None)]
        return [lightning_internals.saves_at_epoch_end(checkpoint, trainer) for checkpoint in each]

    assert asked(ask, limit_train_batches=1) == [[True, False, True]]


def test_the_plugin_that_synchronizes_layers_is_found() -> None:
    plugin = TorchSyncBatchNorm()
    assert lightning_internals.layer_sync(a_trainer(strategy="ddp", devices=1, plugins=[plugin])) is plugin
    assert lightning_internals.layer_sync(a_trainer(strategy="ddp", devices=1)) is None
    assert lightning_internals.layer_sync(a_trainer()) is None


def test_lightning_handles_no_signal_and_sends_nothing_about_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    handlers = partial(asked, lambda trainer: signal.getsignal(signal.SIGTERM), limit_train_batches=1)
    before = signal.getsignal(signal.SIGTERM)
    assert handlers() != [before]
    recorder, broadcasts = Recorder(lambda trainer: signal.getsignal(signal.SIGTERM)), list[Tensor]()
    trainer = a_trainer(recorder, limit_train_batches=1)
    lightning_internals.leave_signals_alone(trainer)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda x, src: broadcasts.append(x))
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    trainer.fit(Net(), DataLoader(torch.ones(4, 1)))
    assert (recorder.answers, broadcasts) == ([before], [])


@pytest.mark.parametrize("several", [False, True])
def test_states_of_loaders_are_those_that_lightning_saves(several: bool) -> None:
    trainer: Any = a_trainer()
    assert (resume_points._loaders(trainer), resume_points._resume_within_epoch(trainer)) == ([], False)
    ours, other = (train_loader(TensorDataset(torch.ones(8, 1)), 2, seed=seed) for seed in (1, 2))
    loaders = {"a": [ours, DataLoader(torch.ones(4, 1))], "b": other} if several else ours
    trainer.fit_loop._combined_loader = CombinedLoader(loaders, "min_size")
    next(iter(ours))
    assert [state["batch"] for state in resume_points._loaders(trainer)] == ([1, 0] if several else [1])
    assert resume_points._loaders(trainer) == trainer.fit_loop._combined_loader._state_dicts()
    assert resume_points._resume_within_epoch(trainer) is not several


def test_a_method_that_is_gone_is_reported_by_its_name() -> None:
    with pytest.raises(AttributeError, match="_gone"):
        lightning_internals._replace(a_trainer(), "_gone", None)
