"""Augments one training image with torchvision.transforms.v2. The names of the settings are timm's."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from syncbn.training.data.transforms import torchvision_v2
from syncbn.training.errors import SettingError

POLICIES = ("randaugment", "trivialaugment", "autoaugment", "augmix")
DEFAULTS: dict[str, Any] = {
    "name": None,
    "padding": None,
    "scale": None,
    "ratio": None,
    "hflip": 0.0,
    "vflip": 0.0,
    "color_jitter": 0.0,
    "auto_augment": None,
    "num_ops": 2,
    "magnitude": 9,
    "reprob": 0.0,
}


def check(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the defaults for those that are missing.

    Raises:
        SettingError: an unknown setting, or one that is out of its range.
    """
    for name, value in settings.items():
        if name not in DEFAULTS:
            known = ", ".join(each for each in DEFAULTS if each != "name")
            raise SettingError(f"augment.{name}", value, f"there is no such setting; use {known}")
    held = DEFAULTS | {name: value for name, value in settings.items() if value is not None}
    for name in ("hflip", "vflip", "reprob"):
        _require(held, name, _is_number(held[name]) and 0 <= held[name] <= 1, "use a probability from 0 to 1")
    _require(held, "color_jitter", _is_number(held["color_jitter"]) and held["color_jitter"] >= 0, "use 0 or more")
    padding, policy = held["padding"], held["auto_augment"]
    whole = isinstance(padding, int) and not isinstance(padding, bool)
    _require(held, "padding", padding is None or (whole and padding >= 0), "use a number of pixels, 0 or more, or null")
    for name in ("scale", "ratio"):
        works = "use two numbers above 0, the smaller one first, such as [0.08,1.0], or null"
        _require(held, name, held[name] is None or _is_range(held[name]), works)
    if held["scale"] is not None:
        _require(held, "scale", held["scale"][1] <= 1, "the crop's share of the image's area is at most 1")
        _require(held, "padding", not padding, "augment.scale crops already; use augment.padding=null")
    _require(held, "auto_augment", policy is None or policy in POLICIES, f"use null, {', '.join(POLICIES)}")
    for name, low, high in (("num_ops", 1, 14), ("magnitude", 0, 30)):
        value = held[name]
        good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        _require(held, name, good, f"use a whole number from {low} to {high}")
    return held


class Augmentation:
    """Augments uint8 images of shape ``(C, H, W)`` by torch's global random generator.

    The loaders seed that generator by epoch and sample, so the result does not depend on workers, ranks or a resume.

    Args:
        settings: those of ``conf/augment``.
        size: height and width of the result.

    Attributes:
        crops: whether the image is cropped and scaled to ``size`` here, so that it is needed in its own size.

    Raises:
        SettingError: see :func:`check`; torchvision is not installed.
    """

    def __init__(self, settings: dict[str, Any], size: tuple[int, int]) -> None:
        held = check(settings)
        self.crops = held["scale"] is not None
        v2 = torchvision_v2("augment", held["name"])
        before: list[Any] = []
        if self.crops:
            ratio = tuple(held["ratio"] or (3 / 4, 4 / 3))
            before.append(v2.RandomResizedCrop(size, tuple(held["scale"]), ratio, antialias=True))
        if held["padding"]:
            before.append(v2.RandomCrop(size, padding=held["padding"]))
        before += [v2.RandomHorizontalFlip(held["hflip"])] if held["hflip"] else []
        before += [v2.RandomVerticalFlip(held["vflip"])] if held["vflip"] else []
        before += [_policy(v2, held)] if held["auto_augment"] else []
        if held["color_jitter"]:
            before.append(v2.ColorJitter(*[held["color_jitter"]] * 3))
        self.before = v2.Compose(before) if before else None
        self.after = v2.RandomErasing(held["reprob"]) if held["reprob"] else None

    def __call__(self, image: Tensor, normalize: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the normalized image; a rectangle of it is erased at the end, where that is asked for."""
        if self.before is not None:
            image = self.before(image)
        pixels = normalize(image)
        return pixels if self.after is None else self.after(pixels)


def _policy(v2: Any, held: dict[str, Any]) -> Any:
    policy = held["auto_augment"]
    if policy == "randaugment":
        return v2.RandAugment(held["num_ops"], held["magnitude"])
    return {"trivialaugment": v2.TrivialAugmentWide, "autoaugment": v2.AutoAugment, "augmix": v2.AugMix}[policy]()


def _require(held: dict[str, Any], name: str, good: bool, works: str) -> None:
    if not good:
        raise SettingError(f"augment.{name}", held[name], works)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) == 2
        and all(map(_is_number, value))
        and 0 < value[0] <= value[1]
    )


def normalized(image: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """A uint8 image of shape ``(C, H, W)`` in [0, 1], normalized per channel in float32."""
    return image.to(torch.float32).div_(255).sub_(mean).div_(std)
