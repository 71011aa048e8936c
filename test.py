"""Top-1 and top-5 accuracy of a trained network.

python test.py --val_root /data/imagenet/val --val_list val.txt --config_path model.config --weights weights.pth.tar
"""

from dataset.lists import read_list
from dataset.loaders import make_loader
from dataset.transforms import val_transform
from models.model_eval import NetworkEval
from models.parsing import load_architecture
from tools.checkpoint import load_weights
from tools.distributed import World, pick_device
from tools.engine import evaluate
from tools.errors import BadInput
from tools.options import Parser, add_arch_args, add_device_arg, add_eval_data_args, run_script
from tools.precision import Precision


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    add_arch_args(parser)
    add_eval_data_args(parser, batch_size=256, workers=16, num_classes=1000)
    parser.add_argument('--weights', required=True, help='a checkpoint or state dict of the network')
    parser.set_defaults(seed=0)
    add_device_arg(parser)
    return parser.parse_args()


def main(args):
    """Build the network, load its weights, evaluate."""
    world = World(pick_device(args.device))
    path = args.model_path or args.config_path
    config = load_architecture(path, args.num_classes)
    if config.classifier.out_features != args.num_classes:
        raise BadInput(f'{path} has {config.classifier.out_features} classes, --num_classes says {args.num_classes}')
    net = NetworkEval(config)
    load_weights(net, args.weights)
    samples = read_list(args.val_list, args.val_root, args.num_classes)
    loader = make_loader(args.val_root, samples, val_transform(args.img_size), args, world, False, False, args.val_list)
    result = evaluate(net.to(world.device), loader, Precision(world.device), world)
    print(f'Val_acc_top1: {result["top1"]:.2f}')
    print(f'Val_acc_top5: {result["top5"]:.2f}')


if __name__ == '__main__':
    run_script(main, get_args())
