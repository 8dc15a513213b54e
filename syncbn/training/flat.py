"""Settings as one flat list of names, to compare those of two runs."""

from typing import Any

COPIES = ["module.network", "module.optimizer", "module.scheduler"]  # of groups that are compared themselves


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """``{"data": {"batch_size": 2}}`` as ``{"data.batch_size": 2}``."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {name: value for key, each in tree.items() for name, value in flat(each, f"{prefix}{key}.").items()}
