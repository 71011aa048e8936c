"""Checkpoints of a run, and stop requests."""

import logging
import shutil
import signal
import time
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from tools.distributed import World
from tools.errors import BadInput, RunFailed
from tools.files import save_and_keep_previous, save_checkpoint
from tools.run.folder import RunLogger
from tools.run.resume import CHECKPOINT
from tools.run.stop import LossCheck, StopRequest, exit_code, resume_command

log = logging.getLogger('tf-nas')


class State(Protocol):
    """State of a run. `epoch` and `step`: the next batch to train."""

    epoch: int
    step: int

    @property
    def lr(self) -> float:
        """Learning rate of the weights."""

    def to_checkpoint(self, flags: dict[str, Any]) -> dict:
        """Return the contents of a checkpoint file."""


class Checkpointer:
    """Save checkpoints and handle stop requests. Context manager.

    All processes of a run call the same methods in the same order; only the first one writes files.

    Args:
        logger: of the run; its folder gets the files.
        save_freq: minutes between two checkpoints within an epoch.
        flags: of the run, for the checkpoints.
        about: more entries of the checkpoints, such as the environment and the names of the classes.
    """

    def __init__(self, logger: RunLogger, world: World, save_freq: float, flags: dict[str, Any], about: dict[str, Any]):
        self.logger, self.world, self.save_freq = logger, world, save_freq
        self.flags, self.about = flags, about
        self.stop_request, self.loss_check = StopRequest(), LossCheck(world.device)
        self.signal, self.saved_at = 0, time.monotonic()

    def __enter__(self) -> 'Checkpointer':
        self.stop_request.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self.stop_request.__exit__()
        folder = self.logger.folder
        if self.logger.is_new and kind and issubclass(kind, BadInput) and not any(folder.glob('*.pth.tar')):
            shutil.rmtree(folder)  # bad input, such as an image, that was found before there was a result

    def allows_update(self, state: State, losses: Sequence[Tensor]) -> bool:
        """Whether no loss so far was NaN or infinite. On a GPU the losses given here count at the next call only."""
        place = f'epoch {state.epoch} step {state.step + 1} (learning rate {state.lr:.3g})'
        self.loss_check.check(place, losses)
        return not self.loss_check.bad

    def is_due(self) -> bool:
        """Whether to save now: `save_freq` minutes are over, a signal came, or a loss was bad (then `save` raises)."""
        due = self.world.is_first and time.monotonic() - self.saved_at >= 60 * self.save_freq
        due, self.signal, bad = self.world.all_max(due, self.stop_request.signal, self.loss_check.bad != '')
        return bool(due or self.signal or bad)

    def stop_requested(self) -> bool:
        """Whether a signal came to any process."""
        (self.signal,) = self.world.all_max(self.stop_request.signal)
        return self.signal != 0

    def save(self, state: State) -> None:
        """Save `checkpoint.pth.tar`; the one before becomes `checkpoint.previous.pth.tar`. Errors: see `save_as`."""
        self._save(state, CHECKPOINT, save_and_keep_previous)

    def save_as(self, state: State, name: str) -> None:
        """Save a checkpoint under another name.

        Raises:
            RunFailed: the loss of an update, the last one included, was NaN or infinite in some process.
            OSError: the disk is full, or the like; earlier files are as they were.
        """
        self._save(state, name, save_checkpoint)

    def _save(self, state: State, name: str, save) -> None:
        self._stop_at_bad_loss()
        self.saved_at = time.monotonic()
        if self.logger.folder:
            checkpoint = state.to_checkpoint(self.flags) | self.about
            save(_on_cpu(checkpoint), self.logger.folder / name)

    def _stop_at_bad_loss(self) -> None:
        self.loss_check.read()
        (bad,) = self.world.all_max(self.loss_check.bad != '')
        if not bad:
            return
        place = f'at {self.loss_check.bad}' if self.loss_check.bad else 'in another process'
        files = self.logger.folder.glob('[!.]*.pth.tar') if self.logger.folder else ()
        newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
        last = f'the last good checkpoint is {newest}' if newest else 'no checkpoint is written yet'
        raise RunFailed(f'the loss is NaN or infinite {place}; {last}; a smaller learning rate may help')

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints from within the epochs, which a finished search does not need."""
        for path in self.logger.folder.glob('checkpoint*.pth.tar') if self.logger.folder else ():
            path.unlink()

    def exit_code(self) -> int:
        """Return the exit code of the run, and log the command that resumes it if a signal stopped it."""
        if self.signal:
            log.info('stopped by %s; to go on:', signal.Signals(self.signal).name)
            if self.logger.folder:
                log.info(resume_command(self.logger.folder / CHECKPOINT))
        return exit_code(self.signal)


def _on_cpu(value: Any) -> Any:
    """Return the value with all tensors on the CPU, so that the file can be read where there is no GPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    return type(value)(map(_on_cpu, value)) if isinstance(value, (list, tuple)) else value
