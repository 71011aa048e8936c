"""Calls in a new process, whose heap has no history: what a CPU's timings need to be the same from run to run."""

import os
import signal
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

from tools.memory import keep_freed_memory, use_huge_pages

ROOT = Path(__file__).resolve().parent.parent


def in_fresh_process(call: Callable, *args: Any) -> Any:
    """`call(*args)` in a new process with the same number of CPU threads; its result comes back.

    New processes are forked from one that does nothing else: its heap is the same whatever runs here or has run before,
    and it has no threads that a fork would lose. What is called must be importable from the project's modules.

    Raises:
        RuntimeError: the call failed there (its traceback is on stderr) or the process died.
    """
    connection = _forker()
    try:
        connection.send((torch.get_num_threads(), call, args))
        result, status = connection.recv()
    except (EOFError, OSError):
        _forker.cache_clear()
        raise RuntimeError(f'{call}: the process that starts new ones died') from None
    except KeyboardInterrupt:
        _forker.cache_clear()  # its answer must not be taken for that of the next call
        raise
    if status:
        raise RuntimeError(f'the process of {call} ended with {status} and no result')
    return result


@cache
def _forker() -> Connection:
    """The other end of the process that forks new ones, which starts at the first call and ends with this process."""
    ours, its = Pipe()
    with its:
        command = [sys.executable, '-m', 'tools.fresh', str(its.fileno())]
        subprocess.Popen(command, cwd=ROOT, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)
    return ours


def _serve(connection: Connection) -> None:
    """Fork a process for each call that arrives, one after the other, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the process that asks
    with suppress(EOFError, OSError):
        while True:
            request = connection.recv()
            pid = os.fork()
            if pid == 0:
                _answer(connection, *request)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if status:
                connection.send((None, status))


def _answer(connection: Connection, threads: int, call: Callable, args: tuple) -> None:
    """Send what a call returns, and end this process."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    use_huge_pages()
    try:
        result = call(*args)
    except BaseException:  # reported here; who asked is told that there is no result
        traceback.print_exc()
        os._exit(1)
    with suppress(OSError):  # nobody waits for it any more
        connection.send((result, 0))
    os._exit(0)


if __name__ == '__main__':
    _serve(Connection(int(sys.argv[1])))
