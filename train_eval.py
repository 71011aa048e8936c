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

from functools import partial

import tools.needed  # noqa: F401  # isort: skip
import torch

from dataset.lists import class_file, class_names
from dataset.loaders import make_train_val_loaders
from latency_pkl.timing import log_latency
from models.config import dump_config
from models.describe import describe_network, largest_activation
from models.model_eval import NetworkEval, start_from_weights
from models.parsing import load_architecture
from models.search_space import SPACE
from tools.distributed import join_world, leave_world
from tools.environment import large_tensor_note, prepare
from tools.files import CLASS_NAMES
from tools.options import Parser, add_training_args, run_script
from tools.precision import Precision
from tools.report.draw import draw_at_end
from tools.rng import derive_seed
from tools.run.checkpoint import Checkpointer
from tools.run.folder import open_run
from tools.run.metrics import run_header
from tools.run.resume import compare_flags, find_snapshot
from tools.training import TRAINING, fit, memory_format, start_state


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = Parser(__doc__)
    add_training_args(parser)
    return parser.parse_args(argv)


def main(args):
    """Join the other processes if there are any, build the network, load the data, train."""
    world = join_world(args.device, args.local_rank)
    loaders, num_classes = make_train_val_loaders(args, world)
    flags = vars(args) | {'num_classes': num_classes}
    config = load_architecture(args.model_path or args.config_path, num_classes, SPACE).with_classes(num_classes)
    torch.manual_seed(derive_seed(args.seed, 'weights'))
    prepare(world.device, args.deterministic, tf32=args.tf32)
    images = args.batch_size // (world.size * max(world.gpus, 1))
    large = large_tensor_note(largest_activation(config, args.img_size), images, world.device)
    net = NetworkEval(config, args.dropout_rate, args.drop_connect_rate)
    start = start_from_weights(net, args.weights) if args.weights else ''
    net = net.to(world.device, memory_format=memory_format(args, world.device))
    snapshot = find_snapshot(args, TRAINING, world)
    snapshot = snapshot.with_notes(compare_flags(snapshot, TRAINING, flags), start, large)
    state, snapshot = start_state(net, Precision(world.device), snapshot, world, args)
    network = describe_network(config, args.img_size, SPACE)
    header = run_header('training', flags, world.device, network=network, steps_an_epoch=len(loaders[0]))
    names = class_names(loaders[0].dataset.samples)
    files = {'model.config': dump_config(config), **class_file(names)}
    logger = open_run(args, world, TRAINING.folders, snapshot, (state.epoch, state.step), header, files)
    about = {'environment': header['environment'], CLASS_NAMES: names}
    checkpointer = Checkpointer(logger, world, args.save_freq, flags, about)
    code = fit(state, loaders, num_classes, world, args, checkpointer, logger)
    leave_world(world)
    if args.report and logger.ended:
        log_latency(logger, args.epochs, partial(NetworkEval, config), world.device, args.img_size)
        draw_at_end(logger.folder, logger.log)
    logger.close()
    return code


if __name__ == '__main__':
    run_script(main, get_args())
