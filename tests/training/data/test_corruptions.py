"""Each corruption against its formula, written out for one number or pixel at a time."""

import colorsys
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from syncbn.training.data.corruptions import KINDS, SEVERITIES, corrupt
from tests.support.refuses import refuses

DRAWN = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise")

# hendrycks/robustness and google-research/mnist-c, as published; the last two are ours.
PUBLISHED = {
    "gaussian_noise": [0.08, 0.12, 0.18, 0.26, 0.38],
    "shot_noise": [60, 25, 12, 5, 3],
    "impulse_noise": [0.03, 0.06, 0.09, 0.17, 0.27],
    "speckle_noise": [0.15, 0.2, 0.35, 0.45, 0.6],
    "gaussian_blur": [0.4, 0.6, 0.7, 0.8, 1],
    "contrast": [0.4, 0.3, 0.2, 0.1, 0.05],
    "brightness": [0.1, 0.2, 0.3, 0.4, 0.5],
    "shift": [0.2, 0.4, 0.6, 0.8, 1.0],
    "scale": [1.5, 2, 3, 5, 8],
}


def some(n: int = 3, channels: int = 3, size: int = 6) -> Tensor:
    x = torch.rand(n, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[0, :, 0, 0] = 0  # black
    x[0, :, 0, 1] = 1
    return x


def clip(x: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(x, 0), 1)


def blurred(x: np.ndarray, sigma: float) -> np.ndarray:
    """Every pixel the weighted mean of those within four standard deviations, those beyond the border the border's."""
    reach = int(4 * sigma + 0.5)
    weights = [math.exp(-(d**2) / (2 * sigma**2)) for d in range(-reach, reach + 1)]
    made = np.zeros_like(x)
    for (n, c, h, w), _ in np.ndenumerate(x):
        for i, down in enumerate(weights):
            for j, right in enumerate(weights):
                row = min(max(h + i - reach, 0), x.shape[2] - 1)
                column = min(max(w + j - reach, 0), x.shape[3] - 1)
                made[n, c, h, w] += down * right * x[n, c, row, column]
    return made / sum(weights) ** 2


def brighter(x: np.ndarray, c: float) -> np.ndarray:
    made = np.zeros_like(x)
    for n, h, w in np.ndindex(x.shape[0], *x.shape[2:]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(x[n, k % x.shape[1], h, w] for k in range(3)))
        made[n, :, h, w] = colorsys.hsv_to_rgb(hue, saturation, min(value + c, 1))[: x.shape[1]]
    return made


def formula(kind: str, x: np.ndarray, c: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "gaussian_noise":
        return clip(x + np.array([rng.standard_normal() for _ in range(x.size)]).reshape(x.shape) * c)
    if kind == "speckle_noise":
        return clip(x + x * np.array([rng.standard_normal() for _ in range(x.size)]).reshape(x.shape) * c)
    if kind == "shot_noise":
        return clip(np.array([rng.poisson(each * c) for each in x.ravel()]).reshape(x.shape) / c)
    if kind == "impulse_noise":
        made = x.copy().ravel()
        for i in range(x.size):
            flipped, salted = rng.random() <= c, rng.random() <= 0.5
            made[i] = (1.0 if salted else 0.0) if flipped else made[i]
        return made.reshape(x.shape)
    if kind == "contrast":
        made = x.copy()
        for image in made.reshape(-1, x.shape[2] * x.shape[3]):
            image[:] = clip((image - image.mean()) * c + image.mean())
        return made
    return {
        "gaussian_blur": lambda: blurred(x, c),
        "brightness": lambda: brighter(x, c),
        "shift": lambda: x + c,
        "scale": lambda: x * c,
    }[kind]()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_published_formula_at_every_severity(kind: str) -> None:
    for channels in (1, 3):
        x = some(channels=channels)
        for severity in SEVERITIES:
            expected = formula(kind, x.numpy(), PUBLISHED[kind][severity - 1], seed=4)
            found = corrupt(x, kind, severity, seed=4)
            torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
            single = corrupt(x.float(), kind, severity, seed=4)
            assert single.dtype == torch.float32
            torch.testing.assert_close(single.double(), found, rtol=1e-5, atol=2 / 60 if kind == "shot_noise" else 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_of_a_seed_and_leaves_all_else_alone(kind: str) -> None:
    x = some(4)
    before, states = x.clone(), (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    made = corrupt(x, kind, 3, seed=1)
    assert torch.equal(x, before)
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())
    assert torch.equal(made, corrupt(x, kind, 3, seed=1))
    assert torch.equal(made[:2], corrupt(x[:2], kind, 3, seed=1))  # whatever follows
    assert torch.equal(made, corrupt(x, kind, 3, seed=2)) != (kind in DRAWN)


def test_impulses_are_as_often_white_as_black() -> None:
    made = corrupt(torch.full((40, 1, 50, 50), 0.5), "impulse_noise", 5)
    white, black = ((made == value).double().mean().item() for value in (1, 0))
    assert white == pytest.approx(0.135, abs=0.005)  # 100,000 draws: 0.0011 is one standard deviation
    assert black == pytest.approx(0.135, abs=0.005)


@pytest.mark.parametrize(
    ("kind", "severity", "refusal"),
    [
        ("fog", 3, ("kind", "fog", "use one of gaussian_noise, shot_noise, ")),
        ("contrast", 6, ("severity", 6, "use a whole number from 1 to 5")),
        ("contrast", 0, ("severity", 0, "use a whole number")),
        ("contrast", True, ("severity", True, "use a whole number")),
    ],
)
def test_what_is_no_corruption_is_refused(kind: str, severity: int, refusal: tuple[str, object, str]) -> None:
    with refuses(*refusal):
        corrupt(some(), kind, severity)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (some()[0], ["the images are torch.float64 of shape (3, 6, 6); ", " (N, C, H, W)"]),
        (some().mul(255).byte(), ["the images are torch.uint8 of shape"]),
        (some() - 0.5, ["the images range from -0.5 to 0.5; ", " in [0, 1], so normalize within"]),
        (some() * torch.nan, ["the images range from nan to nan"]),
    ],
)
def test_what_is_no_image_is_refused(images: Tensor, words: list[str]) -> None:
    with refuses("corrupt", None, *words):
        corrupt(images, "contrast", 1)
