"""The loops over batches that train and evaluate a classifier, in any precision, on one or many processes."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tools.distributed import World
from tools.precision import Precision
from tools.prefetch import to_device
from tools.rng import derive_seed
from tools.snapshot import TrainState
from tools.watch import Watch


class Tally:
    """Running sums of loss, hits and images, kept on the device; read only when printed.

    Args:
        start: sums to go on from.
    """

    def __init__(self, device: torch.device, start: list[float] | None = None):
        self.sums = torch.tensor(start or [0.0] * 4, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch, unless its loss is not finite.

        Args:
            loss: mean over the batch.
            logits: [N, classes].
            labels: [N].
        """
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = top == labels[:, None]
        count = torch.full((), len(labels), device=loss.device)
        sums = torch.stack([loss.double() * count, hits[:, 0].sum(), hits.sum(), count])
        self.sums += sums.where(loss.isfinite(), 0.0)

    def total(self, world: World) -> list[float]:
        """The sums over all processes."""
        return world.sum(self.sums.clone()).tolist()

    def read(self, world: World | None = None) -> dict[str, float]:
        """Mean loss, top1 and top5 in per cent, and images; over all processes where `world` is given."""
        loss, top1, top5, images = self.total(world) if world else self.sums.tolist()
        images = max(images, 1)
        return {'loss': loss / images, 'top1': 100 * top1 / images, 'top5': 100 * top5 / images, 'images': images}


def train_epoch(
    model: nn.Module,
    state: TrainState,
    batches: Iterator[tuple[Tensor, Tensor]],
    end: int,
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    world: World,
    args,
    watch: Watch,
    after_update: Callable[[TrainState, Tally], bool],
    allows_update: Callable[[TrainState, list[Tensor]], bool] = lambda *_: True,
) -> dict[str, float] | None:
    """Train on the rest of an epoch's batches; returns the numbers of `Tally`, or None where it was stopped.

    Args:
        model: `state.net`, wrapped for many devices.
        batches: from batch `state.step` of the epoch on.
        end: the epoch's number of batches.
        mix: MixUp or CutMix: makes soft labels of images and labels.
        args: needs seed, label_smooth, grad_accum, grad_clip, print_freq, on_nan.
        watch: told every print_freq batches.
        after_update: called after each update; says whether to stop.
        allows_update: called before each with its losses; says whether to make it.
    """
    model.train()
    losses, buffers = [], list(state.net.buffers()) if args.on_nan == 'skip' else []
    tally, rate = Tally(world.device, state.sums if world.is_first else None), Rate(state.step)
    for step, (images, labels) in zip(range(state.step, end), batches, strict=False):
        group = min(args.grad_accum, end - step // args.grad_accum * args.grad_accum)
        updates = (step + 1) % args.grad_accum == 0 or step + 1 == end
        torch.manual_seed(derive_seed(args.seed, 'dropout', state.epoch, step, world.rank))
        if not losses:
            statistics = [buffer.clone() for buffer in buffers]
        mixed, targets = mix(images, labels) if mix else (images, labels)
        with nullcontext() if updates or world.size == 1 else model.no_sync():
            with state.precision.autocast():
                logits = model(state.precision.inputs(mixed)).float()
                loss = F.cross_entropy(logits, targets, label_smoothing=args.label_smooth)
            state.precision.backward(loss / group, state.optimizer)
        losses.append(loss.detach())
        tally.add(loss, logits, labels)
        if world.is_first and ((step + 1) % args.print_freq == 0 or step in (0, end - 1)):
            log_step(watch, tally, rate, state, step, end, args.batch_size)
        if updates:
            if allows_update(state, losses):
                state.precision.step(state.optimizer, args.grad_clip)
                if state.ema:
                    state.ema.update_parameters(state.net)
            else:
                state.optimizer.zero_grad(set_to_none=True)
                state.net.zero_grad(set_to_none=True)  # the optimizer may have copies of its own
                for buffer, before in zip(buffers, statistics, strict=True):
                    buffer.copy_(before)
            losses, state.step = [], step + 1
            if after_update(state, tally):
                return None
    state.sums = tally.total(world)
    return tally.read(world)


class Rate:
    """Batches a second since the last reading."""

    def __init__(self, step: int):
        self.step, self.time = step, time.monotonic()

    def read(self, step: int) -> float:
        """`step`: batches done."""
        now = time.monotonic()
        rate = (step - self.step) / max(now - self.time, 1e-9)
        self.step, self.time = step, now
        return rate


def log_step(watch: Watch, tally: Tally, rate: Rate, state: TrainState, step: int, end: int, batch: int) -> None:
    """Tell about the epoch so far. `batch`: images of a batch over all processes."""
    now = tally.read()
    numbers = {'lr': state.lr} | {name: now[name] for name in ('loss', 'top1', 'top5')}
    watch.step(state.epoch, step + 1, end, **numbers, **{'images/s': rate.read(step + 1) * batch})


@torch.inference_mode()
def evaluate(
    net: nn.Module,
    loader: DataLoader,
    precision: Precision,
    world: World,
    memory_format: torch.memory_format = torch.contiguous_format,
    stops: Callable[[], bool] = lambda: False,
    see: Callable[[Tensor], None] | None = None,
) -> dict[str, float] | None:
    """Loss and accuracies over all images of a loader, each counted once over all processes.

    Args:
        net: not wrapped for many processes, which may have different numbers of batches.
        stops: asked before each batch whether to stop; then the result is None.
        see: gets the logits of each batch.
    """
    net.eval()
    tally = Tally(world.device)
    batches = to_device(loader, world.device, memory_format)
    for _ in range(len(loader)):
        if stops():
            return None
        batch = next(batches, None)
        if batch is None:  # this process has fewer
            continue
        images, labels = batch
        with precision.autocast():
            logits = net(precision.inputs(images)).float()
        tally.add(F.cross_entropy(logits, labels), logits, labels)
        if see:
            see(logits)
    return tally.read(world)


def cosine_lr(base: float, epoch: int, epochs: int) -> float:
    """Cosine decay by epoch, from `base` at epoch 0 towards 0 (Loshchilov & Hutter 2017, without restarts)."""
    return base * (1 + math.cos(math.pi * epoch / epochs)) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group['lr'] = lr
