"""Parts of a training: its state and checkpoints, sums for the log, evaluation, schedule, optimizer, batches."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from tools.checkpoint import NUMBER, RunKind
from tools.distributed import World
from tools.errors import BadInput
from tools.files import put_weights, strip_module_prefix
from tools.precision import Precision
from tools.run import Waiting

log = logging.getLogger('tf-nas')

# what loading a checkpoint of another program may raise
MISFIT = ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError

TRAINING = RunKind(
    name='training',
    folders='eval',
    files=('checkpoint*.pth.tar',),
    needed=frozenset({'epoch', 'state_dict', 'best_acc_top1', 'best_acc_top5', 'optimizer'}),
    types={
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
    position=lambda checkpoint: (checkpoint['epoch'], checkpoint.get('step', 0)),
    sums=4,
)


# ---------------------------------------------------------------- state


def reason_of(error: Exception) -> str:
    """Return kind and first line of an error."""
    return f'{type(error).__name__}: {error}'.splitlines()[0]


@dataclass
class TrainState:
    """All that training changes; no generator state, since each draw is seeded by its place in the run.

    Attributes:
        model: `net`, wrapped for many devices.
        ema: moving average of the weights, if there is one.
        layout: of images and weights in memory.
        epoch, step: of the next batch to train.
        best: (top1, top5).
        sums: of a `Tally` over the epoch so far, of all processes; only in the first process.
    """

    net: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    ema: AveragedModel | None = None
    layout: torch.memory_format = torch.contiguous_format
    epoch: int = 0
    step: int = 0
    best: tuple[float, float] = (0.0, 0.0)
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)

    @property
    def lr(self) -> float:
        """Learning rate of the optimizer's first parameters."""
        return self.optimizer.param_groups[0]['lr']

    def evaluated(self) -> nn.Module:
        """Return the network whose accuracy counts: the moving average if there is one."""
        return self.ema.module if self.ema else self.net

    def to_checkpoint(self, flags: Mapping[str, Any]) -> dict:
        """Return the contents of a checkpoint file."""
        checkpoint = {
            'epoch': self.epoch,
            'step': self.step,
            'state_dict': {f'module.{name}': value for name, value in self.net.state_dict().items()},
            'best_acc_top1': self.best[0],
            'best_acc_top5': self.best[1],
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.precision.state_dict(),
            'sums': self.sums,
            'flags': dict(flags),
        }
        if self.ema:
            checkpoint['state_dict_ema'] = self.ema.state_dict()
        return checkpoint

    def load(self, checkpoint: dict, where: str | Path, world: World) -> None:
        """Resume from a checkpoint that `read_snapshot` read from `where`.

        Raises:
            BadInput: it is of another network.
        """
        source = f'--snapshot {where}'
        put_weights(self.net, strip_module_prefix(checkpoint['state_dict']), source)
        try:
            load_moments(self.optimizer, checkpoint['optimizer'])
            self.precision.load_state_dict(checkpoint.get('scaler', {}))
            if self.ema and 'state_dict_ema' in checkpoint:
                self.ema.load_state_dict(checkpoint['state_dict_ema'])
            elif self.ema:
                self.ema.module.load_state_dict(self.net.state_dict())
        except MISFIT as e:
            raise BadInput(f'{source}: not a checkpoint of this program with these flags ({reason_of(e)})') from e
        self.epoch, self.step = checkpoint['epoch'], checkpoint.get('step', 0)
        self.best = (checkpoint['best_acc_top1'], checkpoint['best_acc_top5'])
        self.sums = checkpoint.get('sums', self.sums) if world.is_first else self.sums


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class PassResult:
    """Outcome of a pass over batches: `numbers` of its `Tally`, and whether a signal stopped it before its end."""

    numbers: dict[str, float]
    stopped: bool = False


class Tally:
    """Running sums of loss, hits and images, kept on the device; read only when printed.

    Args:
        start: sums to go on from.
    """

    def __init__(self, device: torch.device, start: list[float] | None = None):
        self.sums = torch.tensor(start or [0.0] * 4, dtype=torch.float64, device=device)
        self.classes = 0

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch, unless its loss is not finite.

        Args:
            loss: mean over the batch.
            logits: [N, classes].
            labels: [N].
        """
        self.classes = logits.shape[1]
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = top == labels[:, None]
        count = torch.full((), len(labels), device=loss.device)
        sums = torch.stack([loss.double() * count, hits[:, 0].sum(), hits.sum(), count])
        self.sums += sums.where(loss.isfinite(), 0.0)

    def total(self, world: World) -> list[float]:
        """Return the sums over all processes."""
        return world.sum(self.sums.clone()).tolist()

    def read(self, world: World | None = None) -> dict[str, float]:
        """Return mean loss, top1 and top5 in % (no top5 of five classes or fewer), and images.

        Args:
            world: give it to read the sums over all processes.
        """
        loss, top1, top5, images = self.total(world) if world else self.sums.tolist()
        images = max(images, 1)
        five = {} if 0 < self.classes <= 5 else {'top5': 100 * top5 / images}
        return {'loss': loss / images, 'top1': 100 * top1 / images, **five, 'images': images}


def warn_of_chance(top1: float, images: int, num_classes: int) -> None:
    """Warn if an accuracy is within two standard errors of chance, or below.

    Args:
        top1: in %, over so many images.
    """
    chance = 1 / num_classes
    if top1 <= 100 * (chance + 2 * math.sqrt(chance * (1 - chance) / max(images, 1))):
        text = 'best top-1 of %.2f %% is no better than chance (%.2f %%): check learning rate, epochs and labels'
        log.warning(text, top1, 100 * chance)


def accuracies(val: Mapping[str, float]) -> str:
    """Return the accuracies of a validation in words, such as 'val_top1 71.20 val_top5 90.10'."""
    return ' '.join(f'val_{name} {val[name]:.2f}' for name in ('top1', 'top5') if name in val)


@torch.inference_mode()
def evaluate(
    net: nn.Module,
    loader: DataLoader,
    precision: Precision,
    world: World,
    layout: torch.memory_format = torch.contiguous_format,
    *,
    stops: Callable[[], bool] = lambda: False,
    see: Callable[[Tensor], None] | None = None,
) -> PassResult:
    """Return loss and accuracies over all images of a loader, each counted once over all processes.

    Args:
        net: not wrapped for many processes, which may have different numbers of batches.
        stops: called before each batch; whether to stop.
        see: called with the logits of each batch.
    """
    net.eval()
    tally = Tally(world.device)
    batches = to_device(loader, world.device, layout)
    for _ in range(len(loader)):
        if stops():
            return PassResult({}, stopped=True)
        batch = next(batches, None)
        if batch is None:  # this process has fewer
            continue
        images, labels = batch
        with precision.autocast():
            logits = net(images).float()
        tally.add(F.cross_entropy(logits, labels), logits, labels)
        if see:
            see(logits)
    return PassResult(tally.read(world))


# ---------------------------------------------------------------- schedule and optimizer


def lr_at(epoch: int, lr: float, warmup_epochs: int, epochs: int) -> float:
    """Return the learning rate of an epoch: a cosine decay, after a linear warm-up to `lr`."""
    if epoch < warmup_epochs:
        return lr * (epoch + 1) / warmup_epochs
    return cosine_lr(lr, epoch, epochs)


def cosine_lr(base: float, epoch: int, epochs: int) -> float:
    """Return a cosine decay by epoch, from `base` at epoch 0 towards 0 (Loshchilov & Hutter 2017, no restarts)."""
    return base * (1 + math.cos(math.pi * epoch / epochs)) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group['lr'] = lr


def last_batch(epoch: int, batches: int, max_steps: int | None, grad_accum: int) -> int:
    """Return the number of an epoch's batches to train on, so that `max_steps` updates are made in all."""
    if max_steps is None:
        return batches
    updates_left = max_steps - epoch * math.ceil(batches / grad_accum)
    return min(batches, max(updates_left, 0) * grad_accum)


def make_optimizer(
    net: nn.Module, lr: float, momentum: float, weight_decay: float, *, spare_norms: bool
) -> torch.optim.SGD:
    """Return SGD over all parameters. `spare_norms`: without weight decay on batch norm."""
    decayed, spared = [], []
    for module in net.modules():
        is_spared = spare_norms and isinstance(module, nn.modules.batchnorm._BatchNorm)
        (spared if is_spared else decayed).extend(module.parameters(recurse=False))
    groups = [{'params': decayed, 'weight_decay': weight_decay}]
    if spared:
        groups.append({'params': spared, 'weight_decay': 0.0})
    return torch.optim.SGD(groups, lr, momentum, fused=True)


def make_average(net: nn.Module, decay: float) -> AveragedModel | None:
    """Return a moving average of the weights and buffers of a network; None for a decay of 0."""
    return AveragedModel(net, multi_avg_fn=partial(update_average, decay=decay), use_buffers=True) if decay else None


@torch.no_grad()
def update_average(averages: list[Tensor], values: list[Tensor], updates: Tensor, decay: float) -> None:
    """Move averages towards values, in place. The decay is min(decay, (1 + n) / (10 + n)) after n updates, so that the
    first weights do not count for long (as TensorFlow's ExponentialMovingAverage). Does not wait for a GPU.

    Args:
        averages, values: all of one type; whole numbers are copied.
        updates: n, a scalar.
    """
    if not averages[0].is_floating_point():
        torch._foreach_copy_(averages, values)
        return
    share = 1 - ((1 + updates) / (10 + updates)).clamp(max=decay)
    differences = torch._foreach_sub(values, averages)
    torch._foreach_mul_(differences, share.to(averages[0].dtype))
    torch._foreach_add_(averages, differences)


def make_mix(mixup: float, cutmix: float, num_classes: int) -> Callable | None:
    """Return MixUp, CutMix or a random choice of them, of these alphas; None if both are 0."""
    mixes = []
    if mixup:
        mixes.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix:
        mixes.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    return v2.RandomChoice(mixes) if mixes else None


def wrap_model(net: nn.Module, world: World, compiled: bool, dtype: torch.dtype | None) -> nn.Module:
    """Return the network on all devices of the run: one per process, or all visible GPUs for a single process.

    Each process has its own running statistics of batch norm until `World.broadcast_buffers`.

    Args:
        dtype: of autocast.

    Raises:
        BadInput: what torch's DataParallel does not hand on to its threads.
    """
    if world.size > 1:
        devices = [world.device] if world.device.type == 'cuda' else None
        return nn.parallel.DistributedDataParallel(net, devices, forward_sync_buffers=False)
    if world.gpus <= 1:
        return net
    if compiled or dtype is torch.bfloat16:
        flag = '--compile' if compiled else '--amp_dtype bfloat16'
        each = f'torchrun --nproc_per_node={world.gpus} ...'
        raise BadInput(f'{flag} on {world.gpus} GPUs needs one process per GPU: {each}')
    return nn.DataParallel(net)


def begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Set missing momentum to zero.

    The fused SGD of torch 2.14 allocates it without a value, and writes it at the first update. If the gradient scaler
    skips that update for an overflow, the second one would use whatever the memory held. Besides, parameters with and
    without momentum cannot be updated in one launch.
    """
    for group in optimizer.param_groups:
        for p in group['params'] if group['momentum'] else ():
            if optimizer.state[p].get('momentum_buffer') is None:
                optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)


def load_moments(optimizer: torch.optim.Optimizer, saved: Mapping) -> None:
    """Load a state dict, but keep this optimizer's learning rate, weight decay and the like, which the flags give.

    The moments get the memory layout of the parameters.

    Raises:
        MISFIT: the state dict is malformed, or of other parameters.
    """
    asked = [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for p, moments in optimizer.state.items():
        for name, value in moments.items():
            if not torch.is_tensor(value) or not value.ndim:
                continue
            if value.shape != p.shape:
                raise ValueError(f'{name} of shape {list(value.shape)} for a parameter of {list(p.shape)}')
            # A loaded moment keeps the layout that it was saved in. torch's fused optimizers read both by their place
            # in memory: on a CPU they would permute moments whose layout is another, without an error.
            moments[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)
    for group, values in zip(optimizer.param_groups, asked, strict=True):
        group.update(values)


# ---------------------------------------------------------------- batches


def memory_format(channels_last: bool | None, device: torch.device, mixed: bool) -> torch.memory_format:
    """Return the layout of images and weights; None: channels last on a CPU and in mixed precision."""
    if channels_last is None:
        channels_last = mixed or device.type == 'cpu'
    return torch.channels_last if channels_last else torch.contiguous_format


def to_device(
    batches: Iterable[tuple],
    device: torch.device,
    layout: torch.memory_format = torch.contiguous_format,
    waiting: Waiting | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches (images, labels) on the device.

    On a GPU the next batch is copied, and finished by `images.to`, on a second stream while the GPU computes on this
    one. With pinned memory neither the host nor the GPU waits.

    Args:
        batches: pairs with a method `to(device, non_blocking=True)`: tensors, or raw images that it finishes.
        waiting: gets the seconds that pass until each batch is loaded.
    """
    side = torch.cuda.Stream(device) if device.type == 'cuda' else None
    held = None  # on a GPU, the batch whose copy began before the last one was handed over
    for images, labels in batches:
        if waiting:
            waiting.loaded()
        with torch.cuda.stream(side) if side else nullcontext():
            images = images.to(device, non_blocking=True).to(memory_format=layout)
            batch = images, labels.to(device, non_blocking=True)
        if side is None:
            yield batch
        else:
            copied = side.record_event()
            if held:
                yield _hand_over(*held, device)
            held = batch, copied
        if waiting:
            waiting.used()
    if held:
        yield _hand_over(*held, device)


def _hand_over(batch: tuple[Tensor, Tensor], copied: torch.cuda.Event, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a batch for the current stream, which waits for the copy; its memory stays until that stream is done."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    for tensor in batch:
        tensor.record_stream(stream)
    return batch
