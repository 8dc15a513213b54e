"""Corrupts images to test robustness, with the published corruptions and severities.

They are the corruptions of MNIST-C (Mu & Gilmer 2019, google-research/mnist-c, ``corruptions.py``). Its parameters for
noise, contrast and brightness are those of ImageNet-C (Hendrycks & Dietterich 2019, hendrycks/robustness,
``imagenet_c/corruptions.py``). The blur is that of CIFAR-10-C (same repository, ``make_cifar_c.py``), because the blur
of the other two, up to six pixels, leaves nothing of an 8x8 image. ``shift`` and ``scale`` are defined here: affine
changes of the input that leave the range of the training images.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from syncbn.training.errors import SettingError

Images = npt.NDArray[np.float64]

# The parameter c of severities 1 to 5.
PARAMETERS = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation
    "shot_noise": (60, 25, 12, 5, 3),  # photons of a white pixel
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),  # share of pixels
    "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),  # standard deviation, of a white pixel
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation in pixels
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # factor
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to the value
    "shift": (0.2, 0.4, 0.6, 0.8, 1.0),  # added
    "scale": (1.5, 2.0, 3.0, 5.0, 8.0),  # factor
}
KINDS = tuple(PARAMETERS)
UNCLIPPED = ("shift", "scale")
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(images: Tensor, kind: str, severity: int, *, seed: int = 0) -> Tensor:
    """Return corrupted copies of images; torch's and numpy's global generators are not used.

    ``c`` is from :data:`PARAMETERS`; ``z`` (normal) and ``u`` (uniform) are drawn for each value of the images:

    ================== ====================================================================================
    ``gaussian_noise`` ``clip(x + c z)``
    ``shot_noise``     ``clip(Poisson(c x) / c)``
    ``impulse_noise``  0 or 1 with equal probability where ``u <= c``
    ``speckle_noise``  ``clip(x + c x z)``
    ``gaussian_blur``  over the positions of each channel; at the borders the last pixel is repeated
    ``contrast``       ``clip((x - m) c + m)``, where ``m`` is the mean of the image's channel
    ``brightness``     ``clip(v + c)`` for the value ``v`` of HSV, the largest channel; of a grey image ``v`` is ``x``
    ``shift``          ``x + c``, not clipped to [0, 1]
    ``scale``          ``c x``, not clipped to [0, 1]
    ================== ====================================================================================

    Random numbers are drawn image by image, so appending images does not change the earlier ones. The draws do not
    depend on the device or the precision. They do not depend on the severity either, except for ``shot_noise``, where
    the number of random numbers for a Poisson draw depends on its rate.

    Args:
        images: shape ``(N, C, H, W)``, values in [0, 1], of a floating-point type; left unchanged.
        kind: one of :data:`KINDS`.
        severity: 1 to 5.
        seed: seed of the random draws, 0 or more.

    Returns:
        Tensor with the shape, type and device of ``images``.

    Raises:
        SettingError: unknown kind or severity; images of another shape, type or range.
    """
    check(kind, severity)
    check_images(images, "corrupt")
    x = images.detach().cpu().double().numpy()
    corrupted = _APPLY[kind](x, PARAMETERS[kind][severity - 1], np.random.default_rng(seed))
    if kind not in UNCLIPPED:
        corrupted = np.clip(corrupted, 0, 1)
    return torch.from_numpy(corrupted).to(images.device, images.dtype)


def check(kind: str, severity: int, names: tuple[str, str] = ("kind", "severity")) -> None:
    """Raise a SettingError for an unknown kind or severity of a corruption; ``names`` are those of the two settings."""
    if kind not in PARAMETERS:
        raise SettingError(names[0], kind, f"use one of {', '.join(KINDS)}")
    if severity not in SEVERITIES or isinstance(severity, bool):
        raise SettingError(names[1], severity, "use a whole number from 1 to 5")


def check_images(images: Tensor, name: str) -> None:
    """Raise a SettingError of ``name`` unless the images are floating-point ``(N, C, H, W)`` in [0, 1].

    The severities were chosen for such images.
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise SettingError(
            name,
            hint=f"the images are {images.dtype} of shape {tuple(images.shape)}; corruptions are made for "
            "floating-point (N, C, H, W)",
        )
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise SettingError(
            name,
            hint=f"the images range from {images.min():.3g} to {images.max():.3g}; corruptions are made for values in "
            "[0, 1], so normalize within the network",
        )


def _impulse_noise(x: Images, c: float, rng: np.random.Generator) -> Images:
    u, salt = np.moveaxis(rng.random((*x.shape, 2)), -1, 0)
    return np.where(u <= c, salt <= 0.5, x)


def _contrast(x: Images, c: float, rng: np.random.Generator) -> Images:
    mean: Images = x.mean((2, 3), keepdims=True)
    return (x - mean) * c + mean


def _brightness(x: Images, c: float, rng: np.random.Generator) -> Images:
    value: Images = x.max(1, keepdims=True)
    brighter = np.clip(value + c, 0, 1)
    # Scaling all channels by the same factor keeps hue and saturation. Black has no hue and becomes grey.
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)


# Clipped to [0, 1] afterwards, except for UNCLIPPED.
_APPLY: dict[str, Callable[[Images, float, np.random.Generator], Images]] = {
    "gaussian_noise": lambda x, c, rng: x + c * rng.standard_normal(x.shape),
    "shot_noise": lambda x, c, rng: rng.poisson(c * x) / c,
    "impulse_noise": _impulse_noise,
    "speckle_noise": lambda x, c, rng: x + c * x * rng.standard_normal(x.shape),
    # The mode is scikit-image's default, as published.
    "gaussian_blur": lambda x, c, rng: gaussian_filter(x, (0, 0, c, c), mode="nearest"),
    "contrast": _contrast,
    "brightness": _brightness,
    "shift": lambda x, c, rng: x + c,
    "scale": lambda x, c, rng: x * c,
}
