"""Train a found network in mixed precision, one process a device; otherwise as train_eval.py.

    torchrun --nproc_per_node=2 train_eval_amp.py --train_root /data/imagenet/train --val_root /data/imagenet/val \
        --train_list train.txt --val_list val.txt --config_path model.config --opt_level O1 --sync_bn --channels_last
    python -m torch.distributed.launch --nproc_per_node=2 train_eval_amp.py ...             (the same, older launcher)

--batch_size and --workers are totals over all processes.
"""

import torch
from torch import nn

from dataset.loaders import make_train_val_loaders
from models.config import dump_config
from models.model_eval import NetworkEval
from models.parsing import load_architecture
from tools.distributed import join_world, leave_world
from tools.engine import Precision
from tools.errors import BadInput
from tools.options import Parser, add_training_args, number, run_script, yes_no
from tools.rng import derive_seed
from tools.training import fit, open_run_folder


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    add_training_args(parser)
    parser.add_argument('--opt_level', choices=('O0', 'O1', 'O2', 'O3'), help='O0: float32; O1: autocast')
    parser.add_argument('--loss_scale', default='dynamic', help="'dynamic' or a number; float16 only")
    parser.add_argument('--keep_batchnorm_fp32', type=yes_no, help='True is what autocast always does')
    parser.add_argument('--sync_bn', action='store_true', help='batch norm over the batches of all processes')
    parser.add_argument('--channels_last', action='store_true', help='NHWC memory layout, fastest on tensor cores')
    parser.add_argument('--local_rank', '--local-rank', type=int, help='set by launchers')
    return parser.parse_args()


def make_precision(args, device):
    """Autocast of the opt level: float16 with a gradient scaler on a GPU, bfloat16 on a CPU."""
    if args.opt_level in ('O2', 'O3'):
        raise BadInput(f'--opt_level {args.opt_level} is of apex; the nearest that works here is --opt_level O1')
    if args.keep_batchnorm_fp32 is False:
        raise BadInput('--keep_batchnorm_fp32 False: autocast always keeps batch norm in float32; use True or leave it')
    scale = None if args.loss_scale == 'dynamic' else args.loss_scale
    if scale is not None:
        try:
            scale = number(float, 0, open_low=True)(scale)
        except Exception as e:
            raise BadInput(f"--loss_scale {scale} should be 'dynamic' or a positive number") from e
    if args.opt_level != 'O1':
        return Precision(device)
    return Precision(device, torch.float16 if device.type == 'cuda' else torch.bfloat16, scale)


def main(args):
    """Join the other processes, build the network, load the data, train."""
    world = join_world(args.device, args.local_rank)
    precision = make_precision(args, world.device)
    if args.sync_bn and world.device.type != 'cuda':
        raise BadInput("--sync_bn: torch's synchronised batch norm works on GPUs only; leave it out on CPUs")
    config = load_architecture(args.model_path or args.config_path, args.num_classes).with_classes(args.num_classes)
    loaders = make_train_val_loaders(args, world)
    torch.manual_seed(derive_seed(args.seed, 'weights'))
    torch.backends.cudnn.benchmark = True
    net = NetworkEval(config, args.dropout_rate, args.drop_connect_rate).to(world.device)
    if args.channels_last:
        net = net.to(memory_format=torch.channels_last)
    model = net
    if world.size > 1:
        if args.sync_bn:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        model = nn.parallel.DistributedDataParallel(net, [world.device] if world.device.type == 'cuda' else None)
    folder, logger = open_run_folder(args, world, dump_config(config))
    fit(model, *loaders, precision, world, args, folder, logger)
    leave_world(world)


if __name__ == '__main__':
    run_script(main, get_args())
