"""Write a searched model that was never searched: its architecture is random. To compare a search with.

python experiments/random_model.py --seed 1 --num_classes 10 --save_path random.pth.tar
python parsing_model.py --model_path random.pth.tar --lookup_path table.pkl --target_lat 40% --num_classes 10
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.elasticity import start_masks
from models.parsing import MASKS_KEY
from models.search_space import SPACE, SearchSpace
from tools.files import check_target, save_checkpoint
from tools.options import Parser, class_count, count, run_script


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = Parser(__doc__)
    parser.add_argument('--seed', type=count(0), default=1)
    parser.add_argument('--num_classes', type=class_count, default=1000)
    parser.add_argument('--save_path', required=True, help='file to write')
    return parser.parse_args(argv)


def random_probabilities(seed: int, space: SearchSpace) -> dict[str, Tensor]:
    """Return random log_alphas and betas. All architectures are equally likely to be the most probable by them."""
    sizes = {f'{block.stage}.{block.name}.log_alphas': len(space.ops) for block in space.blocks()}
    sizes |= {f'{name}.betas': len(stage.exit_depths) for name, stage in space.named_stages}
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.rand(size, generator=draw).log_softmax(0) for name, size in sizes.items()}


def main(args):
    """Draw and write."""
    check_target(args.save_path, '--save_path', [])
    model = {
        'state_dict': random_probabilities(args.seed, SPACE),
        MASKS_KEY: start_masks(SPACE),
        'flags': {'num_classes': args.num_classes},
        'epoch': 0,
    }
    save_checkpoint(model, args.save_path)


if __name__ == '__main__':
    run_script(main, get_args())
