"""Train a found network from scratch in full precision, on all visible GPUs or the CPU; writes eval-<time>-<note>/.

    python train_eval.py --train_root /data/imagenet/train --val_root /data/imagenet/val --train_list train.txt \
        --val_list val.txt --config_path model.config
    python train_eval.py ... --snapshot auto                 (goes on with the newest checkpoint under --save)
    torchrun --nproc_per_node=4 train_eval.py ...            (one process a GPU, faster than one process for all)

For mixed precision see train_eval_amp.py.
"""

from functools import partial

import torch

from dataset.loaders import make_train_val_loaders
from latency_pkl.timing import conclude
from models.config import dump_config
from models.describe import describe_network
from models.model_eval import NetworkEval
from models.parsing import load_architecture
from tools.distributed import join_world, leave_world, wrap_model
from tools.environment import prepare
from tools.options import Parser, add_training_args, run_script
from tools.precision import Precision
from tools.rng import derive_seed
from tools.run.folder import open_run_folder, run_header
from tools.training import TRAINING, fit, memory_format, start_state


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    add_training_args(parser)
    return parser.parse_args()


def main(args):
    """Join the other processes if there are any, build the network, load the data, train."""
    world = join_world(args.device, args.local_rank)
    loaders = make_train_val_loaders(args, world)
    config = load_architecture(args.model_path or args.config_path, args.num_classes).with_classes(args.num_classes)
    torch.manual_seed(derive_seed(args.seed, 'weights'))
    prepare(world.device, args.deterministic)
    net = NetworkEval(config, args.dropout_rate, args.drop_connect_rate)
    net = net.to(world.device, memory_format=memory_format(args, world.device))
    state, snapshot = start_state(net, Precision(world.device), world, args)
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
