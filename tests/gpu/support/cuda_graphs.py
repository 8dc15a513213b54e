"""A training step of the layer as a CUDA graph."""

import pytest
import torch
from torch import Tensor

import syncbn
from syncbn.nn.autograd import measure
from syncbn.testing import force_exchange
from tests.nn.support.oracle import with_parameters as parameters


class Replayed:
    """Forward and backward of a layer with residual and ReLU, captured once and replayed on new data; or run eagerly.

    Args:
        shape: of the input.
        captured: as a graph.
        seed: of the data.
        options: of the layer.
    """

    def __init__(
        self, shape: tuple[int, ...], *, captured: bool, seed: int = 0, act: str | None = "relu",
        layout: torch.memory_format = torch.channels_last, dtype: torch.dtype = torch.float32, residual: bool = True,
        **options: object,
    ) -> None:  # fmt: skip
        self.layer = parameters(syncbn.SyncBatchNorm2d(shape[1], **options)).to("cuda")
        self.act, self.captured = act, captured
        self.generator = torch.Generator("cuda").manual_seed(seed)
        made = [torch.zeros(shape, dtype=dtype, device="cuda").contiguous(memory_format=layout) for _ in range(3)]
        self.x, self.dy, r = made
        self.residual = r.requires_grad_() if residual else None
        self.x.requires_grad_()

    def run(self, count: int) -> dict[str, Tensor]:
        """Steps so often, and returns the results of each and the buffers after it, by name."""
        with force_exchange():
            step = self._capture() if self.captured else self._step
            found = {}
            for number in range(count):
                self._draw()
                for name, value in step().items():
                    found[f"{name}, step {number}"] = value.detach().clone().cpu()
        return found

    def _draw(self) -> None:
        with torch.no_grad():
            for t in (self.x, self.dy, self.residual):
                if t is not None:
                    t.copy_(torch.randn(t.shape, device="cuda", generator=self.generator) + 1)

    def _step(self) -> dict[str, Tensor]:
        y = self.layer(self.x, residual=self.residual, act=self.act)
        leaves = {"dx": self.x, "dresidual": self.residual} | dict(self.layer.named_parameters())
        leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy)
        return {"y": y} | dict(zip(leaves, gradients, strict=True)) | dict(self.layer.named_buffers())

    def _capture(self) -> "Replay":
        before = {name: buffer.clone() for name, buffer in self.layer.named_buffers()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # What is compiled or built by a first call.
        with torch.cuda.stream(stream), pytest.MonkeyPatch.context() as patch:
            patch.setattr(measure, "_may_read_count", lambda x, mask: False)  # one value would be refused
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = self._step()
        for name, buffer in self.layer.named_buffers():
            buffer.copy_(before[name])
        return Replay(graph, results)


class Replay:
    """A graph and the tensors that it writes."""

    def __init__(self, graph: "torch.cuda.CUDAGraph", results: dict[str, Tensor]) -> None:
        self._graph, self._results = graph, results

    def __call__(self) -> dict[str, Tensor]:
        self._graph.replay()
        return self._results
