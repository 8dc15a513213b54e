"""Finds the part of a LightningModule whose samples ``norm=shuffle`` shuffles."""

from torch import nn

from syncbn.nn.conversion.convert import batch_norms
from syncbn.training.errors import AgreedError

SHOWN = 8  # names that an error message lists


def shuffled_part(module: nn.Module, name: str) -> nn.Module:
    """The submodule of this dotted name.

    Raises:
        AgreedError: there is no such submodule, or it has no batch norm; it names those that work.
    """
    parts: dict[str, nn.Module] = {each: part for each, part in module.named_modules() if each}
    if name in parts and any(batch_norms(parts[name])):
        return parts[name]
    works = [each for each, part in parts.items() if any(True for _ in part.children()) and any(batch_norms(part))]
    more = f" and {len(works) - SHOWN} more" if len(works) > SHOWN else ""
    wrong = "it has no batch norm" if name in parts else f"{type(module).__name__} has no such submodule"
    hint = f"those with batch norm are {', '.join(works[:SHOWN])}{more}" if works else "none has batch norm"
    raise AgreedError("norm.part", name, f"{wrong}; {hint}")
