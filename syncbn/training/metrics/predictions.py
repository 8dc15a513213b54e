"""What an evaluation step says of its predictions: a dict with ``scores`` or ``preds``, and ``target``.

The built-in Classifier returns one. A LightningModule of the user's own that returns one from ``validation_step`` and
``test_step`` gets metrics by name, the confusion matrix and the worst mistakes too.
"""

import ast
import inspect
import textwrap
from typing import Any, NamedTuple

import lightning.pytorch as pl
from torch import Tensor

RETURNS = 'return {"scores": scores, "target": labels} there'


class Predictions(NamedTuple):
    """The predictions of a batch.

    Attributes:
        given: what metrics get: probabilities of shape ``(N, classes)`` in float64, or ``preds`` as they are.
        target: labels of shape ``(N,)``, or what belongs to ``preds``.
        scores: scores of shape ``(N, classes)``; None if the step returned ``preds``.
    """

    given: Tensor
    target: Tensor
    scores: Tensor | None


def predictions(outputs: Any) -> Predictions | None:
    """Reads what an evaluation step returned; None if it is no such dict.

    Probabilities are in float64: in float32 those of all but one class are often 0, and their order is lost. Soft
    targets count as the class with the largest share.
    """
    if not isinstance(outputs, dict) or not isinstance(target := outputs.get("target"), Tensor):
        return None
    scores, given = outputs.get("scores"), outputs.get("preds")
    if isinstance(scores, Tensor) and scores.dim() == 2 and scores.shape[1] > 1:
        labels = target.argmax(1) if target.is_floating_point() and target.dim() == 2 else target
        if labels.dim() == 1 and not labels.is_floating_point():
            return Predictions(scores.detach().double().softmax(1), labels.long(), scores.detach())
    return Predictions(given.detach(), target, None) if isinstance(given, Tensor) else None


def returns_nothing(module: pl.LightningModule, step: str) -> bool:
    """Whether the source of the module's ``step`` shows that it returns nothing; False if there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(module, step))))
    except (OSError, TypeError, SyntaxError, AttributeError):
        return False
    return not any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(tree))
