"""Training a network from scratch, epoch by epoch, with checkpoints; shared by both training scripts."""

import logging
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from tools.checkpoint import load_checkpoint, save_checkpoint, unwrap, write_text
from tools.distributed import World
from tools.engine import Precision, cosine_lr, evaluate, set_lr, train_epoch
from tools.errors import BadInput
from tools.logs import log_flags, make_logger, make_run_folder

WARMUP_EPOCHS = 5
LARGE_BATCH = 256


def lr_at(epoch: int, args) -> float:
    """Learning rate of an epoch: cosine, and for large batches a linear warm-up before it.

    Args:
        args: lr, epochs, batch_size.
    """
    if args.batch_size > LARGE_BATCH and epoch < WARMUP_EPOCHS:
        return args.lr * (epoch + 1) / WARMUP_EPOCHS
    return cosine_lr(args.lr, epoch, args.epochs)


def open_run_folder(args, world: World, config_text: str) -> tuple[Path | None, logging.Logger]:
    """The folder and logger of a run: the snapshot's folder where it goes on from one, else a new one.

    The folder gets `model.config`. Processes other than the first get None and a silent logger.

    Args:
        args: save, note and snapshot, and all else for the head of the log.
        config_text: contents of the `model.config`.
    """
    if not world.is_first:
        return None, make_logger(None)
    folder = Path(args.snapshot).parent if args.snapshot else make_run_folder(args.save, 'eval', args.note)
    write_text(folder / 'model.config', config_text)
    logger = make_logger(folder)
    log_flags(logger, args)
    return folder, logger


def fit(
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader,
    precision: Precision,
    world: World,
    args,
    folder: Path | None,
    logger: logging.Logger,
) -> None:
    """Train for `args.epochs`, from `args.snapshot` on where given, evaluating and saving after each epoch.

    Args:
        folder: gets `checkpoint.pth.tar`, and `model_best.pth.tar` for the best top-1; None where nothing is written.
    """
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    first, best = resume(model, optimizer, precision, args.snapshot, world) if args.snapshot else (0, (0.0, 0.0))
    for epoch in range(first, args.epochs):
        set_lr(optimizer, lr_at(epoch, args))
        train_loader.sampler.set_epoch(epoch)
        train = train_epoch(model, train_loader, optimizer, precision, world, args, epoch, logger.info)
        val = evaluate(model, val_loader, precision, world)
        improved = val['top1'] > best[0]
        best = max(best, (val['top1'], val['top5']))
        logger.info('epoch %d train_loss %.4f train_top1 %.2f', epoch, train['loss'], train['top1'])
        logger.info('epoch %d val_top1 %.2f val_top5 %.2f best_top1 %.2f', epoch, val['top1'], val['top5'], best[0])
        if folder:
            checkpoint = {
                'epoch': epoch + 1,
                'state_dict': {f'module.{name}': value for name, value in unwrap(model).state_dict().items()},
                'best_acc_top1': best[0],
                'best_acc_top5': best[1],
                'optimizer': optimizer.state_dict(),
                'scaler': precision.scaler.state_dict(),
            }
            if improved:
                save_checkpoint(checkpoint, folder / 'model_best.pth.tar')
            save_checkpoint(checkpoint, folder / 'checkpoint.pth.tar')


def resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision, path: str, world: World
) -> tuple[int, tuple[float, float]]:
    """Load a checkpoint of `fit`; returns the epoch to go on with and the best (top1, top5) so far.

    Raises:
        BadInput: not such a checkpoint, or one of another network.
    """
    checkpoint = load_checkpoint(path, world.device)
    wanted = {'epoch', 'state_dict', 'best_acc_top1', 'best_acc_top5', 'optimizer'}
    if not isinstance(checkpoint, dict) or not wanted <= checkpoint.keys():
        raise BadInput(f'--snapshot {path}: not a training checkpoint (keys {", ".join(sorted(wanted))})')
    state = {name.removeprefix('module.'): value for name, value in checkpoint['state_dict'].items()}
    try:
        unwrap(model).load_state_dict(state)
        optimizer.load_state_dict(checkpoint['optimizer'])
    except (RuntimeError, ValueError) as e:
        raise BadInput(f'--snapshot {path}: of another network ({str(e).splitlines()[0]})') from e
    if checkpoint.get('scaler'):
        precision.scaler.load_state_dict(checkpoint['scaler'])
    return checkpoint['epoch'], (checkpoint['best_acc_top1'], checkpoint['best_acc_top5'])
