"""Requests to stop a run: signals, and losses that are NaN or infinite."""

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tools.distributed import launch_command
from tools.errors import INTERRUPTED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP)
"""Sent by batch systems before a time limit or a preemption, by Ctrl-C, and by a terminal that closes."""

GRACE = 15
"""Seconds that a process that loads images has after SIGTERM."""


class StopRequest:
    """Record of the first of `STOP_SIGNALS` in `signal`. Context manager.

    A second SIGINT interrupts. Further signals of other kinds change nothing: launchers pass on those that the
    processes already had. SIGHUP stays ignored if it is, as by `nohup`.
    """

    def __init__(self):
        self.signal = 0
        self.before = {}

    def __enter__(self) -> 'StopRequest':
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _record(self, number: int, _frame) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        self.signal = self.signal or number


def outlive_signals(_worker: int = 0) -> None:
    """Keep a process that loads images alive: the main process needs its images until the next update, then ends it.

    Ctrl-C and batch systems signal every process of a run. A worker ends `GRACE` seconds after SIGTERM, or at a second.
    """

    def end_later(number: int, _frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        signal.alarm(GRACE)

    for number in STOP_SIGNALS:
        signal.signal(number, end_later if number == signal.SIGTERM else signal.SIG_IGN)


@contextmanager
def ended_with(*loaders: DataLoader) -> Iterator[None]:
    """End the processes that load images with the context. Left to the garbage collector, they delay the exit."""
    try:
        yield
    finally:
        for loader in loaders:
            if iterator := getattr(loader, '_iterator', None):
                iterator._shutdown_workers()


def exit_code(stopped_by: int) -> int:
    """Return the exit code of a run, from the signal that stopped it (0: none did).

    It is 0 after other signals than SIGINT, since the run has done as asked.
    """
    return INTERRUPTED if stopped_by == signal.SIGINT else 0


def resume_command(snapshot: Path) -> str:
    """Return the command that resumes this run, in all its processes, from `snapshot`."""
    words, flags = [sys.argv[0]], iter(sys.argv[1:])
    for word in flags:
        name = word.split('=')[0]
        if name in ('--snapshot', '--local_rank', '--local-rank'):
            if name == word:
                next(flags, None)
            continue
        words.append(word)
    return shlex.join([*launch_command(), *words, '--snapshot', str(snapshot)])


class LossCheck:
    """Check of losses for NaN and infinity that does not wait for a GPU. `bad` names the first update with one.

    The verdict on an update is copied to the host while the GPU computes, and read at the next update or before a
    checkpoint.
    """

    def __init__(self, device: torch.device):
        on_gpu = device.type == 'cuda'
        self.finite = torch.ones((), dtype=torch.bool, pin_memory=on_gpu)
        self.copied = torch.cuda.Event() if on_gpu else None
        self.place, self.bad = '', ''

    def check(self, place: str, losses: Sequence[Tensor]) -> None:
        """Start the check of an update. `place`: name of the update."""
        self.read()
        self.finite.copy_(torch.stack([loss.detach() for loss in losses]).isfinite().all(), non_blocking=True)
        self.place = place
        if self.copied:
            self.copied.record()
        else:
            self.read()

    def read(self) -> None:
        """Read the verdict on the last update; waits for its losses."""
        if self.copied:
            self.copied.synchronize()
        if not self.finite:
            self.bad = self.bad or self.place
            self.finite.fill_(True)
