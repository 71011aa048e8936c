"""Training a network from scratch, epoch by epoch, with checkpoints; shared by both training scripts."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from tools.distributed import World
from tools.errors import BadInput
from tools.files import put_weights, strip_module_prefix
from tools.precision import Precision
from tools.rng import derive_seed
from tools.run.checkpoint import Keeper
from tools.run.folder import Progress, Watch
from tools.run.resume import NUMBER, RunKind, Snapshot, compare_flags, find_snapshot
from tools.run.stop import ended_with

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


def train_epoch(
    model: nn.Module,
    state: TrainState,
    batches: Iterator[tuple[Tensor, Tensor]],
    end: int,
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    world: World,
    args,
    watch: Watch,
    after_update: Callable[[TrainState, 'Tally'], bool],
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


def log_epoch(watch: Watch, state: TrainState, train: dict[str, float], val: dict[str, float]) -> None:
    """The two lines at the end of an epoch."""
    watch.log('epoch %d train_loss %.4f train_top1 %.2f', state.epoch, train['loss'], train['top1'])
    numbers = (state.epoch, val['top1'], val['top5'], state.best[0], ' (moving average)' if state.ema else '')
    watch.log('epoch %d val_top1 %.2f val_top5 %.2f best_top1 %.2f%s', *numbers)
    watch.write('epoch', state.epoch, lr=state.lr, train=train, val=val, best_top1=state.best[0])


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


def begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Set momentum to zero where there is none yet.

    Left to torch 2.14's fused SGD, it is made unset and then written by the first update, but not where a gradient
    scaler skips that one for an overflow: the second would use whatever the memory held. Nor can parameters that have
    momentum be updated in one launch with those that do not.
    """
    for group in optimizer.param_groups:
        for p in group['params'] if group['momentum'] else ():
            if optimizer.state[p].get('momentum_buffer') is None:
                optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)


def load_moments(optimizer: torch.optim.Optimizer, saved: Mapping) -> None:
    """Load a state dict, but keep this optimizer's learning rate, weight decay and the like: what the flags say now.

    Raises:
        ValueError: the state dict is malformed, or of other parameters.
    """
    asked = [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved)
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(f'{type(e).__name__}: {e}') from e
    for group, values in zip(optimizer.param_groups, asked, strict=True):
        group.update(values)


def to_device(
    batches: Iterable[tuple | None],
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (images, labels) on the device.

    On a GPU they are one ahead: a batch is copied, and whatever `images.to` does besides is done, on a stream of its
    own while the batch before it is in use. Neither this process nor the GPU waits, given pinned memory.

    Args:
        batches: pairs whose parts have `to(device, non_blocking=True)`: tensors, or raw images that it finishes.
            None, a batch of which no image could be read, is left out.
    """
    batches = (batch for batch in batches if batch is not None)

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
    """A batch for the present stream, once it is copied; its memory is not used again before that stream is done."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    for tensor in batch:
        tensor.record_stream(stream)
    return batch
