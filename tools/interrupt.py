"""Signals that ask a run to stop, and the command that goes on with it."""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.data import DataLoader

EXIT_CODES = {0: 0, signal.SIGTERM: 0, signal.SIGINT: 130}
"""Exit code of a run by the signal that stopped it: asked to make room, it has done so; interrupted, it says so."""

GRACE = 15


class StopRequest:
    """SIGTERM or SIGINT while in the context, remembered in `signal` until the run looks; a second SIGINT interrupts.

    Further SIGTERMs change nothing: launchers pass on the one that the processes have already had.
    """

    def __init__(self):
        self.signal = 0

    def __enter__(self) -> 'StopRequest':
        self.before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        self.signal = self.signal or number


def outlive_signals(_worker: int = 0) -> None:
    """For a process that loads images: the main process needs its images until the next update is done, and ends it.

    Ctrl-C and batch systems signal every process of a run. A worker ends `GRACE` seconds after SIGTERM, or at a second.
    """

    def end_later(number: int, _frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        signal.alarm(GRACE)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)


@contextmanager
def ended_with(*loaders: DataLoader) -> Iterator[None]:
    """End the processes that load images with the context, which torch leaves to the garbage collector.

    After an error that comes late, and such processes hold up the exit.
    """
    try:
        yield
    finally:
        for loader in loaders:
            if iterator := getattr(loader, '_iterator', None):
                iterator._shutdown_workers()


def resume_command(snapshot: Path) -> str:
    """The command that this process (or all processes of this run) was started with, going on from `snapshot`."""
    words, flags = [sys.argv[0]], iter(sys.argv[1:])
    for word in flags:
        name = word.split('=')[0]
        if name in ('--snapshot', '--local_rank', '--local-rank'):
            if name == word:
                next(flags, None)
            continue
        words.append(word)
    python = [sys.executable]
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        python += ['-m', 'torch.distributed.run', f'--nproc_per_node={os.environ.get("LOCAL_WORLD_SIZE", 1)}']
        if os.environ.get('GROUP_WORLD_SIZE', '1') != '1':
            python.append(f'--nnodes={os.environ["GROUP_WORLD_SIZE"]}')
    return shlex.join([*python, *words, '--snapshot', str(snapshot)])
