"""The loops over batches that train and evaluate a classifier, in any precision, on one or many processes."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tools.distributed import World
from tools.rng import derive_seed


class Tally:
    """Running sums of loss, hits and images, kept on the device; read only when printed."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch. `loss`: mean over the batch; `logits` [N, classes]; `labels` [N]."""
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = top == labels[:, None]
        count = torch.full((), len(labels), device=loss.device)
        self.sums += torch.stack([loss.double() * count, hits[:, 0].sum(), hits.sum(), count])

    def read(self, world: World | None = None) -> dict[str, float]:
        """Mean loss, top1 and top5 in per cent, and images; over all processes where `world` is given."""
        sums = world.sum(self.sums.clone()) if world else self.sums
        loss, top1, top5, images = sums.tolist()
        images = max(images, 1)
        return {'loss': loss / images, 'top1': 100 * top1 / images, 'top5': 100 * top5 / images, 'images': images}


class Precision:
    """Autocast and gradient scaling, both no-ops in full precision.

    Args:
        device: where the model runs.
        dtype: of autocast; None for full precision.
        loss_scale: a fixed scale, or None for the scaler's dynamic one. Only float16 is scaled.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None, loss_scale: float | None = None):
        self.device, self.dtype = device, dtype
        options = {} if loss_scale is None else {'init_scale': loss_scale, 'growth_interval': 2**31 - 1}
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16, **options)

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
        """Backward, clip the unscaled gradients to a total norm of `grad_clip`, and update."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group['params']], grad_clip)
        self.scaler.step(optimizer)
        self.scaler.update()


def to_device(loader: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on the device, copied without waiting where the loader pins its memory."""
    for images, labels in loader:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    world: World,
    args,
    epoch: int,
    log: Callable[..., None],
) -> dict[str, float]:
    """One pass over the training images; returns the numbers of `Tally`.

    Args:
        args: needs seed, label_smooth, grad_clip, print_freq.
        log: called with a format string and its arguments every print_freq steps.
    """
    model.train()
    tally = Tally(world.device)
    for step, (images, labels) in enumerate(to_device(loader, world.device)):
        torch.manual_seed(derive_seed(args.seed, 'dropout', epoch, step, world.rank))
        with precision.autocast():
            logits = model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smooth)
        precision.step(loss, optimizer, args.grad_clip)
        tally.add(loss, logits, labels)
        if step % args.print_freq == 0 or step == len(loader) - 1:
            now = tally.read()
            log(
                'epoch %d step %d/%d lr %.5f loss %.4f top1 %.2f top5 %.2f',
                epoch,
                step + 1,
                len(loader),
                optimizer.param_groups[0]['lr'],
                now['loss'],
                now['top1'],
                now['top5'],
            )
    return tally.read(world)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, precision: Precision, world: World) -> dict[str, float]:
    """Loss and accuracies over all images of a loader, each counted once over all processes."""
    model.eval()
    tally = Tally(world.device)
    for images, labels in to_device(loader, world.device):
        with precision.autocast():
            logits = model(images).float()
        tally.add(F.cross_entropy(logits, labels), logits, labels)
    return tally.read(world)


def cosine_lr(base: float, epoch: int, epochs: int) -> float:
    """Cosine decay by epoch, from `base` at epoch 0 towards 0 (Loshchilov & Hutter 2017, without restarts)."""
    return base * (1 + math.cos(math.pi * epoch / epochs)) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group['lr'] = lr
