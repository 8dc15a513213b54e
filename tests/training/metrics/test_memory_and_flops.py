"""Peak memory over ranks, and the arithmetic of MFU with cards that are not here."""

import os
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from syncbn.training.metrics.peak_flops import PEAKS, peak_flops, utilization
from syncbn.training.metrics.peak_memory import described, peak_memory
from syncbn.training.models import flops
from syncbn.training.models.classifier import Classifier
from syncbn.training.models.networks import ResNet
from syncbn.training.network import utilization as of_network
from tests.support.ranks import Ranks

LARGE = 200  # MiB


def on_a_rank(rank: int, world_size: int) -> tuple[dict[str, Any], dict[str, Any], int]:
    before = peak_memory("cpu")
    block = torch.ones(LARGE * 2**18 * rank)  # rank 1 alone
    block.add_(1)
    return before, peak_memory("cpu"), os.getpid()


def test_the_peak_is_that_of_the_rank_that_used_most(ranks: Ranks) -> None:
    (before, after, _), (_, same, _) = ranks.run(on_a_rank, world_size=2, fresh=True)
    assert after == same
    assert (after["memory/rank"], after["of"]) == (1, "process")
    assert after["memory/peak"] >= before["memory/peak"] + 100 * 2**20
    assert 20 * 2**20 < before["memory/peak"] < 20 * 2**30  # bytes


def test_the_peak_on_a_gpu_is_that_of_torchs_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    found = peak_memory("gpu")
    assert found == {"memory/peak": 3 * 2**30, "memory/rank": 0, "of": "GPU"}
    assert described(found) == "3,072 MiB at most on the GPU of a rank (rank 0)"


@pytest.mark.parametrize(
    ("card", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989e12),
        ("NVIDIA H100 PCIe", "bf16-true", 756e12),
        ("NVIDIA H200", "16-mixed", 989e12),
        ("NVIDIA A100-SXM4-40GB", "32-true", 156e12),
        ("NVIDIA A10", "32", 62.5e12),
        ("NVIDIA A10G", "32", 35e12),  # NVIDIA's A10G datasheet: 70 TFLOP/s in bfloat16, where the A10 has 125
        ("NVIDIA B200", "bf16-mixed", 2250e12),
        ("NVIDIA GB200", "bf16-mixed", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16-mixed", None),
        ("NVIDIA L40S", "bf16-mixed", 362e12),
        ("NVIDIA L4", "bf16-mixed", 121e12),
        ("Tesla T4", "16-mixed", 65e12),
        ("Tesla T4", "bf16-mixed", None),
        ("Tesla V100-PCIE-16GB", "16-mixed", 112e12),
        ("Tesla V100-SXM2-16GB", "32-true", 15.7e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", None),
        ("NVIDIA A100-SXM4-40GB", "64-true", None),
        ("Some Other Card", "bf16-mixed", None),
        ("", "32-true", None),
    ],
)
def test_the_peak_of_a_card(card: str, precision: str, peak: float | None) -> None:
    assert peak_flops(card, precision) == peak


def test_no_type_has_a_higher_peak_than_one_of_half_its_size() -> None:
    for each in PEAKS:
        assert each.tf32 < each.fp16
        assert each.bf16 in (0, each.fp16)


def test_mfu_is_the_rate_of_the_models_flops_over_the_peak_of_all_cards() -> None:
    # ResNet-50: 4.09 GFLOP multiply-adds forward, three times that with backward; two A100 at 2,500 images/s each.
    found = utilization(3 * 2 * 4_090_000_000, 5000, 2, card="NVIDIA A100-SXM4-80GB", precision="bf16-mixed")
    assert found["mfu/share"] == pytest.approx(24.54e9 * 5000 / (2 * 312e12))
    assert utilization(1, 5000, 2, card="unknown", precision="bf16-mixed") == {}
    assert utilization(1, 0, 2, card="NVIDIA A100", precision="bf16-mixed") == {}


def test_the_callback_counts_the_network_on_the_first_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_network, "card_name", lambda: "NVIDIA A100-SXM4-40GB")
    network, images = ResNet(), torch.rand(8, 1, 8, 8)
    module = Classifier(network, partial(torch.optim.SGD, lr=1.0), num_classes=10)
    trainer: Any = SimpleNamespace(is_global_zero=True, lightning_module=module, precision="bf16-mixed", world_size=4)
    callback = of_network.Utilization()
    callback.setup(trainer, module, "fit")
    assert callback.measure(trainer, 1000) == {}  # nothing was trained
    callback.on_train_batch_end(trainer, module, None, (images, torch.zeros(8)), 0)
    shadow = flops.shadow(network)
    assert shadow is not None
    counted = flops.count_training(shadow, flops.first(images))
    assert counted is not None
    assert callback.measure(trainer, 1000)["mfu/share"] == pytest.approx(sum(counted) * 1000 / (4 * 312e12))
    module.network = torch.nn.Linear(3, 3)  # takes no such input
    callback.setup(trainer, module, "fit")
    assert callback.measure(trainer, 1000) == {}
