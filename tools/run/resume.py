"""The checkpoint that a run resumes from."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any

from torch import Tensor

from tools.distributed import World
from tools.errors import BadInput
from tools.files import load_checkpoint, previous_of
from tools.run.folder import run_folders
from tools.run.metrics import HARMLESS, METRICS

log = logging.getLogger('tf-nas')

CHECKPOINT = 'checkpoint.pth.tar'

IMAGES = 'images'
"""Key of the digest of a run's image lists in its checkpoints."""


POSITION = {'batch_size', 'seed', 'grad_accum'}
"""Flags that the position within an epoch depends on."""


NUMBER = int | float

UNREADABLE = math.inf, math.inf
"""Position of a file that cannot be read, beyond all others."""


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
    later: tuple[Path, ...] = ()

    def without_checkpoint(self) -> 'Snapshot':
        """Return the same without the contents of the checkpoint, once they are loaded."""
        return replace(self, checkpoint=None)


def find_snapshot(args, kind: RunKind, world: World) -> Snapshot:
    """Return the newest good checkpoint that the flags ask for.

    `--snapshot auto` takes the newest good checkpoint of a run with the same `--note` under `--save`; `--snapshot PATH`
    takes that file, or if it is damaged the one before it in its folder.

    Args:
        args: snapshot, save and note.
        kind: whose checkpoints to take.

    Raises:
        BadInput: no good file at `--snapshot PATH`; or processes found different positions.
    """
    found = _find(args, kind) if args.snapshot else Snapshot()
    place = kind.position(found.checkpoint) if found.checkpoint else (-1, -1)
    furthest = world.all_max(*place, *(-number for number in place))
    if furthest != [*place, *(-number for number in place)]:
        own = found.path or 'no checkpoint'
        raise BadInput(
            f'--snapshot {args.snapshot}: process {world.rank} found {own} and others found another position; '
            '--save should be a folder that all machines share'
        )
    return found


def _find(args, kind: RunKind) -> Snapshot:
    if args.snapshot != 'auto':
        files = _from_path(Path(args.snapshot), kind)
    else:
        folders = sorted(run_folders(args.save, kind.folders, args.note), key=_last_change, reverse=True)
        files = itertools.chain.from_iterable(map(kind.checkpoints, folders))
    found, problems = _first_good(files, kind)
    if not found and args.snapshot != 'auto':
        raise BadInput(f'--snapshot {problems[0]}')
    for problem in problems:
        log.warning(problem)
    if not found:
        log.info('--snapshot auto: no good checkpoint of --note %s under %s, a new run begins', args.note, args.save)
        return Snapshot()
    log.info('goes on from %s: epoch %d step %d', found.path, *kind.position(found.checkpoint))
    if not found.folder:
        log.info('%s is no run folder: the run goes on in a new one', found.path.parent)
    return found


def _last_change(folder: Path) -> tuple[int, str]:
    """Time of the newest checkpoint in a run folder, and its name, which has the time that the run began."""
    return max((path.stat().st_mtime_ns for path in folder.glob('*.pth.tar')), default=0), folder.name


def _from_path(path: Path, kind: RunKind) -> list[Path]:
    """Return the file itself, then those of earlier positions in its folder."""
    if not path.exists():
        return [previous_of(path)] if previous_of(path).exists() else [path]
    place = kind.place(path)
    return [path, *(other for other in kind.checkpoints(path.parent) if kind.place(other) < place)]


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
            return Snapshot(None, path, checkpoint), problems
        later = tuple(other for other in kind.checkpoints(path.parent) if place < kind.place(other) < UNREADABLE)
        return Snapshot(path.parent, path, checkpoint, later), problems
    return None, problems


def read_snapshot(path: Path, kind: RunKind, whole: bool = True) -> dict:
    """Read a checkpoint of a run, on the CPU.

    Args:
        whole: check the file for damage. Without, tensors stay in the file until they are used.

    Raises:
        BadInput: damaged, or not of a run of this kind.
    """
    checkpoint = _plain_numbers(load_checkpoint(path, whole=whole), kind)
    if not (isinstance(checkpoint, dict) and kind.needed <= checkpoint.keys() and _is_well_formed(checkpoint, kind)):
        raise BadInput(f'{path}: not a checkpoint of a {kind.name} (keys {", ".join(sorted(kind.needed))})')
    return checkpoint


def _plain_numbers(checkpoint: Any, kind: RunKind) -> Any:
    """Return the checkpoint with numbers in place of tensors of no dimension, as some programs store them."""
    if not isinstance(checkpoint, dict):
        return checkpoint
    scalars = {
        key: value.item()
        for key, value in checkpoint.items()
        if isinstance(value, Tensor) and not value.ndim and kind.types.get(key) in (int, NUMBER)
    }
    return checkpoint | scalars


def _is_well_formed(checkpoint: dict, kind: RunKind) -> bool:
    """Whether the parts of a checkpoint have the types that a reader relies on."""
    return (
        all(isinstance(checkpoint[key], type_) for key, type_ in kind.types.items() if key in checkpoint)
        and min(kind.position(checkpoint)) >= 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in checkpoint['state_dict'].items())
        and all(isinstance(number, NUMBER) for number in checkpoint.get('sums', ()))
        and len(checkpoint.get('sums', [0] * kind.sums)) == kind.sums
        and ('latency' not in checkpoint or checkpoint['latency'].ndim <= 1)
    )


def compare_flags(snapshot: Snapshot, kind: RunKind, flags: Mapping[str, Any]) -> None:
    """Log the flags that differ from those of the snapshot.

    Raises:
        BadInput: the snapshot is from within an epoch, and its position means nothing under these flags.
    """
    if not snapshot.checkpoint:
        return
    before, now = snapshot.checkpoint.get('flags', {}), flags
    names = sorted(before.keys() & now.keys() - HARMLESS)
    differ = {name: f'--{name} {before[name]}, now {now[name]}' for name in names if before[name] != now[name]}
    if kind.position(snapshot.checkpoint)[1] and (lost := differ.keys() & POSITION):
        raise BadInput(
            f'--snapshot {snapshot.path} is from within an epoch and was made with other flags:'
            f' {"; ".join(differ[name] for name in sorted(lost))}; give the former ones'
        )
    if differ:
        log.info('the snapshot was made with other flags: %s', '; '.join(differ.values()))


def compare_images(snapshot: Snapshot, kind: RunKind, digest: str) -> None:
    """Warn if the images differ from those of the snapshot.

    Args:
        digest: of the images; the snapshot has its own under `IMAGES`.

    Raises:
        BadInput: they differ, and the snapshot is from within an epoch.
    """
    before = snapshot.checkpoint.get(IMAGES) if snapshot.checkpoint else None
    if before in (None, digest):
        return
    if kind.position(snapshot.checkpoint)[1]:
        raise BadInput(
            f'--snapshot {snapshot.path} is from within an epoch, and its lists or folders of images have changed'
            ' since; give the former ones'
        )
    log.warning('the lists or folders of images have changed since the snapshot')
