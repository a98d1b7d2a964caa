"""One forward and backward pass as a CUDA graph: the host launches a step once instead of a thousand kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from avfast.models.contract import Draws

STAY = 8  # so many passes of other shapes in a row are no exception

Pass = Callable[[dict[str, Tensor], Draws, int], dict[str, Tensor]]
"""``(inputs, draws, parts) -> losses`` without gradient; 1 / parts of the gradients is added to ``.grad``."""


def capture(run: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Records what ``run`` launches on the current CUDA device; its outputs, which each replay fills, and the replay.

    ``run`` is called a few times before, so that libraries choose their algorithms and memory is laid out.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # only of this thread: the loader's pins memory meanwhile, which would end a capture of the whole process
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = run()
    return outputs, graph.replay


class GraphedPass:
    """A pass that is captured once its shapes come twice in a row; other shapes run as they are.

    Multi-ratio masking gives the same shapes at every step. A clip without audio does not; nor does a new epoch where
    batches or ratios change with it: shapes that come ``STAY`` times in a row replace those captured before. There is
    one graph at a time, as each holds the memory of a whole pass.

    Args:
        run: the pass. Nothing in it may wait for the device.
        parameters: of the model.
        capture: records a function and returns its outputs and the replay.
    """

    def __init__(self, run: Pass, parameters: Iterable[nn.Parameter], capture: Any = capture) -> None:
        self.run, self.parameters, self.capture = run, list(parameters), capture
        self.last: tuple | None = None
        self.times = 0  # in a row that the last signature came
        self.captured: tuple | None = None

    def __call__(self, inputs: dict[str, Tensor], draws: Draws, parts: int) -> dict[str, Tensor]:
        """The losses; gradients are added as ``run`` adds them."""
        signature = ({name: (x.shape, x.dtype) for name, x in inputs.items()}, draws.signature, parts)
        self.times, self.last = self.times + 1 if signature == self.last else 1, signature
        if signature != self.captured and self.times < (2 if self.captured is None else STAY):
            return self.run(inputs, draws, parts)
        before = [p.grad for p in self.parameters]
        if signature != self.captured:
            self.prepare(inputs, draws, parts)
            self.captured = signature
        for name, held in self.inputs.items():
            held.copy_(inputs[name])
        torch._foreach_copy_(self.draws.tensors(), draws.tensors())
        zeroed, filled, given = [], [], []
        for parameter, own, grad in zip(self.parameters, self.grads, before, strict=True):
            parameter.grad = grad if own is None else own
            if own is None or grad is own:
                continue
            if grad is None:
                zeroed.append(own)
            else:
                filled.append(own)
                given.append(grad)
        # one launch for all parameters, not one for each
        if zeroed:
            torch._foreach_zero_(zeroed)
        if filled:
            torch._foreach_copy_(filled, given)
        self.replay()
        return {name: value.clone() for name, value in self.losses.items()}

    def prepare(self, inputs: dict[str, Tensor], draws: Draws, parts: int) -> None:
        """Captures the pass on copies of its inputs, with gradients of its own, in place of an earlier capture."""
        self.losses, self.grads, self.replay = {}, [], lambda: None  # gives its memory back first
        self.inputs = {name: x.clone() for name, x in inputs.items()}
        self.draws = draws.to(next(iter(inputs.values())).device)
        for parameter in self.parameters:
            parameter.grad = None
        self.losses, self.replay = self.capture(lambda: self.run(self.inputs, self.draws, parts))
        self.grads = [p.grad for p in self.parameters]
