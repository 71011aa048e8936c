"""Train a found network in mixed precision, one process a device; otherwise as train_eval.py.

    torchrun --nproc_per_node=2 train_eval_amp.py --train_root /data/imagenet/train --val_root /data/imagenet/val \
        --train_list train.txt --val_list val.txt --config_path model.config --opt_level O1 --sync_bn --channels_last
    python -m torch.distributed.launch --nproc_per_node=2 train_eval_amp.py ...             (the same, older launcher)
    torchrun --nproc_per_node=2 --max-restarts=3 train_eval_amp.py ...       (a killed process costs minutes at most)

--batch_size and --workers are totals over all processes.
"""

from functools import partial

import torch
from torch import nn

from dataset.loaders import make_train_val_loaders
from latency_pkl.timing import conclude
from models.config import dump_config
from models.describe import describe_network
from models.model_eval import NetworkEval
from models.parsing import load_architecture
from tools.distributed import join_world, leave_world, wrap_model
from tools.environment import prepare
from tools.errors import BadInput
from tools.options import Parser, add_amp_args, add_training_args, run_script
from tools.precision import make_precision
from tools.rng import derive_seed
from tools.run.folder import open_run_folder, run_header
from tools.training import TRAINING, fit, memory_format, start_state


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    add_training_args(parser)
    add_amp_args(parser)
    parser.add_argument('--sync_bn', action='store_true', help='batch norm over the batches of all processes')
    return parser.parse_args()


def check_sync_bn(world):
    """Raise BadInput where torch's synchronised batch norm does not work."""
    if world.device.type != 'cuda' and world.size > 1:
        raise BadInput("--sync_bn: torch's works between GPUs only; on CPUs leave it out, or have one process")
    if world.gpus > 1:
        raise BadInput('--sync_bn: works between processes; start one a GPU with torchrun --nproc_per_node')


def main(args):
    """Join the other processes if there are any, build the network, load the data, train."""
    world = join_world(args.device, args.local_rank)
    precision = make_precision(args, world.device)
    if args.sync_bn:
        check_sync_bn(world)
    loaders = make_train_val_loaders(args, world)
    config = load_architecture(args.model_path or args.config_path, args.num_classes).with_classes(args.num_classes)
    torch.manual_seed(derive_seed(args.seed, 'weights'))
    prepare(world.device, args.deterministic)
    net = NetworkEval(config, args.dropout_rate, args.drop_connect_rate)
    net = net.to(world.device, memory_format=memory_format(args, world.device))
    if args.sync_bn and world.size > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    state, snapshot = start_state(net, precision, world, args)
    model = wrap_model(state.net, world, args)
    about = {'network': describe_network(config, args.img_size), 'steps_an_epoch': len(loaders[0])}
    header = run_header('training', args, world.device, **about)
    files = {'model.config': dump_config(config)}
    folder, watch = open_run_folder(args, world, TRAINING, snapshot, state, header, files)
    code = fit(model, state, loaders, world, args, folder, watch, header['environment'])
    leave_world(world)
    conclude(watch, partial(NetworkEval, config), world, args)
    return code


if __name__ == '__main__':
    run_script(main, get_args())
