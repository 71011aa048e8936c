"""Calls in new processes, whose heap has no history but a random layout: what a CPU's timings need, so that their means
are the same from run to run."""

import ctypes
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tools.environment import _libc, keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent


class FreshProcess:
    """`call`, in a new process with the same number of CPU threads: what it keeps stays there for the next time.

        with FreshProcess(call) as there:
            there(*args)

    New processes are forked from one that only reads what is to be called: its heap does not depend on what else runs
    here or has run before, and it has no threads that a fork would lose. Where their tensors lie is drawn anew in each
    (`shuffle_heap`). What is called must be importable from the project's modules.
    """

    def __init__(self, call: Callable):
        self._call = call
        self._connection, its = Pipe()
        try:
            with its:
                socket.send_fds(_forker(), [b'.'], [its.fileno()])
            with suppress(OSError):  # it has died, which is found out at the first call
                self._connection.send((torch.get_num_threads(), call))
        except BaseException:  # the forker would wait for what is to be called
            self._connection.close()
            raise

    def __enter__(self) -> 'FreshProcess':
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()  # which ends it

    def __call__(self, *args: Any) -> Any:
        """The result of the call there.

        Raises:
            RuntimeError: the call failed there (its traceback is on stderr) or the process died.
        """
        try:
            self._connection.send(args)
            return self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f'the process of {self._call} ended without a result') from None


def in_fresh_process(call: Callable, *args: Any) -> Any:
    """`call(*args)` in a `FreshProcess` of its own."""
    with FreshProcess(call) as there:
        return there(*args)


def _forker() -> socket.socket:
    """The other end of the process that forks new ones, which starts at the first call and ends with this process."""
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the process that asks
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that end
    while True:
        _, connections, *_ = socket.recv_fds(asked, 1, 1)
        if not connections:
            return
        with Connection(connections[0]) as connection:
            try:
                threads, call = connection.recv()  # here, so that the modules it needs are imported once
            except EOFError:  # nobody asks any more
                continue
            except BaseException:  # reported here; who asked is told that there is no result
                traceback.print_exc()
                continue
            if os.fork() == 0:
                asked.close()
                _answer(connection, threads, call)


def _answer(connection: Connection, threads: int, call: Callable) -> None:
    """Send what the calls return, until the other end is closed; end this process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    random.seed()
    torch.set_num_threads(threads)
    keep_freed_memory()
    use_huge_pages()
    shuffle_heap()
    try:
        while True:
            args = connection.recv()
            try:
                result = call(*args)
            except BaseException:  # reported here; who asked is told that there is no result
                traceback.print_exc()
                os._exit(1)
            connection.send(result)
    except (EOFError, OSError):  # nobody asks any more
        os._exit(0)


HUGE_HEAP = 2**30
"""Bytes at the start of the heap that are in huge pages, which are taken only when they are used."""


PIECES, SMALLEST, LARGEST = 100, 2**10, 2**22
"""Pieces that `shuffle_heap` puts into the heap, and their bytes."""


def use_huge_pages() -> None:
    """Ask that what this process allocates from now on is in pages of 2 MB, for timings: with pages of 4 KB, a
    network's speed depends on where in memory its pages happen to lie, from process to process. To be called after
    `keep_freed_memory`. No effect without glibc, or where the system has no such pages to give.
    """
    libc = _libc()
    if not libc:
        return
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(HUGE_HEAP)
    if start:
        first_page = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        libc.madvise(first_page, start + HUGE_HEAP - first_page, mmap.MADV_HUGEPAGE)
        libc.free(start)  # kept as the heap's top, which is handed out next


def shuffle_heap() -> None:
    """Let what this process allocates from now on lie at random places, for timings: by how the addresses of its
    tensors collide in the caches, a network takes some per cent more or less, and a block of many pixels up to a third.
    Processes forked from one would all have the same collisions. No effect without glibc.
    """
    if libc := _libc():
        pieces = [libc.malloc(int(SMALLEST * (LARGEST / SMALLEST) ** random.random())) for _ in range(PIECES)]
        for piece in random.sample(pieces, PIECES // 2):
            libc.free(piece)


if __name__ == '__main__':
    _serve(socket.socket(fileno=int(sys.argv[1])))
