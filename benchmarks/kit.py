"""A table from a kit that ONNX Runtime times here as if this were another device, against the networks held back.

python benchmarks/kit.py
python benchmarks/kit.py --weights 8 --networks 0

The second command compares times of the kit's networks, whose weights are parts of one file, with those of the same
networks with random weights in full precision in files of their own.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latency_pkl import time_networks
from latency_pkl.kit import LEAST_NETWORKS, NETWORKS, read_kit
from models.onnx_graph import save_onnx, to_onnx
from tools.options import Parser, count, image_size, number, run_script

ROOT = Path(__file__).resolve().parent.parent


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = Parser(__doc__)
    parser.add_argument('--networks', type=count(0), default=NETWORKS, help='networks of the kit; 0: no table')
    parser.add_argument('--img_size', type=image_size, default=224)
    parser.add_argument('--width_divisor', type=count(), default=8, help='of the widths')
    parser.add_argument('--rounds', type=count(), default=4, help='times that each network is loaded and timed')
    parser.add_argument('--weights', type=count(0), default=0, help='networks whose weights are compared')
    parser.add_argument('--seed', type=count(0), default=2)
    parser.add_argument('--mean', type=number(float, 0), default=2.5, help='largest good mean error, in per cent')
    parser.add_argument('--worst', type=number(float, 0), default=6.0, help='largest good error, in per cent')
    return parser.parse_args(argv)


def run(*words):
    """Run a program; return what it prints."""
    return subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True, text=True).stdout


def make_table(folder, args):
    """Time the kit and make its table; return whether the errors are within the bounds."""
    start = time.monotonic()
    print(run(folder / 'time_networks.py', '--rounds', args.rounds).rpartition('\r')[2].strip().splitlines()[-1])
    print(f'Timed in {time.monotonic() - start:.0f} s')
    start, table = time.monotonic(), folder.parent / 'table.pkl'
    words = ['--timings', folder / 'timings.csv', '--save_path', table]
    out = run(ROOT / 'latency_pkl' / 'make_lat_lut.py', *words)
    print(f'{out}Fitted in {time.monotonic() - start:.0f} s')
    mean, worst = (float(re.search(rf'{name} ([\d.]+) %', out)[1]) for name in ('mean error', 'worst'))
    good = mean <= args.mean and worst <= args.worst
    print(f'{"Within" if good else "NOT within"} the bounds: mean {args.mean:g} %, worst {args.worst:g} %')
    return good


def compare_weights(folder, args):
    """Print the times of networks with the kit's weights over those with random weights in full precision."""
    kit = read_kit(folder)
    settings = {'threads': 1, 'batch_size': 1, 'provider': 'CPUExecutionProvider'}
    names = list(kit.networks)[1 : 1 + args.weights]
    reference, ratios = time_networks.Network(folder / 'networks' / 'reference.onnx', settings, args.img_size), []
    for name in names:
        other = folder.parent / f'{name}.onnx'
        save_onnx(to_onnx(kit.networks[name], 1, args.img_size), other)
        for _ in range(args.rounds):
            turns = []
            for path in (folder / 'networks' / f'{name}.onnx', other):
                turn = time_networks.take_turn(time_networks.Network(path, settings, args.img_size), reference)
                turns.append(turn['ms'] / turn['reference'])
            ratios.append(turns[0] / turns[1])
        other.unlink()
    error = 100 * np.std(ratios) / len(ratios) ** 0.5
    print(
        f"{args.weights} networks: time with the kit's weights over time with random ones in full precision: "
        f'{np.mean(ratios):.4f}, standard error {error:.2f} %'
    )


def main(args):
    """Write a kit, time it, fit it, print the errors."""
    with tempfile.TemporaryDirectory() as parent:
        folder, start = Path(parent) / 'kit', time.monotonic()
        words = ['--kit', folder, '--networks', max(args.networks, LEAST_NETWORKS), '--img_size', args.img_size]
        words += ['--width_divisor', args.width_divisor, '--seed', args.seed]
        print(run(ROOT / 'latency_pkl' / 'make_lat_lut.py', *words).strip())
        print(f'Written in {time.monotonic() - start:.0f} s', flush=True)
        good = make_table(folder, args) if args.networks else True
        if args.weights:
            compare_weights(folder, args)
    return 0 if good else 1


if __name__ == '__main__':
    run_script(main, get_args())
