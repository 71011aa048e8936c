"""The checkpoint that a run goes on from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any

from torch import Tensor

from tools.errors import BadInput
from tools.files import load_checkpoint, previous_of
from tools.run.folder import run_folders
from tools.run.metrics import METRICS

CHECKPOINT = 'checkpoint.pth.tar'


HARMLESS = {
    'snapshot', 'save', 'note', 'device', 'workers', 'print_freq', 'save_freq', 'keep_checkpoints', 'local_rank',
    'max_steps', 'tensorboard', 'report', 'deterministic',
}  # fmt: skip
"""Flags that may change within an epoch."""


POSITION = {'batch_size', 'seed', 'grad_accum'}
"""Flags that the position within an epoch depends on."""


NUMBER = int | float


@dataclass(frozen=True)
class RunKind:
    """What the checkpoints of one script are, and where.

    Args:
        name: of the run, in messages.
        folders: run folders are `<folders>-<time>-<note>`.
        files: patterns of its checkpoints' names.
        needed: keys of a checkpoint.
        types: of what it holds under some keys, where it does.
        position: of a checkpoint: (epoch, batches of it that are done).
    """

    name: str
    folders: str
    files: tuple[str, ...]
    needed: frozenset[str]
    types: Mapping[str, type | UnionType]
    position: Callable[[dict], tuple[int, int]]

    def checkpoints(self, *run_folders: Path) -> list[Path]:
        """Those in some folders, the newest first."""
        paths = [path for folder in run_folders for files in self.files for path in folder.glob(files)]
        return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


@dataclass(frozen=True)
class Snapshot:
    """What a run goes on from: `folder` None to make a new one, `checkpoint` None to begin at the start."""

    folder: Path | None = None
    path: Path | None = None
    checkpoint: dict | None = None
    notes: tuple[str, ...] = ()

    def with_notes(self, *notes: str) -> 'Snapshot':
        """The same with more notes for the log, those that are not empty."""
        return replace(self, notes=(*self.notes, *filter(None, notes)))

    def without_checkpoint(self) -> 'Snapshot':
        """The same without the checkpoint, which is in use now."""
        return replace(self, checkpoint=None)


def find_snapshot(args, kind: RunKind) -> Snapshot:
    """Return the newest good checkpoint that the flags ask for.

    `--snapshot auto` takes the newest good checkpoint of a run with the same `--note` under `--save`; `--snapshot PATH`
    takes that file, or if it is damaged the one before it in its folder.

    Args:
        args: snapshot, save and note.
        kind: whose checkpoints to take.

    Raises:
        BadInput: no good file at `--snapshot PATH`.
    """
    if not args.snapshot:
        return Snapshot()
    if args.snapshot == 'auto':
        files = kind.checkpoints(*run_folders(args.save, kind.folders, args.note))
    else:
        files = _from_path(Path(args.snapshot), kind)
    found = _first_good(files, kind)
    if found.path:
        return found
    if args.snapshot != 'auto':
        raise BadInput(f'--snapshot {found.notes[0]}')
    return Snapshot(
        notes=(
            *found.notes,
            f'--snapshot auto: no good checkpoint of --note {args.note} under {args.save}, a new run begins',
        )
    )


def _from_path(path: Path, kind: RunKind) -> list[Path]:
    """The file itself, then those that were written before it into its folder."""
    if not path.exists():
        return [previous_of(path)] if previous_of(path).exists() else [path]
    others = [other for other in kind.checkpoints(path.parent) if other.name != path.name]
    return [path, *(other for other in others if other.stat().st_mtime_ns <= path.stat().st_mtime_ns)]


def _first_good(paths: list[Path], kind: RunKind) -> Snapshot:
    notes = []
    for path in paths:
        try:
            checkpoint = read_snapshot(path, kind)
        except BadInput as e:
            notes.append(str(e))
            continue
        notes.append('goes on from {}: epoch {} step {}'.format(path, *kind.position(checkpoint)))
        folder = path.parent if (path.parent / METRICS).is_file() else None
        if not folder:
            notes.append(f'{path.parent} is no run folder: the run goes on in a new one')
        return Snapshot(folder, path, checkpoint, tuple(notes))
    return Snapshot(notes=tuple(notes))


def read_snapshot(path: Path, kind: RunKind) -> dict:
    """Read a checkpoint of a run, on the CPU.

    Raises:
        BadInput: damaged, or not of a run of this kind.
    """
    checkpoint = load_checkpoint(path)
    if not (isinstance(checkpoint, dict) and kind.needed <= checkpoint.keys() and _is_well_formed(checkpoint, kind)):
        raise BadInput(f'{path}: not a checkpoint of a {kind.name} (keys {", ".join(sorted(kind.needed))})')
    return checkpoint


def _is_well_formed(checkpoint: dict, kind: RunKind) -> bool:
    """Whether the parts of a checkpoint are of the types that a reader relies on."""
    return (
        all(isinstance(checkpoint[key], type_) for key, type_ in kind.types.items() if key in checkpoint)
        and min(kind.position(checkpoint)) >= 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in checkpoint['state_dict'].items())
        and all(isinstance(number, NUMBER) for number in checkpoint.get('sums', ()))
    )


def compare_flags(snapshot: Snapshot, kind: RunKind, flags: Mapping[str, Any]) -> str:
    """One line that names the flags which differ from those the snapshot was made with; empty where none does.

    Raises:
        BadInput: the snapshot is from within an epoch, and its position means nothing under these flags.
    """
    if not snapshot.checkpoint:
        return ''
    before, now = snapshot.checkpoint.get('flags', {}), flags
    names = sorted(before.keys() & now.keys() - HARMLESS)
    differ = {name: f'--{name} {before[name]}, now {now[name]}' for name in names if before[name] != now[name]}
    if kind.position(snapshot.checkpoint)[1] and (lost := differ.keys() & POSITION):
        raise BadInput(
            f'--snapshot {snapshot.path} is from within an epoch and was made with other flags:'
            f' {"; ".join(differ[name] for name in sorted(lost))}; give the former ones'
        )
    return f'the snapshot was made with other flags: {"; ".join(differ.values())}' if differ else ''
