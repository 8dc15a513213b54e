"""stub"""

from typing import NamedTuple
from torch import Tensor


class Shape(NamedTuple):
    n: int


def takes(*a, channels=None):
    return False


def shape(x):
    return None
