"""The checkpoint that a run goes on from, and where a training run stands: its state, in and out of checkpoints.

A training's checkpoint holds weights, optimizer, gradient scaler, moving average, best accuracies, sums for the log,
and the position in the data as epoch and step. It holds no generator state, because there is none: what is drawn for a
step or an image is seeded by where it happens (see `tools.rng`), also in the workers. The learning rate follows from
the epoch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tools.checkpoint import load_checkpoint, previous_of, put_weights, strip_module_prefix
from tools.distributed import World, restart_store
from tools.errors import BadInput
from tools.logs import run_folders
from tools.metrics import METRICS
from tools.optimizers import load_moments
from tools.precision import Precision

CHECKPOINT = 'checkpoint.pth.tar'
HARMLESS = {
    'snapshot', 'save', 'note', 'device', 'workers', 'print_freq', 'save_freq', 'keep_checkpoints', 'local_rank',
    'max_steps', 'tensorboard', 'report', 'on_nan', 'deterministic',
}  # fmt: skip
POSITION = {'batch_size', 'seed', 'grad_accum'}
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


TRAINING = RunKind(
    'training',
    'eval',
    ('checkpoint*.pth.tar',),
    frozenset({'epoch', 'state_dict', 'best_acc_top1', 'best_acc_top5', 'optimizer'}),
    {
        'epoch': int,
        'step': int,
        'state_dict': dict,
        'flags': dict,
        'best_acc_top1': NUMBER,
        'best_acc_top5': NUMBER,
        'optimizer': dict,
        'scaler': dict,
        'sums': list,
    },
    lambda checkpoint: (checkpoint['epoch'], checkpoint.get('step', 0)),
)


@dataclass
class TrainState:
    """All that training changes.

    `epoch` and `step` say where the run stands: `step` batches of the epoch are done. `sums` are those of
    `engine.Tally` over these batches, of all processes, and held by the first one. `best` is (top1, top5).
    """

    net: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    ema: AveragedModel | None = None
    epoch: int = 0
    step: int = 0
    best: tuple[float, float] = (0.0, 0.0)
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)

    @property
    def lr(self) -> float:
        """Learning rate of the optimizer's first parameters."""
        return self.optimizer.param_groups[0]['lr']

    def evaluated(self) -> nn.Module:
        """The network whose accuracy counts: the moving average where there is one."""
        return self.ema.module if self.ema else self.net

    def to_checkpoint(self, args) -> dict:
        """The contents of a checkpoint file. `args`: the flags of the run."""
        checkpoint = {
            'epoch': self.epoch,
            'step': self.step,
            'state_dict': {f'module.{name}': value for name, value in self.precision.weights(self.net).items()},
            'best_acc_top1': self.best[0],
            'best_acc_top5': self.best[1],
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.precision.state_dict(),
            'sums': self.sums,
            'flags': dict(vars(args)),
        }
        if self.ema:
            checkpoint['state_dict_ema'] = self.ema.state_dict()
        return checkpoint

    def load(self, checkpoint: dict, where: str | Path, world: World) -> None:
        """Go on from a checkpoint that `read_snapshot` read from `where`.

        Raises:
            BadInput: it is of another network.
        """
        state = strip_module_prefix(checkpoint['state_dict'])
        put_weights(self.net, state, f'--snapshot {where}')
        self.precision.load_weights(self.net, state)
        try:
            load_moments(self.optimizer, checkpoint['optimizer'])
        except ValueError as e:
            raise BadInput(f'--snapshot {where}: its optimizer is of other flags ({str(e).splitlines()[0]})') from e
        try:
            self.precision.load_state_dict(checkpoint.get('scaler', {}))
            if self.ema and 'state_dict_ema' in checkpoint:
                self.ema.load_state_dict(checkpoint['state_dict_ema'])
            elif self.ema:
                self.ema.module.load_state_dict(self.net.state_dict())
        except (ValueError, TypeError, AttributeError, RuntimeError) as e:
            raise BadInput(f'--snapshot {where}: not a checkpoint of this program ({str(e).splitlines()[0]})') from e
        self.epoch, self.step = checkpoint['epoch'], checkpoint.get('step', 0)
        self.best = (checkpoint['best_acc_top1'], checkpoint['best_acc_top5'])
        self.sums = checkpoint.get('sums', self.sums) if world.is_first else self.sums


@dataclass(frozen=True)
class Snapshot:
    """What a run goes on from: `folder` None to make a new one, `checkpoint` None to begin at the start."""

    folder: Path | None = None
    path: Path | None = None
    checkpoint: dict | None = None
    notes: tuple[str, ...] = ()

    def noting(self, *notes: str) -> 'Snapshot':
        """The same with more notes for the log, those that are not empty."""
        return replace(self, notes=(*self.notes, *filter(None, notes)))

    def taken(self) -> 'Snapshot':
        """The same without the checkpoint, which is in use now."""
        return replace(self, checkpoint=None)


def find_snapshot(args, kind: RunKind) -> Snapshot:
    """The newest good checkpoint that the flags and a launcher's restart ask for.

    After a restart by torchrun, a run goes on in its own folder. Otherwise `--snapshot auto` takes the newest good
    checkpoint of a run with the same `--note` under `--save`, and `--snapshot PATH` that file, or the one before it in
    its folder where it is damaged.

    Args:
        args: snapshot, save and note.
        kind: whose checkpoints to take.

    Raises:
        BadInput: no good file at `--snapshot PATH`.
    """
    restarts, store = restart_store()
    if restarts and store.check(['folder']):
        folder = Path(store.get('folder').decode())
        found = _first_good(kind.checkpoints(folder), kind)
        if found.path or not args.snapshot:
            note = f'restart {restarts} of this run goes on from {found.path or "the start"}'
            return Snapshot(folder, found.path, found.checkpoint, (*found.notes, note))
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


def compare_flags(snapshot: Snapshot, kind: RunKind, args) -> str:
    """One line that names the flags which differ from those the snapshot was made with; empty where none does.

    Raises:
        BadInput: the snapshot is from within an epoch, and its position means nothing under these flags.
    """
    if not snapshot.checkpoint:
        return ''
    before, now = snapshot.checkpoint.get('flags', {}), vars(args)
    names = sorted(before.keys() & now.keys() - HARMLESS)
    differ = {name: f'--{name} {before[name]}, now {now[name]}' for name in names if before[name] != now[name]}
    if kind.position(snapshot.checkpoint)[1] and (lost := differ.keys() & POSITION):
        raise BadInput(
            f'--snapshot {snapshot.path} is from within an epoch and was made with other flags:'
            f' {"; ".join(differ[name] for name in sorted(lost))}; give the former ones'
        )
    return f'the snapshot was made with other flags: {"; ".join(differ.values())}' if differ else ''
