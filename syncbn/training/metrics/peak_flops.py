"""The peak FLOP/s of GPUs, and model FLOPs utilization (MFU, Chowdhery et al. 2022, appendix B).

Lightning's table (``lightning.fabric.utilities.throughput``, 2.6) has twice the dense peak for the H200, and half of it
for the tensor cores of the RTX cards.
"""

import re
from typing import Any, NamedTuple


class Peak(NamedTuple):
    """Dense peak of one card, without sparsity, in TFLOP/s; 0 if the card does not have this type."""

    card: str  # a pattern of the name that ``torch.cuda.get_device_name()`` returns
    bf16: float
    fp16: float
    tf32: float  # for float32; on cards without TF32 that of float32


# The first pattern that matches counts. From NVIDIA's datasheets, where "with sparsity" is halved:
# B200: HGX B200 datasheet; the GB200 is faster, and is not listed. H200, H100, GH200: H200 and H100 Tensor Core GPU
# datasheets; GH200 as H100 SXM. A100, A10, A10G, A40, L4, L40S, T4, V100: their datasheets. RTX 4090: Ada whitepaper
# v2.1, table 2; RTX 3090 and A6000: GA102 whitepaper v2.1, table 2 (float32 accumulation).
PEAKS = (
    Peak(r"\bB200", 2250, 2250, 1100),
    Peak(r"GH200|H200(?! NVL)", 989, 989, 494),
    Peak(r"H200 NVL", 835, 835, 418),
    Peak(r"H100 NVL", 835, 835, 418),
    Peak(r"H100 PCIe", 756, 756, 378),
    Peak(r"H100", 989, 989, 494),
    Peak(r"A100", 312, 312, 156),
    Peak(r"L40S", 362, 362, 183),
    Peak(r"L4\b", 121, 121, 60),
    Peak(r"A40\b", 149.7, 149.7, 74.8),
    Peak(r"A10G\b", 70, 70, 35),
    Peak(r"A10\b", 125, 125, 62.5),
    Peak(r"RTX A6000", 154.8, 154.8, 77.4),
    Peak(r"RTX 4090(?! (D|Laptop))", 165.2, 165.2, 82.6),
    Peak(r"RTX 3090(?! Ti)", 71, 71, 35.6),
    Peak(r"\bT4\b", 0, 65, 8.1),
    Peak(r"V100S", 0, 130, 16.4),
    Peak(r"V100-PCIE", 0, 112, 14),
    Peak(r"V100", 0, 125, 15.7),
)


def peak_flops(card: str, precision: str) -> float | None:
    """The peak FLOP/s of a card.

    Args:
        card: its name, as ``torch.cuda.get_device_name()`` returns it.
        precision: ``trainer.precision``. For float32 it is the peak of TF32, which convolutions use.

    Returns:
        FLOP/s; None for an unknown card, a MIG part of a card, float64, or a type that the card does not have.
    """
    peak = next((each for each in PEAKS if re.search(each.card, card)), None)
    if re.search(r"\bMIG\b", card):  # "NVIDIA A100-SXM4-40GB MIG 1g.5gb" is a part of the card
        return None
    kind = str(precision).partition("-")[0]
    if peak is None or kind == "64":
        return None
    found = {"bf16": peak.bf16, "16": peak.fp16}.get(kind, peak.tf32)
    return found * 1e12 or None


def utilization(flops: int, images_per_second: float, devices: int, *, card: str, precision: str) -> dict[str, Any]:
    """MFU: the FLOP/s that the model needs at this speed, over the peak of all cards.

    Args:
        flops: of one sample, forward and backward.
        images_per_second: samples per second over all devices.
        devices: how many cards.
        card: their name.
        precision: ``trainer.precision``.

    Returns:
        ``mfu/share``, ``mfu/flops_per_sample`` and ``mfu/peak`` (FLOP/s of one card); empty if the peak is unknown.
    """
    peak = peak_flops(card, precision)
    if peak is None or not images_per_second:
        return {}
    share = flops * images_per_second / (peak * devices)
    return {"mfu/share": share, "mfu/flops_per_sample": flops, "mfu/peak": peak, "card": card}
