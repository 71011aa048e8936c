"""The state of a search, and its checkpoints.

A search writes `searched_model_NN.pth.tar` after NN epochs: weights at full width, masks and flags, all that the next
epoch needs. Within an epoch it writes `checkpoint.pth.tar`, which also has both optimizers, the sums for the log,
and the number of batches done. Learning rate and temperature follow from the epoch, the positions in both streams of
images from epoch and batch. There is no generator state to keep: all that is drawn for a step or an image, in workers
too, is seeded by its place in the run (see `tools.rng`).
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from models.elasticity import align_operators, full_weights, gather, scatter, start_masks
from models.model_search import ExecutionMode, Network
from models.parsing import ARCH_KEY, MASKS_KEY, Masks, mask_widths, saved_architecture, unpack_search_checkpoint
from models.search_space import Arch, SearchSpace
from models.search_steps import make_optimizers
from tools.distributed import World
from tools.errors import BadInput
from tools.files import check_weights
from tools.precision import DTYPES, Precision
from tools.run.resume import RunKind, Snapshot
from tools.settle import with_flags
from tools.training import begin_momentum, cosine_lr, load_moments


def position(checkpoint: dict) -> tuple[int, int]:
    """Return (epoch, step) of the next batch to train, from a search's checkpoint; see `published_position`."""
    if 'step' in checkpoint:
        return checkpoint['epoch'], checkpoint['step']
    return checkpoint['epoch'] + 1, 0


def published_position(epoch: int, step: int) -> dict[str, int]:
    """Return `epoch` and `step` of the next batch to train; between two epochs only `epoch`, the last one done."""
    return {'epoch': epoch, 'step': step} if step else {'epoch': epoch - 1}


SEARCH = RunKind(
    'search',
    'search',
    ('searched_model_*.pth.tar', 'checkpoint*.pth.tar'),
    frozenset({'epoch', 'state_dict', MASKS_KEY, 'flags'}),
    {
        'epoch': int,
        'step': int,
        'state_dict': dict,
        'flags': dict,
        MASKS_KEY: dict,
        ARCH_KEY: dict,
        'w_optimizer': dict,
        'a_optimizer': dict,
        'scalers': list,
        'sums': list,
        'latency': Tensor,
    },
    position,
    sums=8,
)


def searched_model(epochs_done: int) -> str:
    """Return the name of the file that a search writes after so many epochs, as the release numbers it."""
    return f'searched_model_{epochs_done:02d}.pth.tar'


PUBLISHED_T_DECAY, PUBLISHED_A_LR, PUBLISHED_A_WD = 0.96, 0.01, 5e-4

PUBLISHED_EPOCHS, PUBLISHED_STEPS = 80, 127_760
"""Length of the paper's search after the warm-up: epochs, and steps of the architecture."""


def default_t_decay(epochs: int) -> float:
    """Return the factor of T after each of `epochs` epochs; together they are that of the paper's 80, 0.04."""
    return PUBLISHED_T_DECAY ** (PUBLISHED_EPOCHS / max(epochs, 1))


def default_a_lr(steps: int) -> float:
    """Return the learning rate of the architecture for so many steps: the paper's for its number, more for fewer.

    The power is a choice by experiment. Gradients of the architecture agree from step to step, so fewer steps need a
    higher rate to go as far. With a much higher one, the noise of the last few steps decides.
    """
    return round(PUBLISHED_A_LR * max(PUBLISHED_STEPS / max(steps, 1), 1) ** (1 / 4), 3)


def default_a_wd(steps: int) -> float:
    """Return the weight decay of the architecture for so many steps: the paper's for its number, less for fewer.

    Adam scales each update by its size. While the pull of the decay is larger than the gradient of the loss, as at high
    temperatures, all log-probabilities move alike, at any learning rate. A short search has too few steps at low
    temperatures to decide in.
    """
    return PUBLISHED_A_WD * min(steps / PUBLISHED_STEPS, 1)


def with_schedule(args: Namespace, snapshot: Snapshot, steps_an_epoch: int) -> tuple[Namespace, dict, str]:
    """Return `args` with values of `T_decay`, `a_lr`, `a_wd`, what a checkpoint keeps of them, and a line for the log.

    A value that is not given is that of the snapshot, if it has one; otherwise it follows from the length of the
    search, as `weights_lr` does. The checkpoint keeps None for such a value: a run that resumes with another length
    follows the schedule of that length.

    Args:
        args: T, T_decay, a_lr, a_wd, epochs, warmup_epochs.

    Raises:
        BadInput: a value of the snapshot is no number.
    """
    before, epochs = (snapshot.checkpoint or {}).get('flags', {}), args.epochs - args.warmup_epochs
    steps = architecture_steps(args.epochs, 0, steps_an_epoch, args)
    defaults = {'T_decay': default_t_decay(epochs), 'a_lr': default_a_lr(steps), 'a_wd': default_a_wd(steps)}
    last = args.T * defaults['T_decay'] ** max(epochs - 1, 0)
    why = {
        'T_decay': f'T falls from {args.T:g} to {last:.2f} in {epochs} epochs',
        **dict.fromkeys(('a_lr', 'a_wd'), f'for {steps:,} steps of the architecture'),
    }
    kept, values, lines = {}, {}, []
    for name, default in defaults.items():
        given, earlier = getattr(args, name), before.get(name)
        if not isinstance(earlier, (int, float, NoneType)):
            raise BadInput(f'--snapshot {snapshot.path}: its {name} is {earlier!r}, should be a number')
        kept[name] = earlier if given is None else given
        values[name] = default if kept[name] is None else kept[name]
        if given is None and epochs:
            lines.append(f'--{name} {values[name]:.4g} ({why[name] if earlier is None else "as before"})')
    if not epochs:
        lines = [f'no epoch trains the architecture: --warmup_epochs is {args.warmup_epochs} of --epochs {args.epochs}']
    return with_flags(args, **values), kept, ', '.join(lines)


def weights_lr(epoch: int, args) -> float:
    """Return the learning rate of the weights in an epoch. `args`: w_lr, epochs."""
    return cosine_lr(args.w_lr, epoch, args.epochs)


def temperature(epoch: int, args) -> float:
    """Return the temperature of the Gumbel softmax in an epoch; it decays after the warm-up.

    Args:
        args: T, T_decay, warmup_epochs.
    """
    return args.T * args.T_decay ** max(epoch - args.warmup_epochs, 0)


def architecture_steps(epoch: int, step: int, steps_an_epoch: int, args) -> int:
    """Return the number of architecture steps, and so of batches, before a weight step.

    After the warm-up, every second weight step has an architecture step.

    Args:
        args: warmup_epochs.
    """
    if epoch < args.warmup_epochs:
        return 0
    return (epoch - args.warmup_epochs) * -(-steps_an_epoch // 2) + -(-step // 2)


def remove_old_models(folder: Path | None, epochs_done: int, keep: int | None) -> None:
    """Remove the searched models of all but the last `keep` epochs (None: keep all)."""
    for path in folder.glob('searched_model_*.pth.tar') if folder and keep else ():
        number = path.name.removeprefix('searched_model_').removesuffix('.pth.tar')
        if number.isdigit() and int(number) <= epochs_done - keep:
            path.unlink()


@dataclass
class SearchState:
    """Everything that a search changes.

    Steps train `net`, which has the widths that `masks` keep. `full` has all weights at full width. Batch `step` of
    `epoch` is the next one to train. `sums` are the sums of both `Tally`s (weights, architecture) over the epoch so far
    and over all processes; only the first process has them. `latency` is that of the mixture at the last architecture
    step, in ms, or with limits [tables]. Both optimizers are new in each epoch; each has a `Precision`, which holds its
    gradient scale. `arch` is the current architecture, whose widths in `masks` were scaled to the target; None during
    the warm-up.
    """

    net: Network
    full: dict[str, Tensor]
    masks: Masks
    w_precision: Precision
    a_precision: Precision
    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * 8)
    latency: Tensor = field(default_factory=lambda: torch.zeros(()))
    arch: Arch | None = None
    w_optimizer: torch.optim.Optimizer | None = None
    a_optimizer: torch.optim.Optimizer | None = None

    @property
    def lr(self) -> float:
        """Learning rate of the weights."""
        return self.w_optimizer.param_groups[0]['lr']

    def begin_epoch(self, args) -> None:
        """Copy widths and weights of the epoch into the network, and make the optimizers.

        Args:
            args: those of `make_optimizers` and `weights_lr`.
        """
        gather(self.net, self.full, self.masks)
        self.sums, self.latency = [0.0] * 8, torch.zeros(())
        self.w_optimizer, self.a_optimizer = make_optimizers(self.net, weights_lr(self.epoch, args), args)

    def scatter_to_full(self) -> None:
        """Copy the network's weights into the full-width weights; channels that the masks drop keep their values."""
        scatter(self.net, self.full, self.masks)

    def broadcast_full(self, world: World) -> None:
        """Copy the full-width weights of the first process to all others."""
        world.broadcast(self.full.values())

    def end_epoch(self) -> None:
        """Advance to the start of the next epoch."""
        self.epoch, self.step = self.epoch + 1, 0

    def to_checkpoint(self, flags: Mapping[str, Any]) -> dict:
        """Return the contents of a checkpoint file. The weights are those of the last `scatter_to_full`."""
        checkpoint = {
            MASKS_KEY: self.masks,
            'flags': dict(flags),
            'scalers': [precision.state_dict() for precision in (self.w_precision, self.a_precision)],
        }
        if self.arch:
            checkpoint[ARCH_KEY] = self.arch
        if self.step:
            checkpoint |= {
                'w_optimizer': self.w_optimizer.state_dict(),
                'a_optimizer': self.a_optimizer.state_dict(),
                'sums': self.sums,
                'latency': self.latency,
            }
        weights = {f'module.{name}': value for name, value in self.full.items()}
        return {'state_dict': weights, **published_position(self.epoch, self.step), **checkpoint}

    def load(self, checkpoint: Mapping, where: str | Path, world: World, args) -> None:
        """Continue from a checkpoint that `find_snapshot` read from `where`.

        Raises:
            BadInput: it is of another search space or number of classes, or damaged.
        """
        state, masks = unpack_search_checkpoint(checkpoint, f'--snapshot {where}', self.net.space)
        check_weights(self.full, state, f'--snapshot {where}')
        for name, value in state.items():
            self.full[name].copy_(value)
        self.masks, self.arch = masks, saved_architecture(checkpoint, f'--snapshot {where}', self.net.space)
        self.epoch, self.step = position(checkpoint)
        precisions = self.w_precision, self.a_precision
        try:
            for precision, scaler in zip(precisions, checkpoint.get('scalers', ()), strict=False):
                precision.load_state_dict(scaler)
            if self.step:
                self.begin_epoch(args)
                load_moments(self.w_optimizer, checkpoint['w_optimizer'])
                load_moments(self.a_optimizer, checkpoint['a_optimizer'])
                begin_momentum(self.w_optimizer)
                self.sums = checkpoint['sums'] if world.is_first else self.sums
                self.latency = checkpoint['latency']
        except (ValueError, KeyError) as e:
            raise BadInput(f'--snapshot {where}: not a checkpoint of this program ({str(e).splitlines()[0]})') from e


def start_search(
    snapshot: Snapshot, space: SearchSpace, num_classes: int, world: World, args
) -> tuple[SearchState, Snapshot]:
    """Return the initial state of a search, fresh or from the snapshot, and the snapshot without its checkpoint.

    Fresh weights are drawn from torch's global generator.

    Args:
        args: aligned_start, checkpoint_ops, compile, amp, and those of `SearchState.begin_epoch`.

    Raises:
        BadInput: the snapshot does not fit the network.
    """
    full, masks = full_weights(num_classes, world.device, space), start_masks(space)
    if args.aligned_start:
        align_operators(full, space)
    mode = ExecutionMode(fused=world.device.type == 'cuda', recompute=args.checkpoint_ops, compiled=args.compile)
    net = Network(mask_widths(masks), num_classes, space, mode).to(world.device).train()
    precisions = (Precision(world.device, DTYPES.get(args.amp)) for _ in range(2))
    state = SearchState(net, full, masks, *precisions)
    if snapshot.checkpoint:
        state.load(snapshot.checkpoint, snapshot.path, world, args)
    return state, snapshot.without_checkpoint()
