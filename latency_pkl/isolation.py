"""Calls in new processes whose heaps have no history but a random layout.

Timings on a CPU need this, for means that are the same from run to run.
"""

import ctypes
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch

from tools.environment import ROOT, _libc, keep_freed_memory
from tools.errors import BadInput


class FreshProcess:
    """A new process, with the same number of CPU threads, that runs `call`. Its state is kept between calls.

        with FreshProcess(call) as there:
            there(*args)

    With one thread, all these processes share one core. New processes are forked from one that only imports the
    callables. Its heap does not depend on what runs or ran here, and it has no threads that a fork would lose. Each has
    a random heap layout (`shuffle_heap`). `call` must be importable from the project's modules.
    """

    def __init__(self, call: Callable):
        self._call, self._core = call, fastest_core() if torch.get_num_threads() == 1 else None
        self._connection, its = Pipe()
        try:
            with its:
                socket.send_fds(_forker(), [b'.'], [its.fileno()])
            with suppress(OSError):  # if it has died, the first call raises
                self._connection.send((torch.get_num_threads(), self._core, call))
        except BaseException:  # the forker would wait for the call
            self._connection.close()
            raise

    def __enter__(self) -> 'FreshProcess':
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()  # this ends the process

    def __call__(self, *args: Any) -> Any:
        """Return the result of the call.

        Raises:
            BadInput: the call raised it.
            RuntimeError: the call failed (its traceback is on stderr) or the process died.
        """
        with bound_to(self._core):  # a call from another core would wake that up, and slow this one down
            try:
                self._connection.send(args)
                result = self._connection.recv()
            except (EOFError, OSError):
                raise RuntimeError(f'the process of {self._call} ended without a result') from None
        if isinstance(result, BadInput):
            raise result
        return result


def in_fresh_process(call: Callable, *args: Any) -> Any:
    """Return `call(*args)` from a new `FreshProcess`."""
    with FreshProcess(call) as there:
        return there(*args)


SUMS, SUMMED = 20, range(2000)
"""Sums that are timed on each core, and what is summed: 0.03 ms."""


@cache
def fastest_core() -> int | None:
    """Return the core on which a short sum is fastest; None if processes cannot be bound to cores here.

    Timings that move between cores, or whose caller is on another one, differ by some per cent more from build to
    build. Cores can differ in speed, so one is chosen by its own.
    """
    if not hasattr(os, 'sched_setaffinity'):
        return None
    times = {}
    for core in os.sched_getaffinity(0):
        with suppress(OSError), bound_to(core):
            marks = [(time.perf_counter(), sum(SUMMED), time.perf_counter()) for _ in range(SUMS)]
            times[core] = min(end - start for start, _, end in marks)
    return min(times, key=times.get, default=None)


@contextmanager
def bound_to(core: int | None) -> Iterator[None]:
    """Bind this thread to a core for a while; None: leave it as it is."""
    if core is None:
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _forker() -> socket.socket:
    """Return a socket to the process that forks new ones. It starts at the first call and ends with this process."""
    process, ours = _start_forker()
    if process.poll() is not None:
        _start_forker.cache_clear()
        _, ours = _start_forker()
    return ours


@cache
def _start_forker() -> tuple[subprocess.Popen, socket.socket]:
    ours, its = socket.socketpair()
    with its:
        command = [sys.executable, '-m', 'latency_pkl.isolation', str(its.fileno())]
        return subprocess.Popen(command, cwd=ROOT, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL), ours


def _serve(asked: socket.socket) -> None:
    """Fork a process for each connection that arrives, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the caller
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while True:
        _, connections, *_ = socket.recv_fds(asked, 1, 1)
        if not connections:
            return
        with Connection(connections[0]) as connection:
            try:
                threads, core, call = connection.recv()  # imports the modules of the call once, for all forks
            except EOFError:  # the caller is gone
                continue
            except BaseException:  # the caller sees a closed connection
                traceback.print_exc()
                continue
            if os.fork() == 0:
                asked.close()
                _answer(connection, threads, core, call)


def _answer(connection: Connection, threads: int, core: int | None, call: Callable) -> None:
    """Send the results of calls until the other end is closed, then end this process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    random.seed()
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(threads)
    keep_freed_memory()
    use_huge_pages()
    shuffle_heap()
    try:
        while True:
            args = connection.recv()
            try:
                result = call(*args)
            except BadInput as e:  # for the user, raised by the caller
                result = e
            except BaseException:  # the caller sees a closed connection
                traceback.print_exc()
                os._exit(1)
            connection.send(result)
    except (EOFError, OSError):  # the caller is gone
        os._exit(0)


HUGE_HEAP = 2**30
"""Bytes at the start of the heap that are in huge pages. Memory is used only when it is written to."""

PIECES, SMALLEST, LARGEST = 100, 2**10, 2**22
"""Number of pieces that `shuffle_heap` allocates, and their least and most bytes."""


def use_huge_pages() -> None:
    """Ask for pages of 2 MB for all later allocations of this process.

    With pages of 4 KB, a network's speed depends on their addresses and differs between processes. Call this after
    `keep_freed_memory`. No effect without glibc, or if the system has no such pages.
    """
    libc = _libc()
    if not libc:
        return
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(HUGE_HEAP)
    if start:
        first_page = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        libc.madvise(first_page, start + HUGE_HEAP - first_page, mmap.MADV_HUGEPAGE)
        libc.free(start)  # stays the heap's top, which is allocated next


def shuffle_heap() -> None:
    """Randomize the addresses of all later allocations of this process.

    Collisions of addresses in the caches change the time of a network by some per cent, of a block with many pixels by
    up to a third. Processes forked from one would all have the same collisions. No effect without glibc.
    """
    if libc := _libc():
        pieces = [libc.malloc(int(SMALLEST * (LARGEST / SMALLEST) ** random.random())) for _ in range(PIECES)]
        for piece in random.sample(pieces, PIECES // 2):
            libc.free(piece)


if __name__ == '__main__':
    _serve(socket.socket(fileno=int(sys.argv[1])))
