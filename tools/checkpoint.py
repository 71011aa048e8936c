"""Checkpoints of a run: saving them, stopping with one, and the one that a run resumes from."""

import itertools
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tools.distributed import World, launch_command
from tools.errors import INTERRUPTED, BadInput, RunFailed
from tools.files import load_checkpoint, save_checkpoint
from tools.run import METRICS, RunLogger, run_folders

log = logging.getLogger('tf-nas')

CHECKPOINT = 'checkpoint.pth.tar'
IMAGES = 'images'  # key of the digest of a run's image lists
POSITION_FLAGS = {'batch_size', 'seed', 'grad_accum'}  # the position within an epoch depends on them
NUMBER = int | float
UNREADABLE = math.inf, math.inf  # position of a file that cannot be read, beyond all others
GRACE = 15  # seconds that a process that loads images has after SIGTERM

# flags whose differences are not reported, when a run resumes or when runs are compared
HARMLESS = {
    'snapshot', 'save', 'note', 'device', 'workers', 'val_workers', 'print_freq', 'save_freq', 'keep_checkpoints',
    'local_rank', 'max_steps', 'tensorboard', 'report', 'deterministic',
}  # fmt: skip

# sent by batch systems before a time limit or a preemption, by Ctrl-C, and by a terminal that closes
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP)


# ---------------------------------------------------------------- saving


class Checkpointer:
    """Save checkpoints and handle stop requests. Context manager.

    All processes of a run call the same methods in the same order; only the first one writes files. A state has `epoch`
    and `step` of the next batch to train, `lr`, and `to_checkpoint(flags)`.

    Args:
        save_freq: minutes between two checkpoints within an epoch.
        flags: of the run, for the checkpoints.
        about: more entries of the checkpoints, such as the environment and the names of the classes.
    """

    def __init__(self, logger: RunLogger, world: World, save_freq: float, flags: dict[str, Any], about: dict[str, Any]):
        self.logger, self.folder, self.world, self.save_freq = logger, logger.folder, world, save_freq
        self.flags, self.about = flags, about
        self.stop_request, self.loss_check = StopRequest(), LossCheck(world.device)
        self.signal, self.saved_at = 0, time.monotonic()

    def __enter__(self) -> 'Checkpointer':
        self.stop_request.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self.stop_request.__exit__()
        if self.logger.is_new and kind and issubclass(kind, BadInput) and not any(self.folder.glob('*.pth.tar')):
            shutil.rmtree(self.folder)  # bad input, such as an image, that was found before there was a result

    def allows_update(self, state: Any, losses: Sequence[Tensor]) -> bool:
        """Return whether no loss so far was NaN or infinite. On a GPU the losses given now count at the next call."""
        place = f'epoch {state.epoch} step {state.step + 1} (learning rate {state.lr:.3g})'
        self.loss_check.check(place, losses)
        return not self.loss_check.bad

    def is_due(self) -> bool:
        """Return whether to save: after `save_freq` minutes, after a signal, or after a bad loss (`save` raises)."""
        due = self.world.is_first and time.monotonic() - self.saved_at >= 60 * self.save_freq
        due, self.signal, bad = self.world.all_max(due, self.stop_request.signal, self.loss_check.bad != '')
        return bool(due or self.signal or bad)

    def stop_requested(self) -> bool:
        """Return whether a signal came to any process."""
        (self.signal,) = self.world.all_max(self.stop_request.signal)
        return self.signal != 0

    def save(self, state: Any) -> None:
        """Save `checkpoint.pth.tar`; the one before becomes `checkpoint.previous.pth.tar`. Errors: see `save_as`."""
        self.save_as(state, CHECKPOINT, keep_previous)

    def save_as(self, state: Any, name: str, before_rename: Callable[[Path], None] = lambda path: None) -> None:
        """Save a checkpoint under another name.

        Raises:
            RunFailed: the loss of an update, the last one included, was NaN or infinite in some process.
            OSError: such as a full disk; earlier files are as they were.
        """
        self._stop_at_bad_loss()
        self.saved_at = time.monotonic()
        if self.folder:
            path = self.folder / name
            checkpoint = state.to_checkpoint(self.flags) | self.about
            save_checkpoint(_on_cpu(checkpoint), path, lambda: before_rename(path))

    def _stop_at_bad_loss(self) -> None:
        self.loss_check.read()
        (bad,) = self.world.all_max(self.loss_check.bad != '')
        if not bad:
            return
        place = f'at {self.loss_check.bad}' if self.loss_check.bad else 'in another process'
        files = self.folder.glob('[!.]*.pth.tar') if self.folder else ()
        newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
        last = f'the last good checkpoint is {newest}' if newest else 'no checkpoint is written yet'
        raise RunFailed(f'the loss is NaN or infinite {place}; {last}; a smaller learning rate may help')

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints from within the epochs, which a finished search does not need."""
        for path in self.folder.glob('checkpoint*.pth.tar') if self.folder else ():
            path.unlink()

    def exit_code(self) -> int:
        """Return the exit code of the run, and log the command that resumes it if a signal stopped it.

        It is 0 after other signals than SIGINT, since the run has done as asked.
        """
        if self.signal:
            log.info('stopped by %s; to go on:', signal.Signals(self.signal).name)
            if self.folder:
                log.info(resume_command(self.folder / CHECKPOINT))
        return INTERRUPTED if self.signal == signal.SIGINT else 0


def keep_previous(path: Path) -> None:
    """Rename a file that is about to be replaced. It or its successor exists at any time."""
    if not path.exists():
        return
    link = path.with_name(f'.{path.name}.link')
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
        os.replace(link, previous_of(path))
    except OSError:  # no hard links: for a moment only the previous file exists
        os.replace(path, previous_of(path))


def previous_of(path: Path) -> Path:
    """Return the path of the previous file, such as `checkpoint.previous.pth.tar` for `checkpoint.pth.tar`."""
    stem, _, suffixes = path.name.partition('.')
    return path.with_name(f'{stem}.previous.{suffixes}')


def _on_cpu(value: Any) -> Any:
    """Return the value with all tensors on the CPU, so that the file can be read where there is no GPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    return type(value)(map(_on_cpu, value)) if isinstance(value, (list, tuple)) else value


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


# ---------------------------------------------------------------- signals


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


def resume_command(snapshot: Path) -> str:
    """Return the command that resumes this run, in all its processes, from `snapshot`."""
    words, flags = [sys.argv[0]], iter(sys.argv[1:])
    for word in flags:
        name, equals, _ = word.partition('=')
        if name not in ('--snapshot', '--local_rank', '--local-rank'):
            words.append(word)
        elif not equals:
            next(flags, None)  # its value
    return shlex.join([*launch_command(), *words, '--snapshot', str(snapshot)])


# ---------------------------------------------------------------- resuming


@dataclass(frozen=True)
class RunKind:
    """Names and contents of the checkpoints of one script.

    Args:
        name: of the run, in messages.
        folders: run folders are `<folders>-<time>-<note>`.
        files: patterns of the checkpoints' names.
        needed: keys that every checkpoint has.
        types: of the values under some keys, if a checkpoint has them.
        position: function of a checkpoint: (epoch, step) of the next batch to train.
        sums: how many `sums` a checkpoint has.
    """

    name: str
    folders: str
    files: tuple[str, ...]
    needed: frozenset[str]
    types: Mapping[str, type | UnionType]
    position: Callable[[dict], tuple[int, int]]
    sums: int

    def checkpoints(self, folder: Path) -> list[Path]:
        """Return the checkpoints in a run folder, the furthest first; files that cannot be read go before all others.

        The order is that of the positions in the files: a copied folder has lost their times.
        """
        places = {path: self.place(path) for files in self.files for path in folder.glob(files)}
        return sorted(places, key=lambda path: (places[path], path.stat().st_mtime_ns, path.name), reverse=True)

    def place(self, path: Path) -> tuple[float, float]:
        """Return the position in a file, `UNREADABLE` if there is none."""
        try:
            return self.position(read_snapshot(path, self, whole=False))
        except BadInput:
            return UNREADABLE


@dataclass(frozen=True)
class Snapshot:
    """Checkpoint that a run resumes from, None to begin at the start; and its run folder, None to make a new one.

    `later`: checkpoints of that folder from further on, which the run will not lead to.
    """

    folder: Path | None = None
    path: Path | None = None
    checkpoint: dict | None = None
    position: tuple[int, int] = (0, 0)
    later: tuple[Path, ...] = ()

    def without_checkpoint(self) -> 'Snapshot':
        """Return the same without the contents of the checkpoint, once they are loaded."""
        return replace(self, checkpoint=None)


def find_snapshot(given: str | None, save: str, note: str, kind: RunKind, world: World) -> Snapshot:
    """Return the checkpoint that `--snapshot` asks for, the same in all processes.

    'auto': the newest good one of the newest run of this note under `save`, if there is one. A path: that file, or if
    it is damaged the one before it in its folder.

    Raises:
        BadInput: no good file at the path; or processes found different positions.
    """
    found = _find(given, save, note, kind) if given else Snapshot()
    place = found.position if found.path else (-1, -1)
    furthest = world.all_max(*place, *(-number for number in place))
    if furthest != [*place, *(-number for number in place)]:
        own = found.path or 'no checkpoint'
        raise BadInput(
            f'--snapshot {given}: process {world.rank} found {own} and others found another position; '
            '--save should be a folder that all machines share'
        )
    return found


def _find(given: str, save: str, note: str, kind: RunKind) -> Snapshot:
    if given == 'auto':
        folders = sorted(run_folders(save, kind.folders, note), key=_last_change, reverse=True)
        files = itertools.chain.from_iterable(map(kind.checkpoints, folders))
    else:
        path = Path(given)
        files = [path]
        if path.exists() or previous_of(path).exists():  # a kill may have left the previous file alone
            files += kind.checkpoints(path.parent)
    found, problems = _first_good(files, kind)
    if not found and given != 'auto':
        raise BadInput(f'--snapshot {problems[0]}')
    for problem in problems:
        log.warning(problem)
    if not found:
        log.info('--snapshot auto: no good checkpoint of --note %s under %s, a new run begins', note, save)
        return Snapshot()
    log.info('goes on from %s: epoch %d step %d', found.path, *found.position)
    if not found.folder:
        log.info('%s is no run folder: the run goes on in a new one', found.path.parent)
    return found


def _last_change(folder: Path) -> tuple[int, str]:
    """Time of the newest checkpoint in a run folder, and its name, which has the time that the run began."""
    return max((path.stat().st_mtime_ns for path in folder.glob('*.pth.tar')), default=0), folder.name


def _first_good(paths: Iterable[Path], kind: RunKind) -> tuple[Snapshot | None, list[str]]:
    """Return the snapshot of the first good file, None without one, and what is wrong with those before."""
    problems = []
    for path in paths:
        try:
            checkpoint = read_snapshot(path, kind)
        except BadInput as e:
            problems.append(str(e))
            continue
        place = kind.position(checkpoint)
        if not (path.parent / METRICS).is_file():
            return Snapshot(None, path, checkpoint, place), problems
        later = tuple(other for other in kind.checkpoints(path.parent) if place < kind.place(other) < UNREADABLE)
        return Snapshot(path.parent, path, checkpoint, place, later), problems
    return None, problems


def read_snapshot(path: Path, kind: RunKind, whole: bool = True) -> dict:
    """Read a checkpoint of a run, on the CPU.

    Args:
        whole: check the file for damage. Without, tensors stay in the file until they are used.

    Raises:
        BadInput: damaged, or not of a run of this kind.
    """
    checkpoint = load_checkpoint(path, whole=whole)
    if not (isinstance(checkpoint, dict) and kind.needed <= checkpoint.keys() and _is_well_formed(checkpoint, kind)):
        raise BadInput(f'{path}: not a checkpoint of a {kind.name} (keys {", ".join(sorted(kind.needed))})')
    return checkpoint


def _is_well_formed(checkpoint: dict, kind: RunKind) -> bool:
    """Whether the parts of a checkpoint have the types that a reader relies on."""
    for key, type_ in kind.types.items():
        if key in checkpoint and not isinstance(checkpoint[key], type_):
            return False
    for name, value in checkpoint['state_dict'].items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            return False
    return min(kind.position(checkpoint)) >= 0 and len(checkpoint.get('sums', [0] * kind.sums)) == kind.sums


def compare_snapshot(snapshot: Snapshot, flags: Mapping[str, Any], digest: str) -> None:
    """Log in which flags the snapshot differs, and warn if its images do.

    Args:
        digest: of the images; the snapshot has its own under `IMAGES`.

    Raises:
        BadInput: the snapshot is from within an epoch, and its position means nothing with these flags or images.
    """
    if not snapshot.checkpoint:
        return
    before, images = snapshot.checkpoint.get('flags', {}), snapshot.checkpoint.get(IMAGES) or digest
    differ = {}
    for name in sorted(before.keys() & flags.keys() - HARMLESS):
        if before[name] != flags[name]:
            differ[name] = f'--{name} {before[name]}, now {flags[name]}'
    within = f'--snapshot {snapshot.path} is from within an epoch, and' if snapshot.position[1] else ''
    lost = [differ[name] for name in differ.keys() & POSITION_FLAGS]
    if within and lost:
        raise BadInput(f'{within} was made with other flags: {"; ".join(sorted(lost))}; give the former ones')
    if within and images != digest:
        raise BadInput(f'{within} its lists or folders of images have changed since; give the former ones')
    if differ:
        log.info('the snapshot was made with other flags: %s', '; '.join(differ.values()))
    if images != digest:
        log.warning('the lists or folders of images have changed since the snapshot')
