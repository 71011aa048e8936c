"""The run of a training script: flags that files give, network, state, folder, and the end of it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from models.config import NetworkConfig, dump_config
from models.describe import describe_network, largest_activation
from models.meta import META
from models.model_eval import NetworkEval, start_from_weights
from models.search_space import SearchSpace
from tools.chain import changed, suggest
from tools.checkpoint import IMAGES, Checkpointer, Snapshot, compare_snapshot
from tools.distributed import World
from tools.environment import large_tensor_note, prepare
from tools.files import CLASS_NAMES
from tools.precision import Precision
from tools.rng import derive_seed
from tools.run import RunLogger, open_run, run_header
from tools.training import TRAINING, TrainState, memory_format, start_state

if TYPE_CHECKING:
    from dataset.data import Data

log = logging.getLogger('tf-nas')


@dataclass(frozen=True)
class TrainingRun:
    """A training that is ready to begin or to go on."""

    config: NetworkConfig
    state: TrainState
    logger: RunLogger
    checkpointer: Checkpointer


def describe_data(config: NetworkConfig, img_size: int, images: 'Data') -> NetworkConfig:
    """Return the config of a network for the classes and the input of these images.

    Latencies of another input size, and names of other classes, are left out of its meta.
    """
    config = config.with_classes(images.num_classes)
    names = tuple(images.names) if images.names else None
    meta = replace(config.meta.at_size(img_size), mean=images.mean, std=images.std, class_names=names)
    return replace(config, meta=meta)


def compare_data(config: NetworkConfig, source: str, images: 'Data') -> list[str]:
    """Return lines about what differs between images and the config from `source`: classes, normalisation."""
    lines, meta, names, count = [], config.meta, images.names, config.classifier.out_features
    if count != images.num_classes:
        lines.append(f'{source} is for {count} classes; the network gets {images.num_classes}, as the images have')
    elif meta.class_names and names and list(meta.class_names) != names:
        label = next(label for label in range(count) if meta.class_names[label] != names[label])
        lines.append(f'warning: label {label} is {names[label]} in these images, {meta.class_names[label]} in {source}')
    own = images.mean, images.std
    if (meta.mean or own[0], meta.std or own[1]) != own:
        lines.append(f'warning: images are normalised by mean {own[0]} and std {own[1]}; {source} has others')
    return lines


def open_training(
    args,
    config: NetworkConfig,
    source: str,
    images: 'Data',
    steps: int,
    precision: Precision,
    snapshot: Snapshot,
    world: World,
    space: SearchSpace,
    convert: Callable[[nn.Module], nn.Module] = lambda net: net,
) -> TrainingRun:
    """Build the network, load weights or the snapshot, and open the run folder.

    Args:
        args: the flags of a training script.
        config: the network, which gets the classes and the input of the images.
        source: file of the config, for messages.
        steps: batches of an epoch.
        convert: applied to the network on its device.

    Raises:
        BadInput: weights or a snapshot of another network, images that changed within an epoch, no run folder.
    """
    flags = vars(args) | images.flags | {'train_root': str(Path(args.train_root).absolute())}
    differences = compare_data(config, source, images)
    config = describe_data(config, args.img_size, images)
    torch.manual_seed(derive_seed(args.seed, 'weights'))
    prepare(world.device, args.deterministic, tf32=args.tf32)
    share = args.batch_size // (world.size * max(world.gpus, 1))
    large = large_tensor_note(largest_activation(config, args.img_size), share, world.device)
    net = NetworkEval(config, args.dropout_rate, args.drop_connect_rate)
    start = start_from_weights(net, args.weights) if args.weights else ''
    net = convert(net.to(world.device, memory_format=memory_format(args, world.device)))
    for note in filter(None, (*differences, start, large)):
        log.info(note)
    compare_snapshot(snapshot, flags, images.digest)
    state, snapshot = start_state(net, precision, snapshot, world, args)
    network = describe_network(config, args.img_size, space)
    header = run_header('training', flags, world.device, network=network, steps_an_epoch=steps)
    files = {'model.config': dump_config(config), **images.run_files}
    logger = open_run(world, TRAINING.folders, header, snapshot, files)
    about = {'environment': header['environment'], CLASS_NAMES: images.names}
    about |= {META: config.meta.to_dict(), IMAGES: images.digest}
    return TrainingRun(config, state, logger, Checkpointer(logger, world, args.save_freq, flags, about))


def suggest_test(run: TrainingRun, images: 'Data', args) -> None:
    """Log the command that tests the network of a finished training."""
    folder = run.logger.folder
    val_list = Path(images.lists[1] or folder / 'val.txt')
    flags = {'val_root': Path(images.val.root), 'val_list': val_list, 'config_path': folder / 'model.config'}
    flags |= {'weights': folder / 'model_best.pth.tar', **changed(args, device='auto')}
    suggest('test it', 'test.py', flags)
