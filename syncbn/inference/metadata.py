"""What an exported file says of its network: classes, preprocessing, norm, metrics and versions."""

import json
from dataclasses import asdict
from typing import Any

from torch import Tensor

from syncbn.inference.trained import Trained
from syncbn.training.run_directory import record

INPUT, OUTPUT = "input", "output"  # names in the file


def of(trained: Trained, x: Tensor) -> dict[str, str]:
    """The metadata of an exported file: JSON texts by name.

    Args:
        trained: what is exported.
        x: a batch of its inputs.
    """
    run_dir, norm = trained.run_dir, trained.settings.get("norm")
    result = {} if run_dir is None else record.read_whole(run_dir, "result")
    about = {} if run_dir is None else record.read(run_dir, "run")
    preprocessing = trained.preprocessing
    values: dict[str, Any] = {
        "classes": trained.classes,
        "preprocessing": None if preprocessing is None else asdict(preprocessing),
        "input_shape": ["batch", *x.shape[1:]],
        "norm": norm.get("name") if isinstance(norm, dict) else None,
        "metrics": (result.get("monitored") or {}) | (result.get("test") or {}),
        "run": about.get("id"),
        "versions": {"trained": about.get("versions"), "exported": record.versions()},
    }
    return {name: json.dumps(value) for name, value in values.items()}
