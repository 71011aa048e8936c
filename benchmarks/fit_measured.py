"""Fit networks to measured latency targets, and measure them again in a fresh process.

python benchmarks/fit_measured.py --table latency_pkl/my_cpu.pkl --img_size 224
"""

import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.elasticity import full_weights, latency_range, start_masks
from models.latency import load_table
from models.parsing import MASKS_KEY, parse_architecture
from models.search_space import SPACE
from tools.files import save_checkpoint
from tools.options import Parser, count, number, run_script
from tools.report.summary import ROWS

ROOT = Path(__file__).resolve().parent.parent


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument('--table', required=True, help='a table of this machine, made by make_lat_lut.py')
    parser.add_argument('--img_size', type=count(32), default=224)
    parser.add_argument('--searches', type=count(), default=5, help='random search results to fit')
    parser.add_argument('--within', type=number(float, 0), default=2.0, help='largest error in %% that counts as a hit')
    parser.add_argument('--seed', type=count(0), default=1)
    return parser.parse_args()


def random_search_result(path, seed, space):
    """Write a searched model with random architecture parameters; return its architecture."""
    torch.manual_seed(seed)
    full = full_weights(10, torch.device('cpu'), space)
    for name, value in full.items():
        if name.endswith(('log_alphas', 'betas')):
            value.copy_(torch.randn_like(value).log_softmax(0))
    save_checkpoint({'state_dict': full, MASKS_KEY: start_masks(space)}, path)
    return parse_architecture(full, space)


def run(*words):
    """Return the standard output of a script of the project."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main(args):
    """Fit each random search result to three targets, measure the configs in fresh processes, count the hits."""
    table = load_table(args.table, args.img_size, SPACE)
    rng, good, total = random.Random(args.seed), 0, 0
    shared = ['--lookup_path', args.table, '--img_size', args.img_size]
    with tempfile.TemporaryDirectory() as folder:
        model, config = Path(folder) / 'searched.pth.tar', Path(folder) / 'model.config'
        for i in range(args.searches):
            least, most = latency_range(random_search_result(model, args.seed + i, SPACE), table, SPACE)
            for share in (0.2, 0.5, 0.8):
                target = least + (most - least) * (share + rng.uniform(-0.1, 0.1))
                fit = ['--model_path', model, '--target_lat', f'{target:.4f}', '--fit_measured', '--save_path', config]
                rounds = len(re.findall('^Round .* measured ', run('parsing_model.py', *fit, *shared), re.M))
                again = run('parsing_model.py', '--config_path', config, '--print_lat', '--save_path', config, *shared)
                predicted = float(re.search(r'Lat_LUT: ([\d.]+)', again).group(1))
                measured = float(re.search(ROWS['measured'][0], again, re.M).group(1))
                error = 100 * (measured / target - 1)
                good, total = good + (abs(error) <= args.within), total + 1
                print(
                    f'search {i}: target {target:8.3f}  table {predicted:8.3f}  measured again {measured:8.3f} ms  '
                    f'error {error:+5.2f} %  ({rounds} rounds)',
                    flush=True,
                )
    print(f'{good} of {total} within {args.within:g} % of the target')


if __name__ == '__main__':
    run_script(main, get_args())
