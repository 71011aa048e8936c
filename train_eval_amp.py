"""Train a found network in mixed precision, one process per device; otherwise like train_eval.py.

    torchrun --nproc_per_node=2 train_eval_amp.py --config_path model.config \\
        --train_root /data/imagenet/train --train_list train.txt \\
        --val_root /data/imagenet/val --val_list val.txt \\
        --opt_level O1 --sync_bn --channels_last

Restarting killed processes; and an older launcher:

    torchrun --nproc_per_node=2 --max-restarts=3 train_eval_amp.py ... \\
        --snapshot auto
    python -m torch.distributed.launch --nproc_per_node=2 train_eval_amp.py ...

--batch_size and --workers are totals over all processes.
"""

import logging

import tools.needed  # noqa: F401  # isort: skip
from torch import nn

from latency_pkl.runtimes import log_network_latency
from models.parsing import load_architecture
from models.search_space import SPACE
from models.training_run import open_training, suggest_test
from tools.checkpoint import find_snapshot
from tools.distributed import join_world, leave_world
from tools.errors import BadInput
from tools.options import Parser, add_amp_args, add_training_args, run_script
from tools.plots import draw_at_end
from tools.precision import make_precision
from tools.training import TRAINING, fit
from train_eval import load_data

log = logging.getLogger('tf-nas')


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = Parser(__doc__)
    add_training_args(parser)
    add_amp_args(parser)
    parser.groups['hardware'].add_argument(
        '--sync_bn', action='store_true', help='batch norm over the batches of all processes'
    )
    return parser.parse_args(argv)


def check_sync_bn(world):
    """Raise BadInput if torch's synchronised batch norm does not support these devices."""
    if world.device.type != 'cuda' and world.size > 1:
        raise BadInput('--sync_bn: torch supports it on GPUs only; on CPUs leave it out, or use one process')
    if world.gpus > 1:
        raise BadInput('--sync_bn: works between processes; start one per GPU with torchrun --nproc_per_node')


def main(args):
    """Join the other processes if there are any, load the images, build the network, train."""
    world = join_world(args.device, args.local_rank)
    precision = make_precision(args, world.device)
    if args.sync_bn:
        check_sync_bn(world)
    convert = nn.SyncBatchNorm.convert_sync_batchnorm if args.sync_bn and world.size > 1 else nn.Identity()
    snapshot = find_snapshot(args.snapshot, args.save, args.note, TRAINING, world)
    source = args.model_path or args.config_path
    config = load_architecture(source, SPACE)
    images, args = load_data(args, world, config.meta.img_size, source, snapshot.folder)
    steps = len(images.loaders[0])
    run = open_training(args, config, source, images, steps, precision, snapshot, world, SPACE, convert)
    code = fit(run.state, images.loaders, images.num_classes, world, args, run.checkpointer, run.logger)
    leave_world(world)
    if args.report and run.logger.ended:
        log_network_latency(run.logger, args.epochs, run.config, world.device, args.img_size, SPACE)
        draw_at_end(run.logger.folder)
    if run.logger.ended:
        suggest_test(run, images, args)
    run.logger.close()
    return code


if __name__ == '__main__':
    run_script(main, get_args())
