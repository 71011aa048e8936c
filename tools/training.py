"""Training a network from scratch, for both training scripts: the run, its epochs, their steps, evaluation."""

import logging
import math
import time
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

from tools.checkpoint import NUMBER, Checkpointer, RunKind, Snapshot, ended_with
from tools.distributed import World
from tools.errors import BadInput
from tools.files import put_weights, strip_module_prefix
from tools.options import RECIPE_BATCH, RECIPE_LR
from tools.precision import Precision
from tools.rng import derive_seed
from tools.run import RunLogger

log = logging.getLogger('tf-nas')

WARMUP_EPOCHS = 5
LARGE_BATCH = 256

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
    sums=4,
)


@dataclass
class TrainState:
    """All that training changes.

    `model` is `net`, wrapped for many devices. Batch `step` of `epoch` is the next one to train. `sums` are those of
    `Tally` over the epoch so far, of all processes, and held by the first one. `best` is (top1, top5).

    The checkpoint has weights, optimizer, gradient scaler, moving average, best accuracies, sums for the log, and the
    position in the data. There is no generator state to keep: all that is drawn for a step or an image is seeded by its
    place in the run (see `tools.rng`). The learning rate follows from the epoch.
    """

    net: nn.Module
    model: nn.Module
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
        put_weights(self.net, strip_module_prefix(checkpoint['state_dict']), f'--snapshot {where}')
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


def start_state(
    net: nn.Module, precision: Precision, snapshot: Snapshot, world: World, args
) -> tuple[TrainState, Snapshot]:
    """Return the state that training starts from, fresh or the snapshot's, and the snapshot without it.

    Args:
        net: on its device, in its memory format.

    Raises:
        BadInput: the snapshot does not fit the network.
    """
    net, optimizer = precision.prepare(net, make_optimizer(net, args))
    average = partial(update_average, decay=args.ema_decay)
    ema = AveragedModel(net, multi_avg_fn=average, use_buffers=True) if args.ema_decay else None
    state = TrainState(net, net, optimizer, precision, ema)
    if snapshot.checkpoint:
        state.load(snapshot.checkpoint, snapshot.path, world)
    begin_momentum(state.optimizer)
    if args.compile:
        state.net.compile()
    state.model = wrap_model(state.net, world, args)
    return state, snapshot.without_checkpoint()


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


def fit(
    state: TrainState,
    loaders: tuple[DataLoader, DataLoader],
    num_classes: int,
    world: World,
    args,
    checkpointer: Checkpointer,
    logger: RunLogger,
) -> int:
    """Train until `args.epochs` epochs or `args.max_steps` updates are done, evaluating and saving after each epoch.

    SIGTERM and SIGINT stop it after the next update, with a checkpoint. Returns the exit code.

    Args:
        loaders: of training and validation images.
    """
    layout, mix = memory_format(args, world.device), make_mix(args, num_classes)
    train_loader, val_loader = loaders
    steps = len(train_loader)
    total = sum(last_batch(epoch, steps, args) for epoch in range(args.epochs))
    logger.start_progress(total, state.epoch * steps + state.step)
    with checkpointer, ended_with(*loaders):
        while state.epoch < args.epochs and (end := last_batch(state.epoch, steps, args)):
            set_lr(state.optimizer, lr_at(state.epoch, args))
            train = train_epoch(state, train_loader, mix, world, args, checkpointer, logger)
            if train.stopped:
                break
            world.broadcast_buffers(state.net, *filter(None, [state.ema]))
            val = evaluate(
                state.evaluated(), val_loader, state.precision, world, layout, stops=checkpointer.stop_requested
            )
            if val.stopped:
                checkpointer.save(state)
                break
            plain = evaluate(state.net, val_loader, state.precision, world, layout) if state.ema else val
            is_best = val.numbers['top1'] > state.best[0] or state.epoch == 0
            state.best = max(state.best, (val.numbers['top1'], val.numbers.get('top5', 100.0)))
            if num_classes <= 5:
                train.numbers.pop('top5', None)  # of an epoch that went on after its last batch
            log_epoch(logger, state, train.numbers, val.numbers, plain.numbers)
            if end == steps:
                state.epoch, state.step, state.sums = state.epoch + 1, 0, [0.0] * 4
            if is_best:
                checkpointer.save_as(state, 'model_best.pth.tar')
            checkpointer.save(state)
            if state.step:
                break
    if not checkpointer.signal:
        log.info('done: epoch %d of %d, best_top1 %.2f', state.epoch, args.epochs, state.best[0])
        if warning := warn_of_chance(state.best[0], len(val_loader.dataset), num_classes):
            log.warning(warning)
        logger.record('end', state.epoch, best_top1=state.best[0])
    return checkpointer.exit_code()


def train_epoch(
    state: TrainState,
    loader: DataLoader,
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    world: World,
    args,
    checkpointer: Checkpointer,
    logger: RunLogger,
) -> PassResult:
    """Train on the rest of an epoch's batches.

    Args:
        mix: MixUp or CutMix: makes soft labels of images and labels.
        args: batch_size, seed, label_smooth, grad_accum, grad_clip, max_steps, print_freq, and the memory format.
    """
    state.model.train()
    end, losses = last_batch(state.epoch, len(loader), args), []
    tally, rate = Tally(world.device, state.sums if world.is_first else None), Rate(state.step)
    loader.sampler.set_epoch(state.epoch, state.step)
    batches = to_device(loader, world.device, memory_format(args, world.device))
    batches = logger.watch(batches, '--workers', args.batch_size)
    for step, (images, labels) in zip(range(state.step, end), batches, strict=False):
        group = min(args.grad_accum, end - step // args.grad_accum * args.grad_accum)
        updates = (step + 1) % args.grad_accum == 0 or step + 1 == end
        torch.manual_seed(derive_seed(args.seed, 'dropout', state.epoch, step, world.rank))
        mixed, targets = mix(images, labels) if mix else (images, labels)
        with nullcontext() if updates or world.size == 1 else state.model.no_sync():
            with state.precision.autocast():
                logits = state.model(mixed).float()
                loss = F.cross_entropy(logits, targets, label_smoothing=args.label_smooth)
            state.precision.backward(loss / group)  # with many processes this averages their gradients
        losses.append(loss.detach())
        tally.add(loss, logits, labels)
        logger.advance()
        if world.is_first and ((step + 1) % args.print_freq == 0 or step in (0, end - 1)):
            log_step(logger, tally, rate, state, step, end, args.batch_size)
        if not updates:
            continue
        if checkpointer.allows_update(state, losses):
            state.precision.step(state.optimizer, args.grad_clip)
            if state.ema:
                state.ema.update_parameters(state.net)
        losses, state.step = [], step + 1
        if checkpointer.is_due():
            state.sums = tally.total(world)
            checkpointer.save(state)
        if checkpointer.signal:
            return PassResult({}, stopped=True)
    state.sums = tally.total(world)
    return PassResult(tally.read(world))


def log_step(logger: RunLogger, tally: Tally, rate: Rate, state: TrainState, step: int, end: int, batch: int) -> None:
    """Log the epoch so far. `batch`: images of a batch over all processes."""
    now = tally.read()
    numbers = {'lr': state.lr} | {name: now[name] for name in ('loss', 'top1', 'top5') if name in now}
    logger.step(state.epoch, step + 1, end, **numbers, **{'images/s': rate.read(step + 1) * batch})


def log_epoch(logger: RunLogger, state: TrainState, train: dict, val: dict, plain: dict) -> None:
    """Log the end of an epoch. `plain`: as `val`, of the weights themselves if `val` is of their moving average."""
    log.info('epoch %d train_loss %.4f train_top1 %.2f', state.epoch, train['loss'], train['top1'])
    average = f' (moving average; the weights themselves: {plain["top1"]:.2f})' if state.ema else ''
    log.info('epoch %d %s best_top1 %.2f%s', state.epoch, accuracies(val), state.best[0], average)
    more = {'val_without_average': plain} if state.ema else {}
    logger.record('epoch', state.epoch, lr=state.lr, train=train, val=val, best_top1=state.best[0], **more)


def warn_of_chance(top1: float, images: int, num_classes: int) -> str:
    """Return a warning if an accuracy is within two standard errors of chance, or below; else ''.

    Args:
        top1: in %, over so many images.
    """
    chance = 1 / num_classes
    if top1 > 100 * (chance + 2 * math.sqrt(chance * (1 - chance) / max(images, 1))):
        return ''
    return (
        f'the best top-1 of {top1:.2f} % is no better than chance ({100 * chance:.2f} %, {images} images):'
        ' look at learning rate, number of epochs, and labels'
    )


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


def lr_at(epoch: int, args) -> float:
    """Return the learning rate of an epoch: cosine, for large batches after a linear warm-up.

    Args:
        args: lr, lr_scale, lr_warmup_epochs, epochs, batch_size, grad_accum.
    """
    batch = args.batch_size * args.grad_accum
    lr = args.lr * batch / RECIPE_BATCH if args.lr_scale == 'linear' else args.lr
    usual = WARMUP_EPOCHS if batch > LARGE_BATCH else 0
    rising = usual if args.lr_warmup_epochs is None else args.lr_warmup_epochs
    if epoch < rising:
        return lr * (epoch + 1) / rising
    return cosine_lr(lr, epoch, args.epochs)


def lr_note(args) -> str:
    """Return a line for the log if the published learning rate is used with another batch size; else ''."""
    batch = args.batch_size * args.grad_accum
    if args.lr != RECIPE_LR or args.lr_scale == 'linear' or batch == RECIPE_BATCH:
        return ''
    scaled = args.lr * batch / RECIPE_BATCH
    return (
        f'--lr {args.lr} is for {RECIPE_BATCH} images an update, not {batch}: --lr_scale linear would take {scaled:g}'
    )


def cosine_lr(base: float, epoch: int, epochs: int) -> float:
    """Return a cosine decay by epoch, from `base` at epoch 0 towards 0 (Loshchilov & Hutter 2017, no restarts)."""
    return base * (1 + math.cos(math.pi * epoch / epochs)) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group['lr'] = lr


def last_batch(epoch: int, batches: int, args) -> int:
    """Return the number of an epoch's batches to train on, so that `args.max_steps` updates are made in all."""
    if args.max_steps is None:
        return batches
    updates_left = args.max_steps - epoch * math.ceil(batches / args.grad_accum)
    return min(batches, max(updates_left, 0) * args.grad_accum)


def memory_format(args, device: torch.device) -> torch.memory_format:
    """Return the layout of images and weights: as `args.channels_last` says; by default channels last on a CPU and in
    mixed precision.

    Args:
        args: channels_last, and opt_level if the script has mixed precision.
    """
    half = getattr(args, 'opt_level', None) not in (None, 'O0')
    chosen = args.channels_last if args.channels_last is not None else half or device.type == 'cpu'
    return torch.channels_last if chosen else torch.contiguous_format


def make_optimizer(net: nn.Module, args) -> torch.optim.SGD:
    """Return SGD over all parameters, without weight decay on batch norm if `args.no_weight_decay_bn`."""
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    spared = {p for module in norms for p in module.parameters()} if args.no_weight_decay_bn else set()
    groups = [{'params': [p for p in net.parameters() if p not in spared], 'weight_decay': args.weight_decay}]
    if spared:
        groups.append({'params': [p for p in net.parameters() if p in spared], 'weight_decay': 0.0})
    return torch.optim.SGD(groups, args.lr, args.momentum, fused=True)


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


def make_mix(args, num_classes: int) -> Callable | None:
    """Return MixUp, CutMix or a random choice of them; None if both are off. `args`: mixup, cutmix (their alphas)."""
    mixes = [v2.MixUp(alpha=args.mixup, num_classes=num_classes)] if args.mixup else []
    mixes += [v2.CutMix(alpha=args.cutmix, num_classes=num_classes)] if args.cutmix else []
    return v2.RandomChoice(mixes) if mixes else None


def wrap_model(net: nn.Module, world: World, args) -> nn.Module:
    """Return the network on all devices of the run: one a process, or all visible GPUs for a single process.

    Each process has its own running statistics of batch norm until `World.broadcast_buffers`.

    Raises:
        BadInput: flags that torch's DataParallel does not hand on to its threads.
    """
    if world.size > 1:
        devices = [world.device] if world.device.type == 'cuda' else None
        return nn.parallel.DistributedDataParallel(net, devices, forward_sync_buffers=False)
    if world.gpus > 1:
        bad = ['--compile'] if args.compile else []
        bad += ['--amp_dtype bfloat16'] if getattr(args, 'amp_dtype', None) == 'bfloat16' else []
        if bad:
            each = f'torchrun --nproc_per_node={world.gpus} ...'
            raise BadInput(f'{bad[0]} on {world.gpus} GPUs needs a process each: {each}')
        return nn.DataParallel(net)
    return net


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
        ValueError: the state dict is malformed, or of other parameters.
    """
    asked = [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved)
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(f'{type(e).__name__}: {e}') from e
    for p, moments in optimizer.state.items():
        for name, value in moments.items():
            if torch.is_tensor(value) and value.ndim and value.shape != p.shape:
                raise ValueError(f'{name} of shape {list(value.shape)} for a parameter of {list(p.shape)}')
    for group, values in zip(optimizer.param_groups, asked, strict=True):
        group.update(values)
    align_moments(optimizer)


@torch.no_grad()
def align_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give each moment of a parameter's shape the memory layout of that parameter.

    A loaded moment keeps the layout that it was saved in. torch's fused optimizers read both by their place in memory:
    on a CPU they would permute the moments of a network whose layout changed, without an error.
    """
    for p, moments in optimizer.state.items():
        for name, value in moments.items():
            if torch.is_tensor(value) and value.shape == p.shape and value.stride() != p.stride():
                moments[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def to_device(
    batches: Iterable[tuple],
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches (images, labels) on the device.

    On a GPU the next batch is copied, and finished by `images.to`, on a second stream while the GPU computes on this
    one. With pinned memory neither the host nor the GPU waits.

    Args:
        batches: pairs with a method `to(device, non_blocking=True)`: tensors, or raw images that it finishes.
    """

    def move(batch: tuple) -> tuple[Tensor, Tensor]:
        images, labels = batch
        images = images.to(device, non_blocking=True).to(memory_format=memory_format)
        return images, labels.to(device, non_blocking=True)

    return _one_ahead(batches, move, device) if device.type == 'cuda' else map(move, batches)


def _one_ahead(batches: Iterable[tuple], move, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    side, moved = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(side):
            following = move(batch), side.record_event()
        if moved is not None:
            yield _hand_over(*moved, device)
        moved = following
    if moved is not None:
        yield _hand_over(*moved, device)


def _hand_over(batch: tuple[Tensor, Tensor], copied: torch.cuda.Event, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a batch for the current stream, which waits for the copy; its memory stays until that stream is done."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    for tensor in batch:
        tensor.record_stream(stream)
    return batch
