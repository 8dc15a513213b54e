"""Test-time statistics in Lightning and in the program, and runs that test alone."""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import syncbn
from syncbn.study.compare.runs import run_reader
from syncbn.study.compare.runs.settings import settings
from syncbn.training import AdaptStatistics, SettingError
from syncbn.training.checkpoint import continue_run
from syncbn.training.config.plan import Plan
from syncbn.training.data.loaders import exact_loader
from syncbn.training.errors import AgreedError
from syncbn.training.run_directory import record
from tests.support.ranks import Ranks
from tests.support.refuses import refuses
from tests.training.support.plain_lightning import QUIET, quiet_trainer
from tests.training.support.settled_config import settled
from tests.training.support.train_command import train

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)) * 2 + 1


class Lit(pl.LightningModule):
    """Keeps what it is asked for, by stage."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(3))
        self.seen: dict[str, list[Tensor]] = {"validation": [], "test": [], "predict": []}
        self.broken = False

    def _step(self, stage: str, batch: list[Tensor]) -> None:
        self.seen[stage].append(self.net(batch[0]).clone())
        if self.broken:
            raise RuntimeError("broken")

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._step("validation", batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._step("test", batch)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> int:
        self._step("predict", batch)
        return 0


@pytest.mark.parametrize("streaming", [False, True])
@QUIET
def test_in_force_while_it_tests_and_predicts(streaming: bool) -> None:
    module, loader = Lit(), DataLoader(TensorDataset(X), 4)
    source = [module.eval().net(x) for x in X.split(4)]
    with syncbn.adapt(module.net, prior=2, streaming=streaming):
        adapted = [module.net(x) for x in X.split(4)]
    made = quiet_trainer(AdaptStatistics(2, streaming))
    for _ in range(2):  # a test begins anew, whatever came before
        made.test(module, loader, verbose=False)
        made.predict(module, loader)
        made.validate(module, loader, verbose=False)
    module.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        made.test(module, loader, verbose=False)
    expected = {"validation": source * 2, "test": [*adapted * 2, adapted[0]], "predict": adapted * 2}
    for stage, outputs in module.seen.items():
        assert len(outputs) == len(expected[stage])
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected[stage], strict=True)), stage
    assert all(torch.equal(module.net(x), y) for x, y in zip(X.split(4), source, strict=True))


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (AdaptStatistics(only="nothing"), "adapt: there is no batch norm layer"),
        (AdaptStatistics(-1), "prior=-1: use a number of samples"),
    ],
)
def test_what_cannot_be_adapted_is_said_before_anything_is_done(callback: AdaptStatistics, words: str) -> None:
    module = Lit()
    with refuses("AdaptStatistics", None, words, kind=AgreedError):
        quiet_trainer(callback).test(module, DataLoader(TensorDataset(X), 4))
    assert not module.seen["test"]


@QUIET
def test_a_test_is_dealt_at_random_and_a_prediction_in_order() -> None:
    """Of data that are sorted by class each batch has others than one of them."""
    module, x = Lit(), torch.arange(12.0).expand(3, 12).T
    loader = exact_loader(TensorDataset(x), 4)
    made = quiet_trainer(AdaptStatistics(1e12))  # in effect as they come
    for _ in range(2):
        made.test(module, loader, verbose=False)
    made.predict(module, loader)
    tested, predicted = (torch.cat(module.seen[stage])[:, 0].round().int().tolist() for stage in ("test", "predict"))
    assert predicted == list(range(12))
    assert tested[:12] == tested[12:] != predicted
    assert sorted(tested[:12]) == predicted
    assert all(max(batch) - min(batch) > 4 for batch in (tested[:4], tested[4:8], tested[8:12]))


class Late(Lit):
    """Builds its layers where Lightning wants large ones built."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential()

    def configure_model(self) -> None:
        if not len(self.net):
            self.net.append(nn.BatchNorm1d(3))


@QUIET
def test_layers_may_be_built_late() -> None:
    module, early = Late(), Lit()
    for each in (module, early):
        quiet_trainer(AdaptStatistics(2)).test(each, DataLoader(TensorDataset(X), 4), verbose=False)
    assert all(map(torch.equal, module.seen["test"], early.seen["test"]))
    with refuses("AdaptStatistics", None, "adapt: there is no batch norm layer", kind=AgreedError):
        AdaptStatistics(only="nothing").on_fit_start(quiet_trainer(), module)


def unequal(rank: int, world_size: int, group: object, numbers: list[float]) -> tuple[str, str] | None:
    """What is refused on a rank that has so many batches."""
    made: Any = SimpleNamespace(num_predict_batches=[1, numbers[rank]])
    callback = AdaptStatistics(group=group)
    try:
        callback.on_predict_start(made, Lit())
    except AgreedError as error:
        return error.setting, error.hint
    callback.on_predict_end(made, Lit())
    return None


def test_ranks_that_would_wait_for_each_other_are_told_so(ranks: Ranks) -> None:
    line = "ranks have 2 to 3 batches, but adapt together in each; use loaders with the same number "
    for setting, hint in ranks.run(unequal, "world", [3, 2], world_size=2):
        assert setting == "AdaptStatistics"
        assert hint.startswith(line)
    assert ranks.run(unequal, 1, [3, 2], world_size=2) == [None, None]
    assert ranks.run(unequal, "world", [math.inf, math.inf], world_size=2) == [None, None]


BASE = ["model=mlp", "logger=csv", "model.width=16", "data.global_batch_size=72"]


def test_a_test_alone_gives_what_the_test_after_training_gave(tmp_path: Path) -> None:
    """Of 360 images a rank has 36 a batch at most: the batches are the same in one process and in two."""
    quick = ["trainer.max_epochs=1", "+trainer.limit_train_batches=8", "run.id=base"]
    quick += ["model.activation=tanh", "data.split_seed=1", "seed=3"]
    base = train(tmp_path, *BASE, *quick, "adapt=batch", "adapt.prior=8")
    assert base.code == 0, base.err
    alone = ["logger=csv", "data.global_batch_size=72", "mode=test", "ckpt_path=outputs/base/checkpoints/best.ckpt"]
    tests = []
    for more in (["adapt=batch"], ["adapt=batch", "simulate=2"], ["simulate=2", "precise_batches=4"]):
        run = train(tmp_path, *alone, *more, *["adapt.prior=8"] * ("adapt=batch" in more), f"run.id={len(tests)}")
        assert run.code == 0, run.err
        assert run.err == ""
        assert run.directory == tmp_path / f"outputs/{len(tests)}"
        assert re.search(
            r"test accuracy .*\n.*\n( +precise .*\n)?( +peak memory .*\n)? +checkpoint tested "
            r"+outputs/base/checkpoints/best.ckpt\n",
            run.out,
        )
        tests.append(run.json("result"))
    assert run.json("result").keys() == {"test", "precise", "memory"}
    same, simulated, plain = (each["test"] for each in tests)
    assert same == base.json("result")["test"]
    assert simulated["test/acc"] == same["test/acc"]
    assert simulated["test/loss"] == pytest.approx(same["test/loss"], rel=1e-5)
    assert abs(plain["test/loss"] - same["test/loss"]) > 0.01
    again = train(tmp_path, *alone, "simulate=2", "precise_batches=4", "run.id=2")
    assert "run 2 has finished before" in again.out
    other = train(tmp_path, *alone, "model.width=8", "trainer.devices=1")
    assert other.code == 1
    line = (
        r"error: ckpt_path=\S*/base/checkpoints/best\.ckpt: its run has model\.width=16, and its "
        r"test has to have the same; leave out what differs\n"
    )
    assert re.fullmatch(line, other.err), other.err


BAD = {
    "mode=tset": r"mode=tset: use train, test or find_lr",
    "mode=test": r"ckpt_path=null: mode=test tests a checkpoint; use ckpt_path=outputs/RUN/checkpoints/best\.ckpt",
    "mode=test ckpt_path=a.ckpt test=false": r"test=false: mode=test leaves nothing else to do; use test=true",
    "adapt=batch norm=none": r"adapt: norm=none leaves no batch norm to adapt; use norm=sync or local, or adapt=null",
    "adapt=batch test=false": r"adapt: test=false leaves no test to adapt in; use test=true, or adapt=null",
    "adapt=batch adapt.prior=-1": r"adapt\.prior=-1: use a number, 0 or more",
    "mode=test ckpt_path=a.ckpt target=0.9": r"target=0\.9: mode=test trains nothing that could reach it; use .*=null",
    "adapt=batch precise_batches=8": r"adapt: precise_batches=8 repeats .*; use precise_batches=0, or adapt=null",
    "adapt=batch fit=true": r"adapt: fit=true repeats the test .* would hide; use fit=false, or adapt=null",
    "adapt=batch +adapt.group=3": r"adapt\.group=3: does not divide the world size 2; sizes that do: \[1, 2\]",
    "adapt=batch +adapt.group=all": r'adapt\.group=all: is not known; use "world", .*',
    "adapt=batch +adapt.foo=1": r"adapt\.foo: there is no such setting; use prior, streaming, group, only",
    "adapt=stream adapt.streaming=2": r"adapt\.streaming=2: use true or false",
}


@pytest.mark.parametrize("overrides", BAD)
def test_one_line_names_the_setting_and_what_would_work(overrides: str) -> None:
    with pytest.raises(SettingError, match=f"^{BAD[overrides]}$"):
        settled(*overrides.split())


def a_test(where: Path, *overrides: str) -> Any:
    path = where / "base" / "best.ckpt"
    path.parent.mkdir(exist_ok=True)
    torch.save({"state_dict": {}}, path)
    return settled("mode=test", f"ckpt_path={path}", "run.id=a", *overrides)


def begin(cfg: Any, run_dir: Path, status: str) -> None:
    assert continue_run.continued(replace(cfg, run_dir=run_dir), lambda line: None)
    record.begin(replace(cfg, run_dir=run_dir), "a", [])
    record.end(run_dir, status)


def test_a_test_is_done_once_and_anew_where_it_was_killed(tmp_path: Path) -> None:
    run_dir, said = tmp_path / "a", []
    begin(a_test(tmp_path, "adapt=batch"), run_dir, "running")
    assert continue_run.continued(replace(a_test(tmp_path, "adapt=batch"), run_dir=run_dir), said.append)
    assert said == ["this run was killed before; it starts over"]
    record.end(run_dir, "finished")
    assert not continue_run.continued(replace(a_test(tmp_path, "adapt=batch"), run_dir=run_dir), said.append)
    with pytest.raises(SettingError, match=r"run\.id=a: .*\(adapt\.name=batch -> None, .*\); use another id"):
        continue_run.continued(replace(a_test(tmp_path), run_dir=run_dir), said.append)
    (tmp_path / "base").rename(tmp_path / "moved")
    other = settled("mode=test", f"ckpt_path={tmp_path / 'moved/best.ckpt'}", "run.id=a", "adapt=batch")
    with pytest.raises(SettingError, match=r"run\.id=a: .*\(ckpt_path=\S*/base/best\.ckpt -> \S*/moved/best\.ckpt\)"):
        continue_run.continued(replace(other, run_dir=run_dir), said.append)


@pytest.mark.parametrize("status", ["finished", "running"])
def test_a_run_neither_trains_after_a_test_nor_tests_after_a_training(tmp_path: Path, status: str) -> None:
    begin(a_test(tmp_path), tmp_path / "a", status)
    with pytest.raises(SettingError, match=r"run\.id=a: .*mode=test -> train.*; use another id"):
        continue_run.continued(replace(settled("run.id=a"), run_dir=tmp_path / "a"), lambda line: None)
    begin(settled("run.id=b"), tmp_path / "b", status)
    with pytest.raises(SettingError, match=r"run\.id=b: .*mode=train -> test.*; use another id"):
        continue_run.continued(replace(a_test(tmp_path, "run.id=b"), run_dir=tmp_path / "b"), lambda line: None)


def test_what_is_tested_need_be_no_resume_point(tmp_path: Path) -> None:
    cfg = a_test(tmp_path)
    (tmp_path / "base/best.ckpt").write_text("no", encoding="utf-8")
    with pytest.raises(SettingError, match=r"best\.ckpt: no checkpoint of a training run can be read from it"):
        continue_run.continued(replace(cfg, run_dir=tmp_path / "a"), lambda line: None)


def test_a_comparison_pairs_tests_by_seed_whatever_checkpoint_they_are_of(tmp_path: Path) -> None:
    found = []
    for seed, adapt in enumerate(("none", "batch")):
        where = tmp_path / str(seed)
        where.mkdir()
        cfg = a_test(where, f"adapt={adapt}", f"seed={seed}")
        begin(cfg, where / "a", "finished")
        record.write(where / "a", "run", record.read(where / "a", "run") | {"begun_from": cfg.checkpoint})
        found += [settings(run) for run in run_reader.read([where / "a"])]
    assert found[0]["mode"] == "test"
    differ = {name for name in found[0].keys() | found[1].keys() if found[0].get(name) != found[1].get(name)}
    assert differ == {"adapt.name", "adapt.prior", "adapt.streaming"}


def test_a_training_run_is_as_it_was_before_there_were_modes(tmp_path: Path) -> None:
    begin(settled(), tmp_path / "a", "finished")
    before = OmegaConf.load(tmp_path / "a/config.yaml")
    (now,) = run_reader.read([tmp_path / "a"])
    del before.mode, before.adapt
    OmegaConf.save(before, tmp_path / "a/config.yaml")
    (then,) = run_reader.read([tmp_path / "a"])
    assert settings(now) == settings(then)
    assert Plan.of(before, tmp_path).world_size == 2
