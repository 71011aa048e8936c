"""Costs of a step: time, launches, memory traffic, memory kept for the backward pass, synchronisations."""

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
"""Operators other than views that launch no kernel."""


class Calls(TorchDispatchMode):
    """Counter of operators, forward and backward, without views and allocations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or func.overloadpacket.__name__ in FREE)
        return func(*args, **(kwargs or {}))


class Traffic(TorchDispatchMode):
    """Counter of the bytes that operators read and write, without views."""

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
    """Return the memory that autograd keeps for the backward pass of the result of `forward`, in MB."""
    storages, alive = {}, []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor.detach())  # keeps the storage alive, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storages.values()) / 1e6


@contextmanager
def host_reads(names: Sequence[str] = READS):
    """Count how often the host reads a tensor within the context. Yields a list with the count."""
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
    """One of the implementations that a benchmark compares, in a separate process with its own allocator settings.

    It runs only during `call`, so that several rivals can alternate.

    Args:
        make: a module-level function that runs in the process: `make(*args)` -> functions by name.
    """

    def __init__(self, make: Callable[..., Mapping[str, Callable]], *args):
        context = multiprocessing.get_context('spawn')
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, make, args, torch.get_num_threads()), daemon=True)
        self.process.start()
        other.close()

    def call(self, name: str):
        """Call the function of that name in the process and return its result."""
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
    """Return the medians of the named functions' results by rival, over rounds in which all rivals alternate.

    An additional first round warms up.
    """
    results = {rival: [[] for _ in names] for rival in rivals}
    for turn in range(rounds + 1):
        for rival, columns in results.items():
            for name, column in zip(names, columns, strict=True):
                value = rivals[rival].call(name)
                column += [value] if turn else []
    return {rival: [statistics.median(column) for column in columns] for rival, columns in results.items()}


def seconds(step: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Return the time of one call in seconds, including its work on the device."""
    _wait(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    _wait(device)
    return (time.perf_counter() - begin) / repeats


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
