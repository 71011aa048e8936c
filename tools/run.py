"""The folder of a run: its name, its lock, its log, its `metrics.jsonl`; and the progress of the run.

`metrics.jsonl` has one JSON object per line, and pictures are drawn from it. The first line (`kind` 'run') has the
version of the format, the flags, the environment, and all else that a reader needs. Then one 'step' line per print, one
'epoch' line per epoch, and 'end'. All but 'run' have `epoch`; a 'step' line also has `step`, the number of steps done
in the epoch. A run that resumes with other flags adds another 'run' line; the last one counts.
"""

import fcntl
import json
import logging
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from tqdm import tqdm

from tools.distributed import World
from tools.environment import cores, describe_environment
from tools.errors import BadInput, silence
from tools.files import write_atomic, write_text
from tools.logs import close_log, open_log

if TYPE_CHECKING:
    from tools.checkpoint import Snapshot

log = logging.getLogger('tf-nas')

METRICS = 'metrics.jsonl'
VERSION = 1  # of its format
TIMED = 10  # steps whose speed predicts the time of a run
DIGITS = {'lr': '.5f', 'loss': '.4f', 'top1': '.2f', 'top5': '.2f', 'latency': '.4f', 'images/s': '.1f'}  # in the log
SMOOTHING = 0.02  # weight of the newest step in the speed that the time left is estimated from
SKIPPED, WATCHED = 10, 100  # batches while workers start and kernels are chosen; batches until loading is judged
TOLERATED = 0.1  # share of the time that may pass waiting for images


def run_header(task: str, flags: Mapping[str, Any], device: torch.device, **about: Any) -> dict:
    """Return the first line of a run's metrics.

    Args:
        task: 'search' or 'training'.
        about: the network or search space of the run, as plain values.

    Raises:
        BadInput: `--tensorboard` without the package; here, before there is a folder.
    """
    if flags.get('tensorboard'):
        _summary_writer()
    environment = describe_environment(device)
    flags = {name: value for name, value in sorted(flags.items()) if name != 'local_rank'}
    return {'kind': 'run', 'version': VERSION, 'task': task, 'environment': environment, 'flags': flags, **about}


def open_run(
    world: World, prefix: str, header: dict, snapshot: 'Snapshot', files: Mapping[str, str] | None = None
) -> 'RunLogger':
    """Open the folder of a run: the snapshot's if it has one, else a new one, `<save>/<prefix>-<time>-<note>/`.

    Args:
        header: see `run_header`; with the flags save, note and tensorboard.
        files: texts that the folder gets, by name.

    Raises:
        BadInput: the folder cannot be written to, or another run is writing into it.
    """
    if not world.is_first:
        return RunLogger(None, header)
    flags, environment = header['flags'], header['environment']
    folder = snapshot.folder or _make_folder(flags['save'], prefix, flags['note'])
    lock = _lock(folder)
    for leftover in folder.glob('.*.pth.tar.*'):  # of a run that was killed while it wrote
        leftover.unlink()
    for path in snapshot.later:  # or the next resume would take them
        path.replace(path.with_name(f'{path.name}.superseded'))
    for name, text in (files or {}).items():
        write_text(folder / name, text)
    logger = RunLogger(folder, header, snapshot.position, lock)
    log.info('command: %s', shlex.join(sys.argv))
    log.info('%s; device: %s; torch %s', folder, environment['device'], environment['torch'])
    if snapshot.later:
        names = ', '.join(path.name for path in snapshot.later)
        log.info('renamed checkpoints from beyond this position to *.superseded: %s', names)
    return logger


def _make_folder(save: str, prefix: str, note: str) -> Path:
    if '/' in note or '\0' in note:
        raise BadInput(f'--note {note!r}: becomes part of the name of a folder; leave out the /')
    stem = f'{prefix}-{time.strftime("%Y%m%d-%H%M%S")}-{note}'
    for number in range(1, 100):
        folder = Path(save) / (stem if number == 1 else f'{stem}.{number}')
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as e:
            raise BadInput(f'--save {save}: cannot make a run folder there ({e.strerror})') from e
    raise BadInput(f'--save {save}: too many runs of the same name {stem}')


def run_folders(save: str | Path, prefix: str, note: str) -> list[Path]:
    """Return the folders that runs of this note made under `save`."""
    name = re.compile(rf'{prefix}-\d{{8}}-\d{{6}}-{re.escape(note)}(\.\d+)?')
    return [folder for folder in Path(save).glob(f'{prefix}-*/') if name.fullmatch(folder.name)]


def _lock(folder: Path) -> TextIO:
    """Keep other runs out of a folder until the returned file is closed."""
    try:
        file = open(folder / '.lock', 'a')  # noqa: SIM115
    except OSError as e:
        raise BadInput(f'{folder}: cannot be written to ({e.strerror})') from e
    try:
        # a POSIX lock: processes that load images, which may outlive a kill by seconds, do not inherit it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:
        raise BadInput(f'{folder}: another run is writing into this folder; wait for its end, or stop it') from e
    except OSError:  # a file system without locks
        pass
    return file


class Waiting:
    """Time that a loop waits for batches and uses them; warns once if they come more slowly than the run needs them.

    It is the host's time: nothing waits for a GPU.

    Args:
        flag: of the workers that load the batches.
        images: per batch, over all processes.
    """

    def __init__(self, flag: str, images: int):
        self.flag, self.images = flag, images
        self.batches, self.waited, self.spent = 0, 0.0, 0.0
        self.asked: float | None = None

    def restart(self) -> 'Waiting':
        """Leave out the next batch, which waits for the workers to start."""
        self.asked = None
        return self

    def loaded(self) -> None:
        """A batch is there."""
        self.got = time.monotonic()

    def used(self) -> None:
        """The loop has used the batch and asks for the next one."""
        asked, self.asked = self.asked, time.monotonic()
        if asked is None:
            return
        self.batches += 1
        if SKIPPED < self.batches <= WATCHED:
            self.waited += self.got - asked
            self.spent += self.asked - self.got
        total = self.waited + self.spent
        if self.batches == WATCHED and self.waited > TOLERATED * total:
            count = self.images * (WATCHED - SKIPPED)
            text = '%.0f images/s are loaded, the steps need %.0f. More %s (up to %d) or --device_aug may help.'
            log.warning(text, count / total, count / max(self.spent, 1e-9), self.flag, cores())


class RunLogger:
    """Log file, metrics and progress of a run; writes nothing without a folder, as in all processes but the first.

    `is_new`: the run began with this process. `ended`: it is finished.

    Args:
        header: see `run_header`; written unless it is already the last one in the file.
        position: (epoch, step) that the run resumes from; later lines of the file are removed.
    """

    def __init__(
        self, folder: Path | None, header: dict, position: tuple[int, int] = (0, 0), lock: TextIO | None = None
    ):
        self.folder, self.lock, self.ended = folder, lock, False
        self.steps_an_epoch = header.get('steps_an_epoch', 0)
        self.log_file, self.board = None, None
        self.bar = tqdm(disable=True)
        self._waiting: dict[str, Waiting] = {}
        self.epochs = header.get('flags', {}).get('epochs')
        self.steps, self.first_done = 0, 0.0
        self.is_new = folder is not None and not (folder / METRICS).exists()
        if not folder:
            return
        _begin_metrics(folder / METRICS, header, position)
        self.log_file = open_log(folder / 'log.txt')
        if header.get('flags', {}).get('tensorboard'):
            done = position[0] * self.steps_an_epoch + position[1]
            self.board = _summary_writer()(str(folder / 'tensorboard'), purge_step=done + 1)

    def close(self) -> None:
        """Close the files and unlock the folder; the process may begin another run."""
        self.bar.close()
        if self.board:
            self.board.close()
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

    def waiting(self, flag: str, images: int) -> Waiting:
        """Return the `Waiting` of the workers of a flag, for another pass over their batches."""
        if flag not in self._waiting:
            self._waiting[flag] = Waiting(flag, images)
        return self._waiting[flag].restart()

    def advance(self) -> None:
        """Count a step as done."""
        try:
            self.bar.update()
        except OSError:  # the terminal is closed
            silence(sys.stderr)
        self.steps += 1
        if self.steps == 1:  # which waited for workers, or chose kernels
            self.first_done = time.monotonic()
        if self.steps == 1 + TIMED and self.epochs and not self.bar.disable:
            seconds = (time.monotonic() - self.first_done) / TIMED * (self.bar.total - self.bar.n)
            hours, minutes = divmod(round(seconds / 60), 60)
            text = '%d epochs: about %d h %d min to go at the speed of these steps; --epochs shortens the run'
            log.info(text, self.epochs, hours, minutes)

    def step(self, epoch: int, step: int, steps: int, **numbers: float) -> None:
        """Log the epoch so far, after `step` of its `steps`."""
        words = []
        for name, value in numbers.items():
            form = DIGITS.get(name.rpartition('_')[2], '.4f')
            words.append(f'{name} {value:{form}}')
        self.bar.set_description(f'epoch {epoch}', refresh=False)
        log.info('epoch %d step %d/%d %s eta %s', epoch, step, steps, ' '.join(words), self.time_left())
        self.record('step', epoch, step, steps=steps, **numbers)

    def time_left(self) -> str:
        """Return an estimate of the time to the end of the run, such as '1:02:03'."""
        if self.bar.disable:
            return '?'
        progress = self.bar.format_dict
        rate = progress['rate'] or (progress['n'] - progress['initial']) / max(progress['elapsed'], 1e-9)
        return tqdm.format_interval((progress['total'] - progress['n']) / rate) if rate > 0 else '?'

    def record(self, kind: str, epoch: int, step: int | None = None, **values: Any) -> None:
        """Append a line to metrics.jsonl. `step`: steps of the epoch that are done."""
        if not self.folder:
            return
        self.ended = self.ended or kind == 'end'
        position = {'epoch': epoch} if step is None else {'epoch': epoch, 'step': step}
        with open(self.folder / METRICS, 'ab') as f:
            f.write(_encode({'kind': kind, **position, 'time': round(time.time(), 1), **values}))
        if self.board:
            done = epoch * self.steps_an_epoch + (self.steps_an_epoch if step is None else step)
            for name, value in _scalars(kind, _plain(values)):
                self.board.add_scalar(name, value, done)
            self.board.flush()


def _begin_metrics(path: Path, header: dict, position: tuple[int, int]) -> None:
    """Keep the lines of a file up to a position, with the header that counts."""
    kept = [line for line in _whole_lines(path) if _is_before(line, position)]
    headers = [line for line in kept if line.get('kind') == 'run']
    if not headers:
        kept.insert(0, header)
    elif _encode(headers[-1]) != _encode(header):
        kept.append(header)
    write_atomic(path, lambda f: f.writelines(map(_encode, kept)))


def _is_before(line: dict, position: tuple[int, int]) -> bool:
    """Whether a run that resumes from (epoch, step) will not write this line again."""
    kind, epoch = line.get('kind'), line.get('epoch', 0)
    if kind == 'step':
        return (epoch, line.get('step', 0)) <= position
    return kind == 'run' or (kind == 'epoch' and epoch < position[0])


def _whole_lines(path: Path) -> list[dict]:
    """Return the JSON objects of a file's whole lines; a kill may have left a part of a last one."""
    try:
        raw = path.read_bytes() if path.exists() else b''
    except OSError as e:
        raise BadInput(f'{path}: cannot be read ({e.strerror})') from e
    found = []
    for line in raw.split(b'\n')[:-1]:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [value for value in found if isinstance(value, dict)]


def _encode(line: dict) -> bytes:
    return json.dumps(_plain(line), separators=(',', ':')).encode() + b'\n'


def _plain(value: Any) -> Any:
    """Return the value as JSON can hold it: floats to seven digits, times of day to a tenth, None if not finite."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f'{value:.7g}') if abs(value) < 1e6 else round(value, 1)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, (int, str, type(None))) else str(value)


def _summary_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise BadInput('--tensorboard needs a package that is not here: pip install tensorboard') from e
    return SummaryWriter


def _scalars(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield (tag, number) for each number in a line."""
    if isinstance(value, (int, float)):
        yield name, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _scalars(f'{name}/{key}', inner)


@dataclass(frozen=True)
class Run:
    """A run read back from its file: the last of its headers, and all other lines."""

    name: str
    header: dict
    lines: list[dict]

    def of(self, kind: str) -> list[dict]:
        """Return the lines of one kind, in order."""
        return [line for line in self.lines if line['kind'] == kind]


def read_run(path: str | Path) -> Run:
    """Read a run folder or a metrics.jsonl.

    Raises:
        BadInput: no such file, not of this format, or of a newer version.
    """
    path = Path(path)
    path = path / METRICS if path.is_dir() else path
    if not path.is_file():
        raise BadInput(f'{path}: no such file; expected a run folder with {METRICS} in it')
    lines = _whole_lines(path)
    headers = [line for line in lines if line.get('kind') == 'run']
    if not headers or lines[0] is not headers[0]:
        raise BadInput(f'{path}: does not begin with the line of a run, is it a {METRICS}?')
    if headers[-1].get('version') != VERSION:
        raise BadInput(f'{path}: format version {headers[-1].get("version")!r}, this program reads {VERSION}')
    rest = [line for line in lines if isinstance(line.get('kind'), str) and isinstance(line.get('epoch'), int)]
    return Run(path.resolve().parent.name, headers[-1], rest)
