"""A search: its two steps, its state and checkpoints, and the schedule that follows from its length.

After NN epochs a search writes `searched_model_NN.pth.tar`: weights at full width, masks and flags, which is all that
the next epoch needs. Within an epoch it writes `checkpoint.pth.tar`, which also has both optimizers, the sums for the
log and the batches done. No generator state is saved: each draw is seeded by its place in the run (see `tools.rng`).
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.elasticity import full_weights, gather, scatter, start_masks
from models.latency import LatencyLoss
from models.model_search import ExecutionMode, Network
from models.parsing import ARCH_KEY, MASKS_KEY, Masks, mask_widths, saved_architecture, unpack_search_checkpoint
from models.search_space import Arch, SearchSpace
from tools.checkpoint import RunKind
from tools.distributed import World
from tools.errors import BadInput
from tools.files import check_weights
from tools.precision import Precision
from tools.training import MISFIT, begin_momentum, cosine_lr, load_moments, reason_of

log = logging.getLogger('tf-nas')

PAPER_EPOCHS, PAPER_STEPS = 80, 127_760  # of the paper's architecture: epochs after the warm-up, and steps


# ---------------------------------------------------------------- steps


def backward_on_paths(
    net: Network, images: Tensor, labels: Tensor, paths: Sequence[Sequence[int]], precision: Precision
) -> tuple[list[Tensor], Tensor]:
    """Add the weights' gradients of the cross entropy on each path (paper, section 3.2).

    Args:
        paths: an op index per block, for each path.

    Returns:
        The loss of each path, and the logits [N, classes] of the first.
    """
    # all paths share the stem: it runs once, and its backward pass gets the sum of their gradients
    with precision.autocast():
        shared = net.stem(images)
    features = shared.detach().requires_grad_()
    losses, outputs = [], []
    for path in paths:
        with precision.autocast():
            logits = net.searched(features, path).float()
        loss = F.cross_entropy(logits, labels)
        precision.backward(loss)  # path by path: only one path's activations are in memory
        losses.append(loss.detach())
        outputs.append(logits.detach())
    shared.backward(features.grad)
    return losses, outputs[0]


def backward_on_mixture(
    net: Network, images: Tensor, labels: Tensor, op_weights: Tensor, latency_loss: LatencyLoss, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the gradients of log_alphas and betas: cross entropy of the mixture plus its latency loss (section 3.1).

    Args:
        op_weights: mixture weights [blocks, ops], from `Network.noisy_weights`.

    Returns:
        The cross entropy, the logits [N, classes], and the latency of the mixture in the table's unit.
    """
    with precision.autocast():
        logits = net(images, op_weights).float()
    loss = F.cross_entropy(logits, labels)
    of_latency, latency = latency_loss(op_weights, net.depth_weights())
    precision.backward(loss + of_latency)
    return loss.detach(), logits.detach(), latency.detach()


def train_only(wanted: Iterable[nn.Parameter], others: Iterable[nn.Parameter]) -> None:
    """Enable gradients for `wanted` and disable them for `others`."""
    for p in others:
        p.requires_grad_(False)
    for p in wanted:
        p.requires_grad_(True)


@dataclass(frozen=True)
class Recipe:
    """Flags of the schedule and of the optimizers: SGD for the weights, Adam for the architecture."""

    epochs: int
    warmup_epochs: int
    T: float
    T_decay: float
    w_lr: float
    w_mom: float
    w_wd: float
    a_lr: float
    a_betas: tuple[float, float]
    a_wd: float

    def weights_lr(self, epoch: int) -> float:
        """Return the learning rate of the weights in an epoch: a cosine decay."""
        return cosine_lr(self.w_lr, epoch, self.epochs)

    def temperature(self, epoch: int) -> float:
        """Return the temperature of the Gumbel softmax in an epoch; it decays after the warm-up."""
        return self.T * self.T_decay ** max(epoch - self.warmup_epochs, 0)

    def architecture_steps(self, epoch: int, step: int, steps_an_epoch: int) -> int:
        """Return the number of architecture steps, and so of their batches, before a weight step.

        After the warm-up, every second weight step has an architecture step.
        """
        if epoch < self.warmup_epochs:
            return 0
        in_whole_epochs = (epoch - self.warmup_epochs) * -(-steps_an_epoch // 2)
        return in_whole_epochs + -(-step // 2)

    def make_optimizers(self, net: Network, epoch: int) -> tuple[torch.optim.SGD, torch.optim.Adam]:
        """Return fresh optimizers of the weights and of the architecture."""
        lr = self.weights_lr(epoch)
        # fused: few kernel launches per step
        weights = torch.optim.SGD(net.weight_parameters(), lr, self.w_mom, weight_decay=self.w_wd, fused=True)
        begin_momentum(weights)
        alphas = net.arch_parameters()
        return weights, torch.optim.Adam(alphas, self.a_lr, self.a_betas, weight_decay=self.a_wd, fused=True)


def rehearse_architecture_step(
    net: Network, shape: Sequence[int], latency_loss: LatencyLoss, precision: Precision, recipe: Recipe
) -> None:
    """Run and discard an architecture step at the widest widths, so that a GPU with too little memory fails now.

    Without it, memory would run out after the warm-up, or later, when scaling widens operators. Changes nothing.

    Args:
        shape: a batch of images, [N, 3, H, W].

    Raises:
        torch.OutOfMemoryError: the step needs more memory than there is.
    """
    device = precision.device
    precision = Precision(device, precision.dtype)  # its own gradient scale
    with torch.device('meta'):  # initial weights would be drawn from torch's global generator
        widest = Network(net.space.max_widths(), net.classifier.linear.out_features, net.space, net.mode)
    widest = widest.to_empty(device=device).train()
    with torch.no_grad():
        torch._foreach_zero_(list(widest.parameters()))
    _, optimizer = recipe.make_optimizers(widest, 0)  # the momentum of the weights takes memory too
    images = torch.zeros(*shape, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(shape[0], dtype=torch.int64, device=device)
    train_only(widest.arch_parameters(), widest.weight_parameters())
    op_weights = F.softmax(widest.log_alphas(), dim=1)
    backward_on_mixture(widest, images, labels, op_weights, latency_loss, precision)
    precision.step(optimizer, 1.0)
    del widest, optimizer, images, op_weights
    torch.cuda.empty_cache()


# ---------------------------------------------------------------- schedule


def default_schedule(epochs: int, steps: int) -> dict[str, float]:
    """Return T_decay, a_lr and a_wd for a search of this length: the paper's values at the paper's length.

    Args:
        epochs: after the warm-up.
        steps: of the architecture.
    """
    share = steps / PAPER_STEPS
    return {
        # the temperature falls as far as in the paper, in fewer or more epochs
        'T_decay': 0.96 ** (PAPER_EPOCHS / max(epochs, 1)),
        # Gradients of the architecture agree from step to step, so fewer steps need a higher rate to go as far. With a
        # much higher one the noise of the last steps decides. The power is a choice by experiment.
        'a_lr': round(0.01 * max(PAPER_STEPS / max(steps, 1), 1) ** 0.25, 3),
        # While the decay pulls harder than the loss, as at high temperatures, Adam moves all operators alike at any
        # rate. A short search has too few steps at low temperatures to decide in.
        'a_wd': 5e-4 * min(share, 1),
    }


def settle_schedule(
    given: Mapping[str, float | None], saved: Mapping[str, Any], epochs: int, steps: int
) -> tuple[dict[str, float], dict[str, float | None]]:
    """Return T_decay, a_lr and a_wd, and what a checkpoint keeps: None for a value that follows from the length.

    A search that resumes with another length then follows the schedule of that length.

    Args:
        given: values of the flags, None if a flag is not given.
        saved: flags of the snapshot, if there is one.
        epochs, steps: see `default_schedule`.

    Raises:
        BadInput: a saved value is no number.
    """
    values, kept = {}, {}
    for name, default in default_schedule(epochs, steps).items():
        earlier = saved.get(name)
        if not isinstance(earlier, (int, float, NoneType)):
            raise BadInput(f'--snapshot: its {name} is {earlier!r}, should be a number')
        kept[name] = earlier if given[name] is None else given[name]
        values[name] = default if kept[name] is None else kept[name]
        if given[name] is None and epochs:
            log.info('--%s %.4g, for %d epochs and %d steps of the architecture', name, values[name], epochs, steps)
    if not epochs:
        log.warning('no epoch trains the architecture: --warmup_epochs takes all --epochs')
    return values, kept


# ---------------------------------------------------------------- state and checkpoints


def position(checkpoint: dict) -> tuple[int, int]:
    """Return (epoch, step) of the next batch to train.

    Between two epochs a checkpoint has only `epoch`, the last one done, as the release writes it.
    """
    if 'step' in checkpoint:
        return checkpoint['epoch'], checkpoint['step']
    return checkpoint['epoch'] + 1, 0


SEARCH = RunKind(
    name='search',
    folders='search',
    files=('searched_model_*.pth.tar', 'checkpoint*.pth.tar'),
    needed=frozenset({'epoch', 'state_dict', MASKS_KEY, 'flags'}),
    types={
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
    position=position,
    sums=8,
)


def searched_model(epochs_done: int) -> str:
    """Return the name of the file that a search writes after so many epochs, as the release numbers it."""
    return f'searched_model_{epochs_done:02d}.pth.tar'


def remove_old_models(folder: Path | None, epochs_done: int, keep: int | None) -> None:
    """Remove the searched models of all but the last `keep` epochs (None: keep all)."""
    if folder is None or keep is None:
        return
    for path in folder.glob('searched_model_*.pth.tar'):
        number = path.name.removeprefix('searched_model_').removesuffix('.pth.tar')
        if number.isdigit() and int(number) <= epochs_done - keep:
            path.unlink()


@dataclass
class SearchState:
    """Everything that a search changes.

    Attributes:
        net: what the steps train, at the widths that `masks` keep.
        full: all weights at full width.
        epoch, step: of the next batch to train.
        sums: of both `Tally`s (weights, architecture) over the epoch so far; only in the first process.
        latency: of the mixture at the last architecture step, in the table's unit.
        arch: current architecture, whose widths in `masks` were scaled to the target; None during the warm-up.
        w_optimizer, a_optimizer: new in each epoch.
        w_precision, a_precision: hold the gradient scale of each optimizer.
    """

    net: Network
    full: dict[str, Tensor]
    masks: Masks
    recipe: Recipe
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

    def begin_epoch(self) -> None:
        """Copy widths and weights of the epoch into the network, and make the optimizers."""
        gather(self.net, self.full, self.masks)
        self.sums, self.latency = [0.0] * 8, torch.zeros(())
        self.w_optimizer, self.a_optimizer = self.recipe.make_optimizers(self.net, self.epoch)

    def scatter_to_full(self) -> None:
        """Copy the network's weights into the full-width weights; channels that the masks drop keep their values."""
        scatter(self.net, self.full, self.masks)

    def end_epoch(self) -> None:
        """Advance to the start of the next epoch."""
        self.epoch, self.step = self.epoch + 1, 0

    def to_checkpoint(self, flags: Mapping[str, Any]) -> dict:
        """Return the contents of a checkpoint file. The weights are those of the last `scatter_to_full`."""
        checkpoint = {
            'state_dict': {f'module.{name}': value for name, value in self.full.items()},
            'epoch': self.epoch if self.step else self.epoch - 1,  # see `position`
            MASKS_KEY: self.masks,
            'flags': dict(flags),
            'scalers': [self.w_precision.state_dict(), self.a_precision.state_dict()],
        }
        if self.arch:
            checkpoint[ARCH_KEY] = self.arch
        if self.step:
            checkpoint['step'] = self.step
            checkpoint['w_optimizer'] = self.w_optimizer.state_dict()
            checkpoint['a_optimizer'] = self.a_optimizer.state_dict()
            checkpoint['sums'] = self.sums
            checkpoint['latency'] = self.latency
        return checkpoint

    def load(self, checkpoint: Mapping, where: str | Path, world: World) -> None:
        """Continue from a checkpoint that was read from `where`.

        Raises:
            BadInput: it is of another search space or number of classes, or damaged.
        """
        source = f'--snapshot {where}'
        state, self.masks = unpack_search_checkpoint(checkpoint, source, self.net.space)
        check_weights(self.full, state, source)
        for name, value in state.items():
            self.full[name].copy_(value)
        self.arch = saved_architecture(checkpoint, source, self.net.space)
        self.epoch, self.step = position(checkpoint)
        try:
            scalers = checkpoint.get('scalers', ())
            for precision, scaler in zip((self.w_precision, self.a_precision), scalers, strict=False):
                precision.load_state_dict(scaler)
            if self.step:
                self._load_within_epoch(checkpoint, world)
        except MISFIT as e:
            raise BadInput(f'{source}: not a checkpoint of this program ({reason_of(e)})') from e

    def _load_within_epoch(self, checkpoint: Mapping, world: World) -> None:
        self.begin_epoch()
        load_moments(self.w_optimizer, checkpoint['w_optimizer'])
        load_moments(self.a_optimizer, checkpoint['a_optimizer'])
        begin_momentum(self.w_optimizer)
        if world.is_first:
            self.sums = checkpoint['sums']
        self.latency = checkpoint['latency']


def new_state(
    num_classes: int,
    space: SearchSpace,
    device: torch.device,
    mode: ExecutionMode,
    recipe: Recipe,
    dtype: torch.dtype | None,
) -> SearchState:
    """Return the state of a fresh search; its weights are drawn from torch's global generator.

    Args:
        dtype: of autocast; None for float32.
    """
    full, masks = full_weights(num_classes, device, space), start_masks(space)
    net = Network(mask_widths(masks), num_classes, space, mode).to(device).train()
    return SearchState(net, full, masks, recipe, Precision(device, dtype), Precision(device, dtype))
