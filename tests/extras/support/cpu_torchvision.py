"""Lets torchvision's wheel, which is built against torch for CUDA, be imported beside torch for the CPU.

Its own operators do not load there, and it stops at its import where it registers what two of them compute on fake
tensors. This defines the schemas of these two just before that, and only if torchvision says that its operators are
missing; its models, datasets and transforms need no more. The environment `.venv-extras` imports this file at the start
of each process, by a .pth file that the Makefile writes.
"""

import importlib.abc
import sys


class DefineOperators(importlib.abc.MetaPathFinder):
    """Finds no module; notices when torchvision is about to import the one that needs the operators."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations":
            sys.meta_path.remove(self)
            if not sys.modules["torchvision.extension"]._has_ops():
                import torch

                for operator in ("nms", "qnms"):
                    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    torch.library.define(f"torchvision::{operator}", schema)


sys.meta_path.insert(0, DefineOperators())
