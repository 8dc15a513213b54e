"""The differentiable passes of a layer: the sums of a batch over ranks, the normalization, and their gradients."""
