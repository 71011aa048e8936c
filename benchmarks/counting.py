"""What a step costs: time, launches, memory traffic, what is kept for the backward pass, waits of the host."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ('item', 'tolist', 'cpu', 'numpy', '__bool__', '__int__', '__float__', '__index__')
"""Methods of a tensor that make the host wait for a GPU."""

FREE = ('empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', '_unsafe_view', 'detach')
"""Operators that launch nothing, beside views."""


class Calls(TorchDispatchMode):
    """Counts operators that compute, forward and backward; views and allocations are not counted."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or func.overloadpacket.__name__ in FREE)
        return func(*args, **(kwargs or {}))


class Traffic(TorchDispatchMode):
    """Bytes of all tensors that operators read and write, views not counted."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def saved_megabytes(forward: Callable[[], Tensor]) -> float:
    """Memory of all storages that autograd keeps for the backward pass of what `forward` returns, in MB."""
    storages, alive = {}, []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor.detach())  # so that no storage takes the place of another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storages.values()) / 1e6


@contextmanager
def host_reads(names: Sequence[str] = READS):
    """Counts in a list of one how often the host reads a tensor within the context, which on a GPU makes it wait."""
    count, originals = [0], {name: getattr(Tensor, name) for name in names}

    def counted(original):
        def read(*args, **kwargs):
            count[0] += 1
            return original(*args, **kwargs)

        return read

    try:
        for name, original in originals.items():
            setattr(Tensor, name, counted(original))
        yield count
    finally:
        for name, original in originals.items():
            setattr(Tensor, name, original)


class Rival:
    """One of the forms that a benchmark compares, in a process of its own, as its users run it: what it asks of the
    allocator is its own. It works when it is called, so several forms take turns.

    Args:
        make: a function of a module, run there: `make(*args)` -> functions by name.
    """

    def __init__(self, make: Callable[..., Mapping[str, Callable]], *args):
        context = multiprocessing.get_context('spawn')
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, make, args, torch.get_num_threads()), daemon=True)
        self.process.start()
        other.close()

    def call(self, name: str):
        """What the function of that name returns there."""
        self.pipe.send(name)
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join()


def _serve(pipe: Connection, make: Callable, args: tuple, threads: int) -> None:
    torch.set_num_threads(threads)
    functions = make(*args)
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        pipe.send(functions[name]())


def take_turns(rivals: Mapping[str, Rival], names: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Medians of what the named functions of every rival return, over rounds in which all take turns; one round more
    goes before them and warms up."""
    results = {rival: [[] for _ in names] for rival in rivals}
    for turn in range(rounds + 1):
        for rival, columns in results.items():
            for name, column in zip(names, columns, strict=True):
                value = rivals[rival].call(name)
                column += [value] if turn else []
    return {rival: [statistics.median(column) for column in columns] for rival, columns in results.items()}


def seconds(step: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Time of one call, with all that it gave the device to do."""
    _wait(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    _wait(device)
    return (time.perf_counter() - begin) / repeats


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
