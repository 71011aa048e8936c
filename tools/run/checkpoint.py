"""Checkpoints written beside a run."""

import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from tools.distributed import World
from tools.errors import BadInput, RunFailed
from tools.files import save_and_keep_previous, save_checkpoint
from tools.run.folder import Watch
from tools.run.resume import CHECKPOINT
from tools.run.stop import EXIT_CODES, LossGuard, StopRequest, resume_command

Save = Callable[[dict], None]
"""Writes a checkpoint of these contents."""


class State(Protocol):
    """Where a run stands: `step` batches of `epoch` are done, and `sums` are those of their tallies, in a row."""

    epoch: int
    step: int
    sums: list[float]

    @property
    def lr(self) -> float:
        """Learning rate of the weights."""

    def to_checkpoint(self, args) -> dict:
        """The contents of a checkpoint file."""


class Writer:
    """Writes checkpoints in a thread beside the run, one after the other.

    What is written is copied first, so that the run may go on changing it. An error that the thread meets comes out of
    the next call.

    Raises (in all calls):
        OSError: a checkpoint could not be written; the files that were there before are as they were.
    """

    def __init__(self):
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def write(self, data: dict, *saves: Save) -> None:
        """Wait until the last checkpoint is written, then begin with this one."""
        self.finish()
        self.thread = threading.Thread(target=self._run, args=(copied(data), saves))
        self.thread.start()

    def check(self) -> None:
        """Report what the thread has met so far."""
        if self.error:
            error, self.error = self.error, None
            raise error

    def finish(self) -> None:
        """Wait until the last checkpoint is written."""
        if self.thread:
            self.thread.join()
        self.check()

    def _run(self, data: dict, saves: tuple[Save, ...]) -> None:
        try:
            for save in saves:
                save(data)
        except BaseException as e:
            self.error = e


def copied(value: Any) -> Any:
    """The value with all tensors copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to('cpu', copy=True)
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    return type(value)(map(copied, value)) if isinstance(value, (list, tuple)) else value


class Keeper:
    """Writes the checkpoints of a run, and knows whether the run is to stop; a context of the run.

    Args:
        folder: gets the files; None in processes that write nothing.
        world: its processes agree on stopping after the same update.
        args: save_freq and on_nan, and all else for the checkpoints.
        environment: what the run is made with, for the checkpoints.
    """

    def __init__(self, folder: Path | None, watch: Watch, world: World, args, environment: dict):
        self.folder, self.watch, self.world, self.args, self.environment = folder, watch, world, args, environment
        self.stop, self.writer, self.guard = StopRequest(), Writer(), LossGuard(world, args.on_nan)
        self.signal, self.saved_at = 0, time.monotonic()

    def __enter__(self) -> 'Keeper':
        self.stop.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            self.writer.finish()
        except Exception:
            if kind is None:  # otherwise the first error counts
                raise
        finally:
            self.stop.__exit__()
            is_new = self.watch.metrics and self.watch.metrics.is_new
            if is_new and kind and issubclass(kind, BadInput) and not any(self.folder.glob('*.pth.tar')):
                shutil.rmtree(self.folder)  # bad input, such as an image, that showed before there was a result

    def allows_update(self, state: State, losses: Sequence[Tensor]) -> bool:
        """Whether to make the update that these losses belong to: see `LossGuard`."""
        place = f'epoch {state.epoch} step {state.step + 1} (learning rate {state.lr:.3g})'
        allowed = self.guard.allows(place, losses)
        if not allowed and self.guard.skips:
            self.watch.log('the loss is NaN or infinite at %s: left out', place)
        return allowed

    def after_update(self, state: State, *tallies) -> bool:
        """Save where `args.save_freq` minutes are over or a signal came; returns whether to stop.

        Raises:
            RunFailed: the loss was NaN or infinite.
            OSError: a checkpoint could not be written.
        """
        self.writer.check()
        due = self.world.is_first and time.monotonic() - self.saved_at >= 60 * self.args.save_freq
        due, self.signal, bad = self.world.agree(due, self.stop.signal, self.guard.bad != '')
        if bad or due or self.signal:
            state.sums = [number for tally in tallies for number in tally.total(self.world)]
            self.save(state)
        return self.signal != 0

    def stops(self) -> bool:
        """Whether a signal came, to any process."""
        (self.signal,) = self.world.agree(self.stop.signal)
        return self.signal != 0

    def save(self, state: State, is_best: bool = False) -> None:
        """Write `checkpoint.pth.tar` and, where it is the best, `model_best.pth.tar`."""
        folder = self.folder or Path()
        best = [partial(save_checkpoint, path=folder / 'model_best.pth.tar')] if is_best else []
        self.write(state, *best, partial(save_and_keep_previous, path=folder / CHECKPOINT))

    def write(self, state: State, *saves: Save) -> None:
        """Write a checkpoint in some ways, unless an update should not have been made; called by all processes."""
        self.stop_at_bad_loss()
        self.saved_at = time.monotonic()
        if self.folder:
            self.writer.write(state.to_checkpoint(self.args) | {'environment': self.environment}, *saves)

    def stop_at_bad_loss(self) -> None:
        """Raise RunFailed where the loss of an update, the last one too, was NaN or infinite in any process."""
        self.guard.look()
        (bad,) = self.world.agree(self.guard.bad != '')
        if not bad:
            return
        self.writer.finish()
        where = f'at {self.guard.bad}' if self.guard.bad else 'in another process'
        files = self.folder.glob('[!.]*.pth.tar') if self.folder else ()
        newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
        last = f'the last good checkpoint is {newest}' if newest else 'no checkpoint is written yet'
        raise RunFailed(f'the loss is NaN or infinite {where}; {last}; --on_nan skip leaves such updates out')

    def remove_checkpoints(self) -> None:
        """Remove what a finished run needs no more: the checkpoints from within its epochs."""
        self.writer.finish()
        for path in self.folder.glob('checkpoint*.pth.tar') if self.folder else ():
            path.unlink()

    def exit_code(self) -> int:
        """The exit code of the run, which is over; the log gets the command that goes on where a signal stopped it."""
        if self.signal:
            self.watch.log('stopped by %s; to go on:', signal.Signals(self.signal).name)
            if self.folder:
                self.watch.log(resume_command(self.folder / CHECKPOINT))
        return EXIT_CODES[self.signal]
