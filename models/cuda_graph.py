"""A step of fixed shapes as one CUDA graph: one launch by the host instead of thousands."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

EAGER_STEPS = 3
"""Eager steps before recording: they choose algorithms of convolutions and fill the caches that a graph reads."""

Step = Callable[..., Sequence[Tensor]]
"""Function of tensors that adds gradients to parameters and returns tensors."""


def record_cuda_graph(run: Callable[[], list[Tensor | None]]) -> tuple[Callable[[], None], list[Tensor | None]]:
    """Record the kernels of `run` without running them. Return what replays them, and the results that it overwrites.

    The kernels read and write the same memory in each replay, so the graph keeps all memory of `run`.
    """
    graph = torch.cuda.CUDAGraph()
    # a recording that fails at its end leaves its stream current; the outer context restores the one before.
    # not 'global', which forbids other threads, such as the one that pins batches, to allocate meanwhile
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode='thread_local'):
        results = run()
    return graph.replay, results


class Graphs:
    """Maker of graphed steps. After the first failure all steps run eagerly, for the rest of the run.

    Args:
        enabled: whether to make graphs at all.
        log: called with a format and its arguments, such as `RunLogger.log`.
        record: see `record_cuda_graph`.
    """

    def __init__(self, enabled: bool, log: Callable[..., object], record=record_cuda_graph):
        self.enabled, self.log, self.record = enabled, log, record

    def wrap(self, step: Step, parameters: Sequence[nn.Parameter]) -> Step:
        """Return a step with the results and gradients of `step`.

        Args:
            step: the shapes that it works on depend on its inputs alone, and all that it reads besides stays in place:
                weights may change, the parameters' storage may not. It must not make the host wait for the GPU.
            parameters: all that it gives gradients. They have none when it is called.
        """
        return _GraphedStep(step, parameters, self) if self.enabled else step

    def give_up(self, error: Exception) -> None:
        """Log why, and make no more graphs."""
        self.enabled = False
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        self.log('--cuda_graph: the step could not be recorded; the run goes on without graphs (%s)', reason)


class _GraphedStep:
    def __init__(self, step: Step, parameters: Sequence[nn.Parameter], graphs: Graphs):
        self.step, self.parameters, self.graphs = step, parameters, graphs
        self.eager_steps, self.replay = 0, None
        self.inputs: list[Tensor] = []
        self.results: list[Tensor | None] = []

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        if self.replay is None and self.graphs.enabled and self.eager_steps >= EAGER_STEPS:
            self._record(inputs)
        if self.replay is None or any(x.shape != static.shape for x, static in zip(inputs, self.inputs, strict=True)):
            self.eager_steps += 1
            return self.step(*inputs)
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x)
        self.replay()
        count = len(self.results) - len(self.parameters)
        for p, gradient in zip(self.parameters, self.results[count:], strict=True):
            p.grad = gradient
        return [result.clone() for result in self.results[:count]]  # the next replay overwrites the results

    def _record(self, inputs: Sequence[Tensor]) -> None:
        try:
            self.inputs = [x.clone() for x in inputs]
            self.replay, self.results = self.graphs.record(self._run)
        except RuntimeError as e:
            self.inputs = []
            self.graphs.give_up(e)
        for p in self.parameters:
            p.grad = None

    def _run(self) -> list[Tensor | None]:
        results = self.step(*self.inputs)
        return [*results, *(p.grad for p in self.parameters)]
