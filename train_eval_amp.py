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

import tools.needed  # noqa: F401  # isort: skip
from torch import nn

from tools.distributed import join_world
from tools.errors import BadInput
from tools.options import Parser, add_amp_args, add_training_args, run_script
from tools.precision import make_precision
from train_eval import train


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
    """Train in the number format of the flags, with synchronised batch norm if they ask for it."""
    world = join_world(args.device, args.local_rank)
    level = args.opt_level or 'O0'
    precision = make_precision(world.device, level, args.amp_dtype, args.loss_scale, args.amp_backend)
    if args.sync_bn:
        check_sync_bn(world)
    convert = nn.SyncBatchNorm.convert_sync_batchnorm if args.sync_bn and world.size > 1 else nn.Identity()
    return train(args, world, precision, convert)


if __name__ == '__main__':
    run_script(main, get_args())
