"""Calls in a new process, whose heap has no history: what a CPU's timings need to be the same from run to run."""

import multiprocessing
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from tools.memory import keep_freed_memory, use_huge_pages


def in_fresh_process(call: Callable, *args: Any) -> Any:
    """`call(*args)` in a new process with the same number of CPU threads; its result comes back.

    A forked child where this process runs on one thread, which starts at once; otherwise a spawned one, since a forked
    child must not use the thread pool of its parent.

    Raises:
        RuntimeError: the call failed there (its traceback is on stderr) or the process died.
    """
    threads = torch.get_num_threads()
    context = multiprocessing.get_context('fork' if threads == 1 else 'spawn')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, threads, call, args), daemon=True)
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f'the process of {call} ended with {process.exitcode} and no result') from None
    process.join()
    return result


def _answer(sender: Connection, threads: int, call: Callable, args: tuple) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()
    use_huge_pages()
    try:
        sender.send(call(*args))
    except Exception:  # reported here; the parent sees a process without a result
        traceback.print_exc()
        sys.exit(1)
