"""The folder of a run: its name, its lock, its log; and the progress of the run."""

import fcntl
import logging
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from tqdm import tqdm

from tools.distributed import World
from tools.environment import cores
from tools.errors import BadInput, silence
from tools.files import write_text
from tools.logs import close_log, open_log
from tools.options import changed_flags
from tools.run.metrics import MetricsFile

if TYPE_CHECKING:
    from tools.run.resume import Snapshot

log = logging.getLogger('tf-nas')

Item = TypeVar('Item')

FORMATS = {'lr': '.5f', 'loss': '.4f', 'top1': '.2f', 'top5': '.2f', 'latency': '.4f', 'images/s': '.1f'}
"""Formats of numbers, by the last part of their names (behind the last underscore)."""

SMOOTHING = 0.02
"""Weight of the newest step in the speed that the time left is estimated from."""


SKIPPED, WATCHED = 10, 100
"""First batches of a run, during which kernels are chosen and workers start; the batches after which it is judged."""

TOLERATED = 0.1
"""Share of the time that may pass waiting for images."""


RISE = 1.05
"""Training loss, over the lowest of earlier epochs, above which it counts as risen."""


class Waiting:
    """Time that a loop waits for batches, against the time that it uses them; one log line after `WATCHED` batches,
    if more than `TOLERATED` of the time is waiting.

    It is the host's time: nothing waits for a GPU. The host waits for a GPU at each step that reads a result, or if
    the GPU's queue is full.

    Args:
        images: of a batch, over all processes.
        advice: end of the line.
    """

    def __init__(self, images: int, advice: str):
        self.images, self.advice = images, advice
        self.batches, self.waited, self.used = 0, 0.0, 0.0

    def watch(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the batches."""
        iterator, first = iter(batches), True
        while True:
            asked = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            got = time.monotonic()
            yield batch
            if not first:  # whose waiting is the start of the workers
                self.add(got - asked, time.monotonic() - got)
            first = False

    def add(self, waited: float, used: float) -> None:
        """Count a batch: seconds until it came, and until the next one was asked for."""
        self.batches += 1
        if SKIPPED < self.batches <= WATCHED:
            self.waited, self.used = self.waited + waited, self.used + used
        if self.batches == WATCHED and self.waited > TOLERATED * (total := self.waited + self.used):
            images, share = self.images * (WATCHED - SKIPPED), 100 * self.waited / total
            given, needed = images / total, images / max(self.used, 1e-9)
            log.info(
                f'loading: {given:.0f} images/s come, the steps need {needed:.0f}; {share:.0f} % of the time is'
                f' waiting for images. {self.advice}'
            )


def make_run_folder(save: str | Path, kind: str, note: str) -> Path:
    """Make and return `<save>/<kind>-<time>-<note>/`, which did not exist before.

    Raises:
        BadInput: `save` cannot be written to.
    """
    if '/' in note or '\0' in note:
        raise BadInput(f'--note {note!r}: becomes part of the name of a folder; leave out the /')
    stem = f'{kind}-{time.strftime("%Y%m%d-%H%M%S")}-{note}'
    for suffix in ['', *(f'.{i}' for i in range(2, 100))]:
        folder = Path(save) / (stem + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as e:
            raise BadInput(f'--save {save}: cannot make a run folder there ({e.strerror})') from e
        return folder
    raise BadInput(f'--save {save}: too many runs of the same name {stem}')


def run_folders(save: str | Path, kind: str, note: str) -> list[Path]:
    """Return all folders that `make_run_folder` made with these arguments."""
    name = re.compile(rf'{kind}-\d{{8}}-\d{{6}}-{re.escape(note)}(\.\d+)?')
    return [folder for folder in Path(save).glob(f'{kind}-*/') if name.fullmatch(folder.name)]


class RunLogger:
    """Log file, metrics.jsonl and progress of a run; nothing in all processes but the first.

    Args:
        folder: of the run; None writes nothing.
        header: first line of metrics.jsonl, see `run_header`.
        position: (epoch, step) that the run goes on from.
        tensorboard: also write TensorBoard's files.
    """

    def __init__(
        self,
        folder: Path | None,
        header: dict[str, Any],
        position: tuple[int, int] = (0, 0),
        tensorboard: bool = False,
    ):
        self.folder = folder
        self.metrics = MetricsFile(folder, header, position, tensorboard)
        self.log_file = open_log(folder / 'log.txt') if folder else None
        self.lock: TextIO | None = None
        self.bar = tqdm(disable=True)
        self.waiting: dict[str, Waiting] = {}
        self.least_loss = math.inf

    @property
    def is_new(self) -> bool:
        """Whether the run began with this process."""
        return self.metrics.is_new

    @property
    def ended(self) -> bool:
        """Whether the run is finished."""
        return self.metrics.ended

    def close(self) -> None:
        """Close the files and unlock the folder; a process may begin other runs."""
        self.bar.close()
        self.metrics.close()
        if self.log_file:
            close_log(self.log_file)
        if self.lock:
            self.lock.close()

    def start_progress(self, total: int, done: int) -> None:
        """Show a bar on a terminal, and estimate the time left. `total`, `done`: steps of the whole run."""
        if not self.folder:
            return
        file = sys.stderr if sys.stderr.isatty() else open(os.devnull, 'w')  # noqa: SIM115
        self.bar = tqdm(total=total, initial=done, file=file, smoothing=SMOOTHING, unit='step', leave=False)

    def track(self, items: Iterable[Item], name: str) -> Iterator[Item]:
        """Yield the items, and count each as a step when it is done."""
        self.bar.set_description(name, refresh=False)
        for item in items:
            yield item
            try:
                self.bar.update()
            except OSError:  # the terminal is closed
                silence(sys.stderr)

    def watch(self, batches: Iterable[Item], flag: str, args) -> Iterator[Item]:
        """Yield the batches; log one line if they come more slowly than the run needs them, see `Waiting`.

        Args:
            flag: of the workers that load them; its loaders are watched as one.
            args: batch_size, and device_aug if there is a choice.
        """
        if flag not in self.waiting:
            advice = f'Give more {flag}, up to the {cores()} cores of this process'
            advice += '.' if getattr(args, 'device_aug', False) else ', or --device_aug.'
            self.waiting[flag] = Waiting(args.batch_size, advice)
        return self.waiting[flag].watch(batches)

    def watch_loss(self, epoch: int, loss: float) -> None:
        """Log a warning if the training loss of an epoch is `RISE` times the lowest since this process began."""
        if loss > RISE * self.least_loss:
            text = 'the training loss of epoch %d is %.4f, up from %.4f: a lower learning rate may help'
            log.warning(text, epoch, loss, self.least_loss)
        self.least_loss = min(self.least_loss, loss)

    def step(self, epoch: int, step: int, steps: int, **numbers: float) -> None:
        """Log the epoch so far, after `step` of its `steps`."""
        shown = {name: f'{value:.4g}' for name, value in numbers.items() if name[-2:] not in ('lr', 'p5')}
        self.bar.set_postfix(shown, refresh=False)
        words = ' '.join(
            f'{name} {value:{FORMATS.get(name.rpartition("_")[2], ".4f")}}' for name, value in numbers.items()
        )
        log.info('epoch %d step %d/%d %s eta %s', epoch, step, steps, words, self.time_left())
        self.record('step', epoch, step, steps=steps, **numbers)

    def time_left(self) -> str:
        """Return tqdm's estimate of the time from the end of this step to that of the run, such as '1:02:03'."""
        if self.bar.disable:
            return '?'
        progress = self.bar.format_dict
        rate = progress['rate'] or (progress['n'] - progress['initial']) / max(progress['elapsed'], 1e-9)
        left = progress['total'] - progress['n'] - 1  # the step in progress is done, but not counted yet
        return tqdm.format_interval(left / rate) if rate > 0 else '?'

    def record(self, kind: str, epoch: int, step: int | None = None, **values: Any) -> None:
        """Append a line to metrics.jsonl."""
        self.metrics.append(kind, epoch, step, **values)


def open_run(
    args,
    world: World,
    prefix: str,
    snapshot: 'Snapshot',
    position: tuple[int, int],
    header: dict[str, Any],
    files: dict[str, str] | None = None,
) -> RunLogger:
    """Open the folder of a run: that of the snapshot if it has one, else a new one.

    Args:
        args: save, note and tensorboard.
        prefix: of the folder's name.
        position: (epoch, step) that the run goes on from.
        header: first line of metrics.jsonl, see `run_header`.
        files: texts that the folder gets, by name.

    Raises:
        BadInput: the folder cannot be written to, or another run is writing into it.
    """
    if not world.is_first:
        return RunLogger(None, header)
    folder = snapshot.folder or make_run_folder(args.save, prefix, args.note)
    lock = _lock(folder)
    for leftover in folder.glob('.*.pth.tar.*'):  # of a run that was killed while it wrote
        leftover.unlink()
    for path in snapshot.later:  # or the next resume would take them
        path.replace(path.with_name(f'{path.name}.superseded'))
    for name, text in (files or {}).items():
        write_text(folder / name, text)
    logger = RunLogger(folder, header, position, args.tensorboard)
    logger.lock = lock
    environment = header['environment']
    log.info('flags: %s', shlex.join(changed_flags(args)))
    log.info('%s; device: %s; torch %s', folder, environment['device'], environment['torch'])
    for name, value in header['flags'].items():
        log.debug('--%s %s', name, value)
    for name, value in environment.items():
        log.debug('%s: %s', name, value)
    if snapshot.later:
        names = ', '.join(path.name for path in snapshot.later)
        log.info('renamed checkpoints from beyond this position to *.superseded: %s', names)
    return logger


def _lock(folder: Path) -> TextIO:
    """Keep other runs out of a folder until the file that is returned is closed.

    A POSIX lock: processes that load images, which may outlive a kill by seconds, do not inherit it.
    """
    try:
        file = open(folder / '.lock', 'a')  # noqa: SIM115
    except OSError as e:
        raise BadInput(f'{folder}: cannot be written to ({e.strerror})') from e
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:
        raise BadInput(f'{folder}: another run is writing into this folder; wait for its end, or stop it') from e
    except OSError:  # a file system without locks
        pass
    return file
