"""The settings of ``ddp``: what is lossless changes no bit, what compresses is used, and errors name them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from syncbn.training.distributed import ddp_strategy
from syncbn.training.errors import SettingError
from tests.training.checkpoint.test_resume_foreign_modules import differences, resumed
from tests.training.support.faulty_runs import faulty
from tests.training.support.settled_config import composed, settled
from tests.training.support.train_command import Run

QUICK = ("model=mlp", "module=classifier", "data.global_batch_size=64", "trainer.max_epochs=1", "run.id=a")
QUICK += ("+trainer.limit_train_batches=6",)
GAN = ("module._target_=gan.Gan", "callbacks=gradients", "trainer.max_epochs=2")


def weights(run: Run) -> dict[str, torch.Tensor]:
    assert run.code == 0, run.err
    assert run.directory is not None
    return torch.load(run.directory / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def placed(where: Path, name: str, *settings: str) -> Run:
    (where / name).mkdir()
    return faulty(where / name, *settings)


@pytest.fixture(scope="module")
def as_they_are(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return weights(faulty(tmp_path_factory.mktemp("default"), *QUICK))


LOSSLESS = [
    ("ddp.gradient_as_bucket_view=true", "ddp.bucket_cap_mb=0.002", "ddp.find_unused_parameters=true"),
    ("ddp.static_graph=true", "ddp.bucket_cap_mb=0.002"),
    ("ddp.comm_hook=powersgd",),  # it begins after 1000 steps
]


@pytest.mark.parametrize("settings", LOSSLESS)
def test_what_is_lossless_changes_no_bit(
    tmp_path: Path, as_they_are: dict[str, torch.Tensor], settings: tuple[str, ...]
) -> None:
    found = weights(faulty(tmp_path, *QUICK, *settings))
    assert found.keys() == as_they_are.keys()
    for name, value in as_they_are.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("hook", ["fp16", "powersgd"])
def test_a_hook_that_compresses_is_used(tmp_path: Path, as_they_are: dict[str, torch.Tensor], hook: str) -> None:
    more = ["ddp.powersgd_start=2", "ddp.comm_wrapper=fp16"] if hook == "powersgd" else []
    probe = f"+callbacks.gradients={{_target_: gan.Gradients, path: {tmp_path / 'found'}}}"
    found = weights(faulty(tmp_path, *QUICK, f"ddp.comm_hook={hook}", *more, probe))
    seen = torch.load(tmp_path / "found")
    if hook == "powersgd":
        assert seen["rank"] == 1
    else:
        assert seen["half"]
    changed = [name for name, value in as_they_are.items() if not torch.equal(found[name], value)]
    assert changed
    for name in changed:
        torch.testing.assert_close(found[name], as_they_are[name], rtol=0.1, atol=0.1 if hook == "powersgd" else 0.01)


def test_a_gan_on_two_devices_learns_what_it_does_on_one(tmp_path: Path) -> None:
    settings = (*GAN, "+module.noise=false", "data.global_batch_size=64", "ddp.find_unused_parameters=true", "run.id=a")
    settings += ("trainer.precision=64-true",)
    two = weights(placed(tmp_path, "two", *settings, "trainer.devices=2"))
    one = weights(placed(tmp_path, "one", *settings, "trainer.devices=1"))
    assert {name.split(".")[0] for name in two} == {"generator", "discriminator"}
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-9)


def test_a_gan_that_was_killed_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    more = ("trainer.devices=2", "ddp.find_unused_parameters=true", "resume.every_n_steps=6")
    straight, other = resumed(tmp_path, {"epoch": 1, "batch": 11}, *GAN, *more)
    assert "it resumes from outputs/a/checkpoints/step-000000" in other.out
    assert straight.json("result")["steps"] == 2 * 2 * 18  # a step of each optimizer
    assert differences(straight, other) == []
    one, two = ((run.directory / "gradients.csv").read_text(encoding="utf-8") for run in (straight, other))
    assert one == two


def test_an_average_that_was_killed_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    average = "+callbacks.average={_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.8}"
    at = {"epoch": 1, "batch": 11}
    straight, other = resumed(tmp_path, at, average, "trainer.devices=2", "resume.every_n_steps=4")
    assert differences(straight, other) == []


REFUSED = {
    "+trainer.strategy=ddp_find_unused_parameters_true": "trainer.strategy=ddp_find_unused_parameters_true: use "
    "ddp.find_unused_parameters=true",
    "+trainer.strategy={_target_:lightning.pytorch.strategies.DDPStrategy,find_unused_parameters:True}": "trainer."
    "strategy={'_target_': 'lightning.pytorch.strategies.DDPStrategy', 'find_unused_parameters': True}: use "
    "ddp.find_unused_parameters=true",
    "+trainer.strategy=fsdp": "trainer.strategy=fsdp: drop it; the ranks use DistributedDataParallel, whose settings "
    "are ddp.find_unused_parameters and others (python train.py --cfg job --package ddp)",
    "ddp.static_graph=true ddp.find_unused_parameters=true": "ddp.static_graph=true: it finds unused parameters "
    "itself, once; use ddp.find_unused_parameters=false",
    "ddp.bucket_cap_mb=-1": "ddp.bucket_cap_mb=-1.0: use a number above 0 and up to 1000000, in MiB, or null",
    "ddp.static_graph=true trainer.accumulate_grad_batches=2": "ddp.static_graph=true: with "
    "trainer.accumulate_grad_batches=2 torch's DistributedDataParallel fails; use ddp.static_graph=false, or "
    "trainer.accumulate_grad_batches=1",
    "ddp.comm_hook=bf16": "ddp.comm_hook=bf16: torch has it for GPUs only; use ddp.comm_hook=fp16 or null",
    "ddp.comm_hook=powersgd ddp.comm_wrapper=bf16": "ddp.comm_wrapper=bf16: torch has it for GPUs only; use "
    "ddp.comm_wrapper=fp16 or null",
    "ddp.comm_hook=fp8": "ddp.comm_hook=fp8: use null, fp16, bf16 or powersgd",
    "ddp.comm_hook=powersgd ddp.comm_wrapper=half": "ddp.comm_wrapper=half: use null, fp16 or bf16",
    "ddp.comm_hook=fp16 ddp.comm_wrapper=fp16": "ddp.comm_wrapper=fp16: it wraps ddp.comm_hook=powersgd, but that is "
    "fp16; use ddp.comm_hook=fp16 alone, or powersgd",
    "ddp.powersgd_rank=0": "ddp.powersgd_rank=0: use a whole number, 1 or more",
    "ddp.powersgd_start=1": "ddp.powersgd_start=1: use 2 or more, since DDP rebuilds its buckets in the first step",
    "simulate=2 ddp.comm_hook=fp16": "ddp.comm_hook=fp16: it compresses what processes send, and with simulate=2 one "
    "process sends nothing; use ddp.comm_hook=null",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(overrides: str) -> None:
    with pytest.raises(SettingError) as refused:
        settled(*overrides.split())
    assert str(refused.value) == REFUSED[overrides]


UNUSED = (
    "error: ddp.find_unused_parameters=false: parameters had no part in the loss of a step (discriminator.0.weight, "
    "discriminator.0.bias, discriminator.1.weight and 3 more); use ddp.find_unused_parameters=true\n"
)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["module._target_=gan.Gan"], UNUSED),
        (
            ["module._target_=gan.Gan", "ddp.static_graph=true"],
            "error: ddp.static_graph=true: this step used other parameters than the first one; use "
            "ddp.static_graph=false ddp.find_unused_parameters=true\n",
        ),
        (
            ["module._target_=gan.Twice"],
            "error: ddp.static_graph=false: one backward pass reached a parameter twice (discriminator.0.bias); use "
            "torch.utils.checkpoint with use_reentrant=False, or ddp.static_graph=true\n",
        ),
    ],
)
def test_an_error_of_ddp_names_the_setting(tmp_path: Path, settings: list[str], line: str) -> None:
    run = faulty(tmp_path, *settings, "run.id=a")
    assert run.code == 1
    assert run.err == line


class Branches(nn.Module):
    """Uses the second layer where it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        return self.one(x) + (self.two(x) if both else 0)


CHANGES = {
    "static_graph": [
        ([False, True, True], ("ddp.static_graph", True, "this step used other.*; use ddp.static_graph=false")),
        ([True, False, False], ("ddp.static_graph", True, "this step used other.*; use ddp.static_graph=false")),
    ],
    "find_unused_parameters": [([True, False, True], None)],
    "nothing": [
        ([True, False, True], ("ddp.find_unused_parameters", False, r".* \(two.weight, two.bias\); use ddp.find"))
    ],
}


def steps(rank: int, world_size: int, settings: dict[str, bool], uses: list[bool]) -> tuple[str, bool, str] | None:
    model = Branches()
    strategy: Any = type("Strategy", (), {})()
    strategy.settings = composed().ddp
    strategy.settings.update(settings)
    strategy.trained = [name for name, _ in model.named_parameters()]
    wrapped = nn.parallel.DistributedDataParallel(model, **settings)
    try:
        with ddp_strategy.explained(strategy):
            for both in uses:
                wrapped(torch.ones(2, 2), both).sum().backward()
    except SettingError as error:
        return error.setting, error.value, error.hint
    return None


@pytest.mark.parametrize("name", CHANGES)
def test_steps_that_use_other_parameters(ranks: Any, name: str) -> None:
    for uses, expected in CHANGES[name]:
        settings = {} if name == "nothing" else {name: True}
        for found in ranks.run(steps, settings, uses, world_size=2):
            assert (found is None) == (expected is None)
            if expected is not None:
                assert found[:2] == expected[:2]
                assert re.match(expected[2], found[2]), found
