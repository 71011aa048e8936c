"""The folder of a run: its lock, its log, metrics.jsonl, and what one sees while it runs."""

import fcntl
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from tools.distributed import World, restart_store
from tools.environment import describe_environment
from tools.errors import BadInput
from tools.files import write_atomic, write_text


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
    """All folders that `make_run_folder` made with these arguments."""
    name = re.compile(rf'{kind}-\d{{8}}-\d{{6}}-{re.escape(note)}(\.\d+)?')
    return [folder for folder in Path(save).glob(f'{kind}-*/') if name.fullmatch(folder.name)]


class _Console(logging.Handler):
    """Writes to stdout, above a bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _LogFile(logging.FileHandler):
    """A log that the disk does not take is an error of the run, not a message among others."""

    def handleError(self, _record: logging.LogRecord) -> None:
        raise  # noqa: PLE0704  (called where the error is being handled)


def make_logger(folder: Path | None) -> logging.Logger:
    """A logger to stdout and `<folder>/log.txt` (appended, a line at a time); a silent one where `folder` is None."""
    logger = logging.Logger('tf-nas', logging.INFO if folder else logging.CRITICAL)
    if folder:
        formatter = logging.Formatter('%(asctime)s %(message)s', datefmt='%m/%d %H:%M:%S')
        for handler in (_Console(), _LogFile(folder / 'log.txt', encoding='utf-8')):
            handler.setFormatter(formatter)
            logger.addHandler(handler)
    return logger


def log_flags(logger: logging.Logger, args) -> None:
    """One line a flag, so that a log tells how its run was started."""
    for name, value in sorted(vars(args).items()):
        logger.info('--%s %s', name, value)


def open_run_folder(
    args,
    world: World,
    kind,
    snapshot,
    state,
    header: dict,
    files: dict[str, str] | None = None,
) -> tuple[Path | None, 'Watch']:
    """The folder of a run, and where its numbers go: the snapshot's folder where it goes on from one, else a new one.

    Processes other than the first get None and a silent logger.

    Args:
        args: save, note and tensorboard, and all else for the head of the log.
        header: first line of `metrics.jsonl`.
        files: texts that the folder gets, by name.

    Raises:
        BadInput: the folder cannot be written to, or another run is writing into it.
    """
    if not world.is_first:
        return None, Watch(make_logger(None))
    folder = snapshot.folder or make_run_folder(args.save, kind.folders, args.note)
    _lock(folder)
    for leftover in folder.glob('.*.pth.tar.*'):  # of a run that was killed while it wrote
        leftover.unlink()
    for name, text in (files or {}).items():
        write_text(folder / name, text)
    _, store = restart_store()
    if store:
        store.set('folder', str(folder.resolve()))
    logger = make_logger(folder)
    log_flags(logger, args)
    for name, value in header['environment'].items():
        logger.info('%s: %s', name, value)
    for note in snapshot.notes:
        logger.info(note)
    return folder, Watch(logger, Metrics(folder, header, (state.epoch, state.step), args.tensorboard))


def _lock(folder: Path) -> None:
    """Keep other runs out of a folder until this process ends, in whatever way.

    A lock of this process alone (POSIX): those that load images do not inherit it, and may outlive a kill by seconds.
    """
    try:
        file = os.open(folder / '.lock', os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        raise BadInput(f'{folder}: cannot be written to ({e.strerror})') from e
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:
        raise BadInput(f'{folder}: another run is writing into this folder; wait for its end, or stop it') from e
    except OSError:  # a file system without locks
        pass


METRICS = 'metrics.jsonl'


VERSION = 1


def run_header(task: str, args, device: torch.device, **about: Any) -> dict:
    """The first line of a run's file.

    Args:
        task: 'search' or 'training'.
        args: the flags.
        about: what is known of the run's network or search space, as plain values.

    Raises:
        BadInput: `args.tensorboard` without the package; here, before there is a folder.
    """
    if getattr(args, 'tensorboard', False):
        _summary_writer()
    environment = describe_environment(device)
    flags = {name: value for name, value in sorted(vars(args).items()) if name != 'local_rank'}
    return {'kind': 'run', 'version': VERSION, 'task': task, 'environment': environment, 'flags': flags, **about}


class Metrics:
    """Appends to `<folder>/metrics.jsonl`, a whole line at a time, and where asked for to TensorBoard's files.

    A run that goes on from a snapshot keeps the lines up to there; those after it are written again. `is_new` says
    whether the run began with this object, `ended` whether it has ended.

    Args:
        folder: None writes nothing.
        header: see `run_header`; the first line of a new file.
        position: (epoch, step) that the run goes on from.
        tensorboard: also write `<folder>/tensorboard`.
    """

    def __init__(
        self, folder: Path | None, header: dict, position: tuple[int, int] = (0, 0), tensorboard: bool = False
    ):
        self.path = folder / METRICS if folder else None
        space = header.get('space', {'blocks': [], 'ops': []})
        self.blocks = [f'{block["stage"]}.{block["name"]}' for block in space['blocks']]
        self.ops = [op['label'] for op in space['ops']]
        self.steps_an_epoch = header.get('steps_an_epoch', 0)
        self.board = None
        self.ended, self.is_new = False, self.path is not None and not self.path.exists()
        if not self.path:
            return
        if tensorboard:
            done = position[0] * self.steps_an_epoch + position[1]
            # what an earlier run of this folder wrote behind that, this one writes again
            self.board = _summary_writer()(str(folder / 'tensorboard'), purge_step=done + 1)
        kept = [line for line in _whole_lines(self.path) if _is_before(line, position)]
        lines = kept if kept and kept[0].get('kind') == 'run' else [header, *kept]
        write_atomic(self.path, lambda f: f.writelines(_encode(line) for line in lines))

    def write(self, kind: str, epoch: int, step: int | None = None, **values: Any) -> None:
        """Append a line. `step`: steps of the epoch that are done."""
        if not self.path:
            return
        self.ended = self.ended or kind == 'end'
        position = {'epoch': epoch} if step is None else {'epoch': epoch, 'step': step}
        with open(self.path, 'ab') as f:
            f.write(_encode({'kind': kind, **position, 'time': round(time.time(), 1), **values}))
        if self.board:
            done = epoch * self.steps_an_epoch + (self.steps_an_epoch if step is None else step)
            for name, value in _scalars(values, kind, self.blocks, self.ops):
                self.board.add_scalar(name, value, done)
            self.board.flush()


@dataclass(frozen=True)
class Run:
    """A run read back from its file: the first line, and all others."""

    name: str
    header: dict
    lines: list[dict]

    def of(self, kind: str) -> list[dict]:
        """The lines of one kind, in order."""
        return [line for line in self.lines if line['kind'] == kind]


def read_run(path: str | Path) -> Run:
    """Read a run folder, or a file of the kind.

    Raises:
        BadInput: no such file, not of this format, or of a newer version.
    """
    path = Path(path)
    path = path / METRICS if path.is_dir() else path
    if not path.is_file():
        raise BadInput(f'{path}: no such file; expected a run folder with {METRICS} in it')
    lines = _whole_lines(path)
    if not lines or lines[0].get('kind') != 'run':
        raise BadInput(f'{path}: does not begin with the line of a run, is it a {METRICS}?')
    if lines[0].get('version') != VERSION:
        raise BadInput(f'{path}: format version {lines[0].get("version")!r}, this program reads {VERSION}')
    rest = [line for line in lines[1:] if isinstance(line.get('kind'), str) and isinstance(line.get('epoch'), int)]
    return Run(path.resolve().parent.name, lines[0], rest)


def _whole_lines(path: Path) -> list[dict]:
    """The JSON objects of a file's whole lines; what a kill left of a last line is not one."""
    try:
        raw = path.read_bytes() if path.exists() else b''
    except OSError as e:
        raise BadInput(f'{path}: cannot be read ({e.strerror})') from e
    found = []
    for line in raw.split(b'\n')[:-1]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _is_before(line: dict, position: tuple[int, int]) -> bool:
    """Whether a run that goes on from (epoch, step) will not write this line again."""
    epoch, step = position
    if line.get('kind') == 'run':
        return True
    if line.get('kind') == 'step':
        return (line.get('epoch', 0), line.get('step', 0)) <= (epoch, step)
    return line.get('kind') == 'epoch' and line.get('epoch', 0) < epoch


def _encode(line: dict) -> bytes:
    return json.dumps(_plain(line), separators=(',', ':')).encode() + b'\n'


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: floats to seven digits, or whole and a tenth as times of day are; None for those
    that are not finite."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f'{value:.7g}') if abs(value) < 1e6 else round(value, 1)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, (int, bool, str, type(None))) else str(value)


def _summary_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise BadInput('--tensorboard needs a package that is not here: pip install tensorboard') from e
    return SummaryWriter


def _scalars(value: Any, name: str, blocks: list[str], ops: list[str]) -> Iterator[tuple[str, float]]:
    """(tag, number) of every number in a line; rows by block and operator are named so."""
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        names = blocks if value and isinstance(value[0], Sequence) else ops
        items = zip(names if len(names) == len(value) else range(len(value)), value, strict=True)
    else:
        items = ()
        if isinstance(value, (int, float)) and math.isfinite(value):
            yield name, value
    for key, inner in items:
        yield from _scalars(inner, f'{name}/{key}', blocks, ops)


Item = TypeVar('Item')


FORMATS = {'lr': '.5f', 'loss': '.4f', 'top1': '.2f', 'top5': '.2f', 'latency': '.4f', 'images/s': '.1f'}
"""How numbers are printed, by the last part of their names (the part after the last underscore)."""


class Progress:
    """The share of a run's work that is done, and the time that is left.

    Args:
        work: of the whole run, in any unit.
        done: what was done before this process began.
        quiet: no bar, whatever stderr is.
    """

    def __init__(self, work: float, done: float = 0.0, quiet: bool = False):
        self.work, self.done, self.done_before = work, done, done
        self.start = time.monotonic()
        self.shows = not quiet and sys.stderr.isatty()
        self.bar = tqdm(disable=True)

    def track(self, items: Iterable[Item], name: str, total: int, first: int = 0, work: float = 1.0) -> Iterator[Item]:
        """The items, each counted as `work` while in hand; on a terminal with a bar.

        Args:
            total: of a whole pass, which begins with item `first`.
        """
        with tqdm(total=total, initial=first, desc=name, disable=not self.shows, leave=False) as self.bar:
            for item in items:
                self.done += work
                yield item
                self.bar.update()

    def show(self, **numbers: float) -> str:
        """Put numbers beside the bar; returns the time that is left, such as '1:02:03'."""
        left = self.left()
        self.bar.set_postfix({name: f'{value:.4g}' for name, value in numbers.items()} | {'eta': left}, refresh=False)
        return left

    def left(self) -> str:
        """Time to the end of the run at this process's speed so far."""
        done = self.done - self.done_before
        if done <= 0:
            return '?'
        seconds = round((time.monotonic() - self.start) / done * max(self.work - self.done, 0))
        return f'{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}'


class Watch:
    """Where a run's numbers go: the log, the bar, `metrics.jsonl`.

    Args:
        metrics: None keeps none.
    """

    def __init__(self, logger: logging.Logger, metrics: Metrics | None = None, progress: Progress | None = None):
        self.log = logger.info
        self.metrics = metrics
        self.progress = progress or Progress(0)

    def step(self, epoch: int, step: int, steps: int, **numbers: float) -> None:
        """A line about the epoch so far, after `step` of its `steps`."""
        left = self.progress.show(**{name: value for name, value in numbers.items() if name[-2:] not in ('lr', 'p5')})
        words = ' '.join(f'{name} {value:{FORMATS[name.rpartition("_")[2]]}}' for name, value in numbers.items())
        self.log('epoch %d step %d/%d %s eta %s', epoch, step, steps, words, left)
        self.write('step', epoch, step, steps=steps, **numbers)

    def draw(self) -> None:
        """Pictures and report of a run that has ended; what stands in their way is a line of the log."""
        from tools.report.draw import draw_at_end

        if self.metrics and self.metrics.ended:
            draw_at_end(self.metrics.path.parent, self.log)

    def write(self, kind: str, epoch: int, step: int | None = None, **values: Any) -> None:
        """A line of `metrics.jsonl` alone."""
        if self.metrics:
            self.metrics.write(kind, epoch, step, **values)
