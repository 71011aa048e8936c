"""`metrics.jsonl`: flags, environment and measurements of a run, a JSON object a line. Pictures are drawn from it.

The first line (`kind` 'run') has the format's version, the flags, the environment, and all else that a reader needs.
Then follow a line a print ('step'), a line an epoch ('epoch'), and 'end'. Every line but 'run' has `epoch`; 'step'
lines also have `step`, the number of the epoch's steps done. A run that goes on with other flags, such as more epochs,
adds another line 'run'; the last one counts.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.environment import describe_environment
from tools.errors import BadInput
from tools.files import write_atomic

METRICS = 'metrics.jsonl'
VERSION = 1


def run_header(task: str, flags: Mapping[str, Any], device: torch.device, **about: Any) -> dict:
    """Return the first line of a run's file.

    Args:
        task: 'search' or 'training'.
        flags: by name.
        about: the run's network or search space, as plain values.

    Raises:
        BadInput: `--tensorboard` without the package; here, before there is a folder.
    """
    if flags.get('tensorboard'):
        _summary_writer()
    environment = describe_environment(device)
    flags = {name: value for name, value in sorted(flags.items()) if name != 'local_rank'}
    return {'kind': 'run', 'version': VERSION, 'task': task, 'environment': environment, 'flags': flags, **about}


class MetricsFile:
    """Appends to `<folder>/metrics.jsonl`, a whole line at a time, and where asked for to TensorBoard's files.

    A run that goes on from a snapshot keeps the lines up to there; those after it are written again. `is_new` says
    whether the run began with this object, `ended` whether it has ended.

    Args:
        folder: None writes nothing.
        header: see `run_header`; written unless it is that of the file already.
        position: (epoch, step) that the run goes on from.
        tensorboard: also write `<folder>/tensorboard`.
    """

    def __init__(
        self, folder: Path | None, header: dict, position: tuple[int, int] = (0, 0), tensorboard: bool = False
    ):
        self.path = folder / METRICS if folder else None
        space = header.get('space', {'blocks': [], 'ops': []})
        self.blocks = [block_label(block) for block in space['blocks']]
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
        headers = [line for line in kept if line.get('kind') == 'run']
        same = bool(headers) and _encode(headers[-1]) == _encode(header)
        lines = kept if same else [*kept, header] if headers else [header, *kept]
        write_atomic(self.path, lambda f: f.writelines(_encode(line) for line in lines))

    def append(self, kind: str, epoch: int, step: int | None = None, **values: Any) -> None:
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

    def close(self) -> None:
        """Close TensorBoard's files."""
        if self.board:
            self.board.close()


HARMLESS = {
    'snapshot', 'save', 'note', 'device', 'workers', 'val_workers', 'print_freq', 'save_freq', 'keep_checkpoints',
    'local_rank', 'max_steps', 'tensorboard', 'report', 'deterministic',
}  # fmt: skip
"""Flags whose differences are not reported, when a run goes on or when runs are compared."""


@dataclass(frozen=True)
class Run:
    """A run read back from its file: the last of its headers, and all other lines."""

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
    header = [line for line in lines if line.get('kind') == 'run' and line.get('version') == VERSION][-1]
    rest = [line for line in lines[1:] if isinstance(line.get('kind'), str) and isinstance(line.get('epoch'), int)]
    return Run(path.resolve().parent.name, header, rest)


def block_label(block: Mapping[str, str]) -> str:
    """Return the name of a block of a described search space, such as stage1.1."""
    return f'{block["stage"]}.{block["name"].removeprefix("block")}'


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
