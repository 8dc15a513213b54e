"""Metrics by name: over any number of ranks they are those of torchmetrics on all samples."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics.functional.classification as functional
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassF1Score

from syncbn.study.compare.runs.metric import choose
from syncbn.training.callbacks import monitored_metric
from syncbn.training.errors import AgreedError
from syncbn.training.metrics.evaluation_metrics import EvaluationMetrics
from syncbn.training.metrics.predictions import predictions, returns_nothing
from tests.support.ranks import Ranks
from tests.support.refuses import refuses
from tests.training.support.settled_config import composed, settled
from tests.training.support.train_command import train

EVERY = ["metrics=classification", "model.num_classes=10"]
SHARES = (0, 70, 71, 100)  # of 100 samples on three ranks: the second has one


class Module(pl.LightningModule):
    """A module that keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.logged: dict[str, Any] = {}

    def log(self, name: str, value: Any, **_: Any) -> None:  # type: ignore[override]
        self.logged[name] = value

    def validation_step(self, batch: Any) -> None:
        pass

    def test_step(self, batch: Any) -> Any:
        return batch


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(10, (100,), generator=generator)
    scores = 3 * torch.randn(100, 10, generator=generator)
    scores[torch.arange(100), target] += 3
    scores[:20] *= 40  # probabilities that are 0 and 1 in float32
    return scores, target


def build() -> EvaluationMetrics:
    return EvaluationMetrics({str(k): instantiate(v) for k, v in settled(*EVERY).cfg.metrics.items()})


def evaluate(callback: EvaluationMetrics, module: Module, scores: Tensor, target: Tensor) -> dict[str, float]:
    callback.setup(None, module, "fit")  # type: ignore[arg-type]
    for _ in range(2):  # the second validation begins anew
        callback.on_validation_epoch_start(None, module)  # type: ignore[arg-type]
        for part in range(0, len(target) + 1, 16):  # the last batch may be empty
            outputs = {"scores": scores[part : part + 16], "target": target[part : part + 16]}
            callback.on_validation_batch_end(None, module, outputs, None, 0)  # type: ignore[arg-type]
        callback.on_validation_epoch_end(None, module)  # type: ignore[arg-type]
    return {name: float(metric.compute()) for name, metric in module.logged.items()}


def on_a_rank(rank: int, world_size: int) -> tuple[dict[str, float], Tensor | None]:
    scores, target = samples()
    mine = slice(SHARES[rank], SHARES[rank + 1])
    callback = build()
    return evaluate(callback, Module(), scores[mine], target[mine]), callback.confusion


def expected() -> dict[str, float]:
    scores, target = samples()
    given = scores.double().softmax(1), target
    found = {
        "top5": functional.multiclass_accuracy(*given, num_classes=10, top_k=5, average="micro"),
        "f1": functional.multiclass_f1_score(*given, num_classes=10, average="macro"),
        "auroc": functional.multiclass_auroc(*given, num_classes=10, average="macro"),
        "calibration": functional.multiclass_calibration_error(*given, num_classes=10, n_bins=15, norm="l1"),
    }
    return {f"val/{name}": float(value) for name, value in found.items()}


def test_over_ranks_they_are_those_of_one_process_on_all_samples(ranks: Ranks) -> None:
    scores, target = samples()
    matrix = functional.multiclass_confusion_matrix(scores, target, num_classes=10)
    assert expected()["val/top5"] < 1
    for found, confusion in ranks.run(on_a_rank, world_size=3):
        assert found == pytest.approx(expected(), abs=1e-6)
        assert torch.equal(confusion, matrix)


def test_probabilities_keep_the_order_of_scores_that_are_far_apart() -> None:
    scores = torch.tensor([[200.0, 40.0, 50.0, 60.0]])
    found = predictions({"scores": scores, "target": torch.tensor([1])})
    assert found is not None
    assert found.given[0].argsort(descending=True).tolist() == [0, 3, 2, 1]
    assert scores.softmax(1)[0, 1] == scores.softmax(1)[0, 3] == 0  # in float32 they are lost


def test_what_a_step_may_return() -> None:
    labels, scores = torch.tensor([1, 0]), torch.rand(2, 3)
    assert predictions(None) is None
    assert predictions(torch.zeros(2)) is None
    assert predictions({"scores": scores}) is None
    assert predictions({"scores": torch.rand(2, 1), "target": labels}) is None  # one score is no class
    soft = predictions({"scores": scores, "target": torch.tensor([[0.1, 0.9, 0], [0.8, 0.1, 0.1]])})
    assert soft is not None
    assert soft.target.tolist() == [1, 0]
    other = predictions({"preds": torch.rand(2), "target": torch.rand(2)})
    assert other is not None
    assert other.scores is None


def test_scores_that_are_nan_give_numbers_or_nan_and_no_error() -> None:
    module = Module()
    evaluate(build(), module, torch.full((32, 10), float("nan")), torch.arange(32) % 10)
    assert set(module.logged) == set(expected())


def test_a_warning_of_a_metric_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    scores, _ = samples()
    evaluate(build(), Module(), scores, torch.zeros(100, dtype=torch.long))  # two validations, nine classes are missing
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("metrics.auroc: No positive")]
    assert len(lines) == 1


def test_a_module_without_predictions_is_refused_before_training_where_its_source_shows_it() -> None:
    callback, trainer = build(), SimpleNamespace(enable_validation=True)
    assert returns_nothing(Module(), "validation_step")
    assert not returns_nothing(Module(), "test_step")
    names = "top5,f1,auroc,calibration,confusion"
    with refuses("metrics", names, "validation_step of Module", '{"scores"', kind=AgreedError):
        callback.on_fit_start(trainer, Module())  # type: ignore[arg-type]
    with refuses("metrics", names, "test_step of Module", kind=AgreedError):
        callback.on_test_batch_end(trainer, Module(), None, None, 0)  # type: ignore[arg-type]


def test_metrics_of_the_users_own() -> None:
    callback, module = EvaluationMetrics({"mse": MeanSquaredError()}), Module()
    callback.setup(None, module, "fit")  # type: ignore[arg-type]
    callback.on_test_epoch_start(None, module)  # type: ignore[arg-type]
    callback.on_test_batch_end(None, module, {"preds": torch.ones(4), "target": torch.zeros(4)}, None, 0)  # type: ignore[arg-type]
    callback.on_test_epoch_end(None, module)  # type: ignore[arg-type]
    assert float(module.logged["test/mse"].compute()) == 1
    with refuses("metrics.x", None, "no metric of torchmetrics"):
        EvaluationMetrics({"x": nn.Linear(1, 1)})  # type: ignore[dict-item]


def test_a_metric_that_fails_or_is_no_number_is_named() -> None:
    def run(metric: Any) -> None:
        evaluate(EvaluationMetrics({"mine": metric}), Module(), *samples())

    with refuses("metrics.mine", None, "it returns [10]", "average", kind=AgreedError):
        run(MulticlassF1Score(10, average=None))
    with refuses("metrics.mine", None, "MulticlassF1Score", kind=AgreedError):
        run(MulticlassF1Score(3))


def test_settings_that_cannot_work() -> None:
    with refuses("metrics", "top5", "of 10 classes", "metrics.top5.top_k=9"):
        settled("metrics=top5", "metrics.top5.top_k=10")
    with refuses("metrics.f1.num_classes", None, "number of classes"):
        settled("metrics=f1", "~module.num_classes")
    with refuses("metrics.f1.average", "none", "macro"):
        settled("metrics=f1", "metrics.f1.average=none")
    with refuses("metrics.auroc.thresholds", -1, "null", "2 or more"):
        settled("metrics=auroc", "metrics.auroc.thresholds=-1")
    settled("metrics=auroc", "metrics.auroc.thresholds=200")
    settled("metrics=auroc", "metrics.auroc.thresholds=[0.1,0.5]")
    with refuses("metrics.acc", None, "val/acc", "another name"):
        settled("+metrics.acc._target_=torchmetrics.classification.MulticlassAccuracy", "+metrics.acc.num_classes=10")
    with refuses("metrics.mine", 3, "_target_"):
        settled("+metrics.mine=3")
    with refuses("metrics.kappa._target_", "torchmetrics.CohenKapa", "torchmetrics.CohenKappa"):
        settled("+metrics.kappa._target_=torchmetrics.CohenKapa")
    kappa = "torchmetrics.classification.MulticlassCohenKappa"
    with refuses("metrics.kappa._target_", kappa, "num_classes", "+metrics.kappa.num_classes=..."):
        settled(f"+metrics.kappa._target_={kappa}")
    settled(f"+metrics.kappa._target_={kappa}", "+metrics.kappa.num_classes=10")
    settled("+metrics.error._target_=torchmetrics.MeanSquaredError")
    assert composed("metrics=[top5,f1]").metrics.keys() == {"top5", "f1"}


def test_a_metric_by_name_can_be_monitored_and_another_cannot() -> None:
    kind = "lightning.pytorch.callbacks.ModelCheckpoint"
    settings = OmegaConf.create({"checkpoint": {"_target_": kind, "monitor": "val/f1"}})
    monitored_metric.check(Module(), [build()], settings)
    settings.checkpoint.monitor = "val/f2"
    with refuses("callbacks.checkpoint.monitor", "val/f2", "val/f1", kind=AgreedError):
        monitored_metric.check(Module(), [build()], settings)


def test_a_run_monitors_them_and_continues_as_if_it_had_not_ended(tmp_path: Path) -> None:
    how = ["metrics=classification", "callbacks.checkpoint.monitor=val/f1", "scheduler=constant", "model=mlp"]
    how += ["logger=csv", "trainer.val_check_interval=0.5", "resume.every_n_steps=5"]
    for name, epochs in (("parts", 1), ("parts", 2), ("whole", 2)):
        run = train(tmp_path, *how, f"run.id={name}", f"trainer.max_epochs={epochs}", "plots=true").ended()
    whole, parts = (tmp_path / "outputs" / name for name in ("whole", "parts"))
    rows = [
        [line for line in (place / "metrics.csv").read_text(encoding="utf-8").splitlines() if ",test" not in line]
        for place in (whole, parts)
    ]
    header = rows[0][0].split(",")
    at = [number for number, name in enumerate(header) if name.startswith(("val/", "test/", "train/"))]
    found = [[tuple(line.split(",")[n] for n in at) for line in each] for each in rows]
    assert set(found[0]) <= set(found[1])  # the first attempt's test has a row more
    result = run.json("result")
    assert list(result["monitored"]) == ["val/f1"]
    assert {"test/top5", "test/f1", "test/auroc", "test/calibration"} <= result["test"].keys()
    assert (whole / "confusion-val.csv").read_bytes() == (parts / "confusion-val.csv").read_bytes()
    assert (whole / "confusion.csv").read_bytes() == (parts / "confusion.csv").read_bytes()
    for name in ("curves", "confusion", "confusion-val"):
        assert (parts / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    saved = checkpoint["resume"]["ranks"][0]["metrics"]
    assert not any(len(state) for state in saved["val_metric_auroc"]["states"].values())  # scores are not kept


def test_compare_knows_which_value_of_a_metric_is_better() -> None:
    run: Any = SimpleNamespace(numbers=dict.fromkeys(("test/top5", "test/f1", "test/auroc", "test/calibration"), 0.5))
    run.number, numbers = run.numbers.__getitem__, run.numbers
    run.numbers = lambda: numbers
    better = {name: choose(name, [run]).better for name in numbers}
    expected = {"test/top5": "higher", "test/f1": "higher", "test/auroc": "higher", "test/calibration": "lower"}
    assert better == expected
