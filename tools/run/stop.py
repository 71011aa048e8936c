"""What stops a run: signals, and losses that are NaN or infinite."""

import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
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


class LossCheck:
    """Check of losses for NaN and infinity that does not wait for a GPU. `bad` names the first update with one.

    The verdict on an update is copied beside the computation, and read at the next update or before a checkpoint.
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
