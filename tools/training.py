"""Training a network from scratch, epoch by epoch, with checkpoints; shared by both training scripts."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from tools.distributed import World
from tools.engine import cosine_lr, evaluate, set_lr, train_epoch
from tools.interrupt import ended_with
from tools.keeper import Keeper
from tools.optimizers import begin_momentum
from tools.precision import Precision
from tools.prefetch import to_device
from tools.profiling import device_name, measure_latency
from tools.snapshot import TRAINING, Snapshot, TrainState, compare_flags, find_snapshot
from tools.watch import Progress, Watch

WARMUP_EPOCHS = 5
LARGE_BATCH = 256
RECIPE_BATCH = 512
"""The batch size that the default learning rate belongs to."""


def lr_at(epoch: int, args) -> float:
    """Learning rate of an epoch: cosine, and for large batches a linear warm-up before it.

    Args:
        args: lr, lr_scale, epochs, batch_size, grad_accum.
    """
    batch = args.batch_size * args.grad_accum
    lr = args.lr * batch / RECIPE_BATCH if args.lr_scale == 'linear' else args.lr
    if batch > LARGE_BATCH and epoch < WARMUP_EPOCHS:
        return lr * (epoch + 1) / WARMUP_EPOCHS
    return cosine_lr(lr, epoch, args.epochs)


def last_batch(epoch: int, batches: int, args) -> int:
    """How many of an epoch's batches to train on before `args.max_steps` updates are made."""
    if args.max_steps is None:
        return batches
    updates_left = args.max_steps - epoch * math.ceil(batches / args.grad_accum)
    return min(batches, max(updates_left, 0) * args.grad_accum)


def memory_format(args, device: torch.device) -> torch.memory_format:
    """Layout of images and weights: channels last where asked for, and by default where it is known to be faster.

    Args:
        args: channels_last, and opt_level where there is mixed precision.
    """
    half = getattr(args, 'opt_level', None) not in (None, 'O0')
    chosen = args.channels_last if args.channels_last is not None else half or device.type == 'cpu'
    return torch.channels_last if chosen else torch.contiguous_format


def make_optimizer(net: nn.Module, args) -> torch.optim.SGD:
    """SGD over all parameters, without weight decay on batch norm where `args.no_weight_decay_bn`."""
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    spared = {p for module in norms for p in module.parameters()} if args.no_weight_decay_bn else set()
    groups = [{'params': [p for p in net.parameters() if p not in spared], 'weight_decay': args.weight_decay}]
    if spared:
        groups.append({'params': [p for p in net.parameters() if p in spared], 'weight_decay': 0.0})
    return torch.optim.SGD(groups, args.lr, args.momentum, fused=True)


def make_mix(args) -> Callable | None:
    """MixUp, CutMix or a random choice of them; None where both are off."""
    mixes = [v2.MixUp(alpha=args.mixup, num_classes=args.num_classes)] if args.mixup else []
    mixes += [v2.CutMix(alpha=args.cutmix, num_classes=args.num_classes)] if args.cutmix else []
    return v2.RandomChoice(mixes) if mixes else None


def start_state(net: nn.Module, precision: Precision, world: World, args) -> tuple[TrainState, Snapshot]:
    """The state that training starts from: fresh, or the snapshot's that the flags or a restart ask for.

    Args:
        net: on its device, in its memory format.

    Raises:
        BadInput: a snapshot that is bad, or does not fit the network or the flags.
    """
    snapshot = find_snapshot(args, TRAINING)
    net, optimizer = precision.prepare(net, make_optimizer(net, args))
    average = get_ema_multi_avg_fn(args.ema_decay)
    ema = AveragedModel(net, multi_avg_fn=average, use_buffers=True) if args.ema_decay else None
    state = TrainState(net, optimizer, precision, ema)
    if snapshot.checkpoint:
        differing = compare_flags(snapshot, TRAINING, args)
        state.load(snapshot.checkpoint, snapshot.path, world)
        snapshot = snapshot.taken().noting(differing)
    begin_momentum(state.optimizer)
    if args.compile:
        state.net.compile()
    return state, snapshot


def fit(
    model: nn.Module,
    state: TrainState,
    loaders: tuple[DataLoader, DataLoader],
    world: World,
    args,
    folder: Path | None,
    watch: Watch,
    environment: dict,
) -> int:
    """Train until `args.epochs` epochs or `args.max_steps` updates are done, evaluating and saving after each epoch.

    SIGTERM and SIGINT stop it after the next update, with a checkpoint. Returns the exit code.

    Args:
        model: `state.net`, wrapped for many devices.
        loaders: of training and validation images.
        folder: gets `checkpoint.pth.tar`, and `model_best.pth.tar` for the best top-1; None where nothing is written.
        environment: what the run is made with, for the checkpoints.
    """
    layout, mix = memory_format(args, world.device), make_mix(args)
    train_loader, val_loader = loaders
    steps = len(train_loader)
    work = sum(last_batch(epoch, steps, args) for epoch in range(args.epochs))
    watch.progress = Progress(work, state.epoch * steps + state.step, not world.is_first)
    with Keeper(folder, watch, world, args, environment) as keeper, ended_with(*loaders):
        while state.epoch < args.epochs and (end := last_batch(state.epoch, steps, args)):
            set_lr(state.optimizer, lr_at(state.epoch, args))
            train_loader.sampler.set_epoch(state.epoch, state.step)
            batches = to_device(train_loader, world.device, layout)
            batches = watch.progress.track(batches, f'epoch {state.epoch}', end, state.step)
            keeping = keeper.after_update, keeper.allows_update
            train = train_epoch(model, state, batches, end, mix, world, args, watch, *keeping)
            if train is None:
                break
            world.same_buffers(state.net, *filter(None, [state.ema]))
            val = evaluate(state.evaluated(), val_loader, state.precision, world, layout, keeper.stops)
            if val is None:
                keeper.save(state)
                break
            is_best = val['top1'] > state.best[0] or state.epoch == 0
            state.best = max(state.best, (val['top1'], val['top5']))
            log_epoch(watch, state, train, val)
            if end == steps:
                state.epoch, state.step, state.sums = state.epoch + 1, 0, [0.0] * 4
            keeper.save(state, is_best)
            for loader in loaders:
                loader.dataset.tell_skipped(watch.log, world)
            if state.step:
                break
    if not keeper.signal:
        watch.log('done: epoch %d of %d, best_top1 %.2f', state.epoch, args.epochs, state.best[0])
        watch.write('end', state.epoch, best_top1=state.best[0])
    return keeper.exit_code()


def log_epoch(watch: Watch, state: TrainState, train: dict[str, float], val: dict[str, float]) -> None:
    """The two lines at the end of an epoch."""
    watch.log('epoch %d train_loss %.4f train_top1 %.2f', state.epoch, train['loss'], train['top1'])
    numbers = (state.epoch, val['top1'], val['top5'], state.best[0], ' (moving average)' if state.ema else '')
    watch.log('epoch %d val_top1 %.2f val_top5 %.2f best_top1 %.2f%s', *numbers)
    watch.write('epoch', state.epoch, lr=state.lr, train=train, val=val, best_top1=state.best[0])


def conclude(watch: Watch, build: Callable[[], nn.Module], world: World, args) -> None:
    """Where a training has ended and `args.report`: measure the latency of its network, draw pictures and report.

    Args:
        build: makes the network, with any weights.
        args: report and img_size.
    """
    if not (args.report and watch.metrics and watch.metrics.ended):
        return
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = False  # as where tables are made
    batch_size = 32 if world.device.type == 'cuda' else 1
    where = {'device': device_name(world.device), 'batch_size': batch_size, 'threads': 1, 'img_size': args.img_size}
    try:
        ms = measure_latency(build, batch_size, args.img_size, world.device).ms
    except RuntimeError as e:  # the training itself is done and saved
        watch.log('latency not measured: %s', e)
    else:
        watch.write('latency', args.epochs, ms=ms, **where)
        watch.log('measured latency %.4f ms on %s, batch %d', ms, where['device'], batch_size)
    watch.draw()
