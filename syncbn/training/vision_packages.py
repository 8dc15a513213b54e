"""torchvision and timm, which are optional: how they are installed, and torchvision without its operators.

torchvision's wheel for CUDA does not load its operators beside torch for the CPU. It then raises an error at its
import, where it registers what two of them compute on fake tensors. Lightning imports torchvision if it is installed,
so no run could start. ``allow_missing_operators`` defines the schemas of these two before that, if they are missing.
Networks, data sets and transforms need no operator; ``torchvision.ops.nms`` raises an error when it is called. Read in
torchvision 0.28.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def install_command() -> str:
    """The command that installs both and keeps the installed torch, which torchvision alone would replace."""
    try:
        return f"pip install timm torchvision torch=={version('torch')}"
    except PackageNotFoundError:  # torch is on the path without having been installed
        return "pip install timm torchvision"


class DefineOperators:
    """Finds no module; notices when torchvision is about to import the module that needs the operators."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None, /) -> None:
        if fullname == "torchvision._meta_registrations":
            sys.meta_path.remove(self)
            define_missing()


def allow_missing_operators() -> None:
    """From now on torchvision can be imported without its operators. It does nothing if torchvision was imported."""
    present = any(type(each).__name__ == DefineOperators.__name__ for each in sys.meta_path)
    if "torchvision" not in sys.modules and not present:
        sys.meta_path.insert(0, DefineOperators())


def lacks_operators() -> bool:
    """Whether torchvision was imported without its compiled operators."""
    import torch

    return "torchvision" in sys.modules and not hasattr(torch.ops.torchvision, "roi_align")


def define_missing() -> None:
    """Defines the schemas of the operators that torchvision registers functions for, if they are missing."""
    import torch

    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(
                f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
