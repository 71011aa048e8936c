"""Train a found network from scratch in float32, on all visible GPUs or the CPU. Writes eval-<time>-<note>/.

    python train_eval.py --config_path model.config \\
        --train_root /data/imagenet/train --train_list train.txt \\
        --val_root /data/imagenet/val --val_list val.txt

A training that was stopped or killed goes on from its newest checkpoint:

    python train_eval.py ... --snapshot auto

One process per GPU, faster than one for all:

    torchrun --nproc_per_node=4 train_eval.py ...

For mixed precision see train_eval_amp.py.
"""

import logging
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import tools.needed  # noqa: F401  # isort: skip
import torch
import torch.nn.functional as F

from dataset.data import Source, load_training_data
from dataset.loaders import Loading
from latency_pkl.runtimes import log_network_latency
from models.config import dump_config
from models.describe import describe_network, largest_activation
from models.meta import META
from models.model_eval import NetworkEval, start_from_weights
from models.parsing import load_architecture
from models.search_space import SPACE
from tools.chain import changed, settle, suggest, with_flags
from tools.checkpoint import IMAGES, Checkpointer, compare_snapshot, ended_with, find_snapshot
from tools.distributed import join_world, leave_world
from tools.environment import note_large_tensors, prepare
from tools.files import CLASS_NAMES
from tools.options import RECIPE_BATCH, RECIPE_LR, USUAL_SIZE, Parser, add_training_args, run_script
from tools.plots import draw_at_end
from tools.precision import Precision
from tools.rng import derive_seed
from tools.run import open_run, run_header
from tools.training import (
    TRAINING,
    PassResult,
    Tally,
    TrainState,
    accuracies,
    begin_momentum,
    evaluate,
    last_batch,
    lr_at,
    make_average,
    make_mix,
    make_optimizer,
    memory_format,
    set_lr,
    to_device,
    warn_of_chance,
    wrap_model,
)

log = logging.getLogger('tf-nas')

WARMUP_EPOCHS, LARGE_BATCH = 5, 256  # updates of more images than that have a warm-up of so many epochs


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = Parser(__doc__)
    add_training_args(parser)
    return parser.parse_args(argv)


def train_epoch(state, loader, mix, args, checkpointer):
    """Train on the rest of an epoch's batches.

    Args:
        mix: MixUp or CutMix, which make soft labels; None for neither.
    """
    world, logger, precision = checkpointer.world, checkpointer.logger, state.precision
    end = last_batch(state.epoch, len(loader), args.max_steps, args.grad_accum)
    tally = Tally(world.device, state.sums if world.is_first else None)
    losses, read, read_at = [], state.step, time.monotonic()
    loader.sampler.set_epoch(state.epoch, state.step)
    batches = to_device(loader, world.device, state.layout, logger.waiting('--workers', args.batch_size))
    state.model.train()
    for step, (images, labels) in zip(range(state.step, end), batches, strict=False):
        # seeded by the place in the run: a run that resumes draws what it would have drawn
        torch.manual_seed(derive_seed(args.seed, 'dropout', state.epoch, step, world.rank))
        mixed, targets = mix(images, labels) if mix else (images, labels)
        group = min(args.grad_accum, end - step // args.grad_accum * args.grad_accum)  # an epoch's last may be smaller
        updates = (step + 1) % args.grad_accum == 0 or step + 1 == end
        # many processes average their gradients in the backward pass, which only the last one of a group needs
        with nullcontext() if updates or world.size == 1 else state.model.no_sync():
            with precision.autocast():
                logits = state.model(mixed).float()
                loss = F.cross_entropy(logits, targets, label_smoothing=args.label_smooth)
            precision.backward(loss / group)
        losses.append(loss.detach())
        tally.add(loss, logits, labels)

        logger.advance()
        if world.is_first and ((step + 1) % args.print_freq == 0 or step in (0, end - 1)):
            numbers = tally.read()
            numbers.pop('images')
            speed = (step + 1 - read) * args.batch_size / max(time.monotonic() - read_at, 1e-9)
            read, read_at = step + 1, time.monotonic()
            logger.step(state.epoch, step + 1, end, lr=state.lr, **numbers, **{'images/s': speed})
        if not updates:
            continue
        if checkpointer.allows_update(state, losses):  # none was NaN or infinite
            precision.step(state.optimizer, args.grad_clip)
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


def log_epoch(logger, state, train, val, plain):
    """Log the end of an epoch. `plain`: as `val`, of the weights themselves if `val` is of their moving average."""
    log.info('epoch %d train_loss %.4f train_top1 %.2f', state.epoch, train['loss'], train['top1'])
    log.info('epoch %d %s best_top1 %.2f', state.epoch, accuracies(val), state.best[0])
    more = {}
    if state.ema:
        log.info('epoch %d without moving average: %s', state.epoch, accuracies(plain))
        more = {'val_without_average': plain}
    logger.record('epoch', state.epoch, lr=state.lr, train=train, val=val, best_top1=state.best[0], **more)


def load_data(args, world, config, source, kept):
    """Return the images with their loaders, and the flags with the input size of the config and a batch that fits.

    Args:
        source: file of the config.
        kept: run folder that the training goes on in.
    """
    img_size = settle('--img_size', args.img_size, [(config.meta.img_size, source)], USUAL_SIZE)
    val_root = args.val_root or args.train_root
    where = Source(args.train_root, val_root, args.train_list, args.val_list, args.num_classes)
    loading = Loading(
        img_size, args.batch_size, args.workers, args.seed, args.workers, args.device_aug, args.auto_augment
    )
    images = load_training_data(where, loading, world, kept)
    return images, with_flags(args, img_size=img_size, batch_size=images.batch_size, val_root=val_root)


def config_for(images, config, source, img_size):
    """Return the config for the classes and the input of these images.

    Latencies at another input size are left out of its meta.
    """
    count = config.classifier.out_features
    if count != images.num_classes:
        log.info('%s is for %d classes, the network gets %d, as the images have', source, count, images.num_classes)
    names = tuple(images.names) if images.names else None
    if names and config.meta.class_names not in (None, names):
        log.warning('%s has other class names than the images, whose names count', source)
    meta = replace(config.meta.at_size(img_size), mean=images.mean, std=images.std, class_names=names)
    return replace(config.with_classes(images.num_classes), meta=meta)


def new_state(args, config, world, precision, convert):
    """Return the state at the start of a training. `convert`: applied to the network on its device."""
    torch.manual_seed(derive_seed(args.seed, 'weights'))
    net = NetworkEval(config, args.dropout_rate, args.drop_connect_rate)
    if args.weights:
        log.info(start_from_weights(net, args.weights))
    layout = memory_format(args.channels_last, world.device, precision.is_mixed)
    net = convert(net.to(world.device, memory_format=layout))
    optimizer = make_optimizer(net, args.lr, args.momentum, args.weight_decay, spare_norms=args.no_weight_decay_bn)
    net, optimizer = precision.prepare(net, optimizer)
    return TrainState(net, net, optimizer, precision, make_average(net, args.ema_decay), layout)


def start_state(args, config, snapshot, world, precision, convert):
    """Return the state that training starts from, fresh or the snapshot's, on all devices of the run."""
    prepare(world.device, args.deterministic, tf32=args.tf32)
    on_each_gpu = args.batch_size // (world.size * max(world.gpus, 1))
    note_large_tensors(largest_activation(config, args.img_size), on_each_gpu, world.device)
    state = new_state(args, config, world, precision, convert)
    if snapshot.checkpoint:
        state.load(snapshot.checkpoint, snapshot.path, world)
    begin_momentum(state.optimizer)
    if args.compile:
        state.net.compile()
    state.model = wrap_model(state.net, world, args.compile, precision.dtype)
    return state


def schedule_of(args):
    """Return the learning rate after the warm-up, and the epochs of the warm-up."""
    batch, lr = args.batch_size * args.grad_accum, args.lr
    if args.lr_scale == 'linear':
        lr = args.lr * batch / RECIPE_BATCH
    elif args.lr == RECIPE_LR and batch != RECIPE_BATCH:
        text = '--lr %g is for %d images per update, not %d: --lr_scale linear would take %g'
        log.info(text, lr, RECIPE_BATCH, batch, lr * batch / RECIPE_BATCH)
    if args.lr_warmup_epochs is not None:
        return lr, args.lr_warmup_epochs
    return lr, WARMUP_EPOCHS if batch > LARGE_BATCH else 0


def open_training(args, config, images, snapshot, flags, world):
    """Open the run folder; return the logger and the checkpointer. `flags`: to record."""
    network, steps = describe_network(config, args.img_size, SPACE), len(images.loaders[0])
    header = run_header('training', flags, world.device, network=network, steps_an_epoch=steps)
    files = {'model.config': dump_config(config), **images.run_files}
    logger = open_run(world, TRAINING.folders, header, snapshot, files)
    about = {'environment': header['environment'], CLASS_NAMES: images.names}
    about |= {META: config.meta.to_dict(), IMAGES: images.digest}
    return logger, Checkpointer(logger, world, args.save_freq, flags, about)


def train(args, world, precision, convert=lambda net: net):
    """Train the network that the flags name, evaluate it after each epoch, and return the exit code.

    Args:
        convert: applied to the network on its device.
    """
    snapshot = find_snapshot(args.snapshot, args.save, args.note, TRAINING, world)
    source = args.model_path or args.config_path
    config = load_architecture(source, SPACE)
    images, args = load_data(args, world, config, source, snapshot.folder)
    config = config_for(images, config, source, args.img_size)
    flags = vars(args) | images.flags | {'train_root': str(Path(args.train_root).absolute())}
    compare_snapshot(snapshot, flags, images.digest)
    state = start_state(args, config, snapshot, world, precision, convert)
    snapshot = snapshot.without_checkpoint()  # its weights are copied
    (lr, warmup_epochs), mix = schedule_of(args), make_mix(args.mixup, args.cutmix, images.num_classes)
    logger, checkpointer = open_training(args, config, images, snapshot, flags, world)
    steps = len(images.loaders[0])
    ends = [last_batch(epoch, steps, args.max_steps, args.grad_accum) for epoch in range(args.epochs)]
    logger.start_progress(sum(ends), state.epoch * steps + state.step)

    with checkpointer, ended_with(*images.loaders):
        while state.epoch < args.epochs and ends[state.epoch]:
            end = ends[state.epoch]
            set_lr(state.optimizer, lr_at(state.epoch, lr, warmup_epochs, args.epochs))
            trained = train_epoch(state, images.loaders[0], mix, args, checkpointer)
            if trained.stopped:
                break
            world.broadcast_buffers(state.net, *filter(None, [state.ema]))
            val, plain = validate(state, images.loaders[1], world, checkpointer.stop_requested)
            if val.stopped:
                checkpointer.save(state)
                break
            is_best = val.numbers['top1'] > state.best[0] or state.epoch == 0
            state.best = max(state.best, (val.numbers['top1'], val.numbers.get('top5', 100.0)))
            if images.num_classes <= 5:
                trained.numbers.pop('top5', None)  # of an epoch that went on after its last batch
            log_epoch(logger, state, trained.numbers, val.numbers, plain.numbers)
            if end == steps:
                state.epoch, state.step, state.sums = state.epoch + 1, 0, [0.0] * 4
            if is_best:
                checkpointer.save_as(state, 'model_best.pth.tar')
            checkpointer.save(state)
            if end < steps:  # --max_steps are done
                break
    return end_training(args, config, images, state, checkpointer)


def validate(state, loader, world, stops):
    """Return the results of the network whose accuracy counts, and of the weights themselves."""
    val = evaluate(state.evaluated(), loader, state.precision, world, state.layout, stops=stops)
    if val.stopped or not state.ema:
        return val, val
    return val, evaluate(state.net, loader, state.precision, world, state.layout)


def end_training(args, config, images, state, checkpointer):
    """Log and draw the results of a training that is done or stopped; return the exit code."""
    logger, world = checkpointer.logger, checkpointer.world
    if not checkpointer.signal:
        log.info('done: epoch %d of %d, best_top1 %.2f', state.epoch, args.epochs, state.best[0])
        warn_of_chance(state.best[0], len(images.val.samples), images.num_classes)
        logger.record('end', state.epoch, best_top1=state.best[0])
    code = checkpointer.exit_code()
    leave_world(world)
    if logger.ended:
        if args.report:
            log_network_latency(logger, args.epochs, config, world.device, args.img_size, SPACE)
            draw_at_end(logger.folder)
        suggest_test(logger.folder, images, args)
    logger.close()
    return code


def suggest_test(folder, images, args):
    """Log the command that tests the network of a finished training."""
    val_list = Path(images.lists[1] or folder / 'val.txt')
    flags = {'val_root': Path(images.val.root), 'val_list': val_list, 'config_path': folder / 'model.config'}
    flags |= {'weights': folder / 'model_best.pth.tar', **changed(args, device='auto')}
    suggest('test it', 'test.py', flags)


def main(args):
    """Train in float32."""
    world = join_world(args.device, args.local_rank)
    return train(args, world, Precision(world.device))


if __name__ == '__main__':
    run_script(main, get_args())
