"""Train a found network from scratch in full precision, on all visible GPUs or the CPU; writes eval-<time>-<note>/.

    python train_eval.py --train_root /data/imagenet/train --val_root /data/imagenet/val --train_list train.txt \
        --val_list val.txt --config_path model.config
    python train_eval.py ... --snapshot checkpoints/eval-<time>-try/checkpoint.pth.tar

For mixed precision or many processes see train_eval_amp.py.
"""

import torch
from torch import nn

from dataset.loaders import make_train_val_loaders
from models.config import dump_config
from models.model_eval import NetworkEval
from models.parsing import load_architecture
from tools.distributed import World, pick_device
from tools.engine import Precision
from tools.options import Parser, add_training_args, run_script
from tools.rng import derive_seed
from tools.training import fit, open_run_folder


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    add_training_args(parser)
    return parser.parse_args()


def main(args):
    """Build the network, load the data, train."""
    world = World(pick_device(args.device))
    config = load_architecture(args.model_path or args.config_path, args.num_classes).with_classes(args.num_classes)
    loaders = make_train_val_loaders(args, world)
    torch.manual_seed(derive_seed(args.seed, 'weights'))
    torch.backends.cudnn.benchmark = True
    net = NetworkEval(config, args.dropout_rate, args.drop_connect_rate).to(world.device)
    folder, logger = open_run_folder(args, world, dump_config(config))
    model = nn.DataParallel(net) if torch.cuda.device_count() > 1 and world.device.type == 'cuda' else net
    fit(model, *loaders, Precision(world.device), world, args, folder, logger)


if __name__ == '__main__':
    run_script(main, get_args())
