"""How one latency table differs from another: errors over all block shapes and widths, and rank correlation.

python benchmarks/compare_tables.py latency_pkl/latency_gpu.pkl published_gpu.pkl
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.latency import load_table
from models.search_space import SPACE
from tools.options import Parser, image_size, run_script


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument('table')
    parser.add_argument('reference')
    parser.add_argument('--img_size', type=image_size, default=224)
    return parser.parse_args()


def main(args):
    """Print the table's errors against the reference, each width of each shape counting as much as any other."""
    table, reference = (load_table(path, args.img_size, SPACE) for path in (args.table, args.reference))
    widths = SPACE.table_widths(args.img_size)
    for name, least in (
        ('all widths of a search', {key: low for key, (low, _) in widths.items()}),
        ('widths from half to full', {key: -(-high // 2) for key, (_, high) in widths.items()}),
    ):
        own, other = (
            [one.curves[key][least[key] - 1 : high] for key, (_, high) in widths.items()] for one in (table, reference)
        )
        by_shape = np.array([100 * np.mean(a / b - 1) for a, b in zip(own, other, strict=True)])
        own, other = np.concatenate(own), np.concatenate(other)
        errors = 100 * (own / other - 1)
        print(
            f'{name}: mean error {np.abs(errors).mean():.2f} %, worst {np.abs(errors).max():.2f} %, '
            f'bias {errors.mean():+.2f} % (mean of shapes {by_shape.mean():+.2f} %), '
            f'rank correlation {spearmanr(own, other).statistic:.4f}'
        )


if __name__ == '__main__':
    run_script(main, get_args())
