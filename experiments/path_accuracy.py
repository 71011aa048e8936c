"""Print the accuracy of networks with the weights of a searched supernet, without training them.

The first line is of the network that the search found, with the widths at its end. With `--runner_ups` the networks
that differ from it in one block follow: each has that block's most probable other operator that can meet the same
latency.

    python experiments/path_accuracy.py --model_path searched.pth.tar \\
        --architectures a.json b.json --val_root images --val_list val.txt \\
        --num_classes 10 --img_size 64

An architecture is a JSON file:

    {"arch": {"stage1": [op indices], ...},
     "widths": {"stage1": {"block1": {"0": mid channels, ...}, ...}, ...}}
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.images import USUAL_SIZE
from dataset.lists import read_list
from dataset.loaders import make_loader
from dataset.transforms import val_transform
from models.elasticity import fit_widths, gather, latency_range, update_masks
from models.latency import load_table
from models.model_search import Network
from models.parsing import (
    load_search_checkpoint,
    mask_widths,
    parse_architecture,
    saved_architecture,
    search_meta,
)
from models.search_space import SPACE
from tools.distributed import World, pick_device
from tools.errors import BadInput
from tools.files import load_checkpoint
from tools.options import Parser, add_device_arg, add_eval_data_args, run_script
from tools.precision import Precision
from tools.settle import settle
from tools.training import evaluate


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument('--model_path', metavar='FILE', required=True, help='a searched model')
    parser.add_argument('--architectures', metavar='FILE', nargs='*', default=[], help='JSON files')
    parser.add_argument('--runner_ups', metavar='TABLE', help='a latency table; tests the runner-ups of the choice too')
    add_eval_data_args(parser, batch_size=128, workers=0)
    parser.set_defaults(seed=0)
    add_device_arg(parser)
    args = parser.parse_args()
    if not (args.val_root and args.val_list):
        parser.error('give --val_root and --val_list, the images to test with')
    return args


class OnePath(torch.nn.Module):
    """One path of a supernet: images [N, 3, H, W] -> logits [N, classes]."""

    def __init__(self, net, path):
        super().__init__()
        self.net, self.path = net, path

    def forward(self, x):
        return self.net(x, self.path)


def set_path(net, full, masks, chosen):
    """Give the supernet an architecture's widths and exits. Return the path: an op index for each block."""
    widths = mask_widths(masks)
    for stage, blocks in chosen['widths'].items():
        for block, ops in blocks.items():
            widths[stage][block] |= {int(index): width for index, width in ops.items()}
    gather(net, full, update_masks(masks, widths, full))
    path = []
    for name, stage in zip(net.space.stage_names, net.stages(), strict=True):
        ops = chosen['arch'][name]
        exit_ = stage.stage.exit_depths.index(len(ops))
        with torch.no_grad():
            stage.betas.copy_(torch.eye(len(stage.betas))[exit_].log())
        path += ops + [0] * (stage.stage.depth - len(ops))
    return path


def runner_ups(found, full, table):
    """Return the networks that differ from a found one in one block, by the block's place and operator."""
    target, networks = table.total(found['arch'], found['widths'], SPACE), {}
    for stage, ops in found['arch'].items():
        for place, op in enumerate(ops):
            ranked = full[f'{stage}.block{place + 1}.log_alphas'].argsort(descending=True).tolist()
            for other in (index for index in ranked if index != op):
                arch = found['arch'] | {stage: [*ops[:place], other, *ops[place + 1 :]]}
                least, most = latency_range(arch, table, SPACE, table.width_divisor)
                if least <= target <= most:
                    widths = fit_widths(arch, found['widths'], table, SPACE, target, table.width_divisor)
                    label = f'{stage}.block{place + 1} {SPACE.ops[other].label}'
                    networks[label] = {'arch': arch, 'widths': widths}
                    break
    return networks


def main(args):
    """Print one line for each network."""
    world, (meta, _) = World(pick_device(args.device)), search_meta(args.model_path)
    img_size = settle('--img_size', args.img_size, [(meta.img_size, args.model_path)], USUAL_SIZE, print)
    full, masks = load_search_checkpoint(args.model_path, SPACE)
    arch = saved_architecture(load_checkpoint(args.model_path), args.model_path, SPACE)
    found = {'arch': arch or parse_architecture(full, SPACE), 'widths': mask_widths(masks)}
    num_classes = len(full['classifier.linear.bias'])
    net = Network(mask_widths(masks), num_classes, SPACE).to(world.device)
    samples = read_list(args.val_list, args.val_root, num_classes)
    transform = val_transform(img_size)
    # batch norms use the statistics of the batch: shuffled images, whole batches only
    loader = make_loader(args.val_root, samples, transform, args, world, args.val_list, for_training=True)
    chosen_ones = {args.model_path: found}
    if args.runner_ups:
        chosen_ones |= runner_ups(found, full, load_table(args.runner_ups, img_size, SPACE))
    for path in [*chosen_ones, *args.architectures]:
        try:
            chosen = chosen_ones[path] if path in chosen_ones else json.loads(Path(path).read_text())
            one = OnePath(net, set_path(net, full, masks, chosen))
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise BadInput(f'{path}: not an architecture of this search space ({type(e).__name__}: {e})') from e
        result = evaluate(one, loader, Precision(world.device), world, torch.channels_last).numbers
        accuracies = ' '.join(f'{name} {result[name]:.2f}' for name in ('top1', 'top5') if name in result)
        print(f'{path}: supernet {accuracies}', flush=True)


if __name__ == '__main__':
    run_script(main, get_args())
