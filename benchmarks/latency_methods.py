"""Compare predicted with measured latency of random networks: an in-context table, and blocks timed alone.

    python benchmarks/latency_methods.py --table latency_pkl/my_cpu.pkl \\
        --plot methods.png
"""

import random
import sys
import time
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.isolated import isolated_sum
from latency_pkl.isolation import in_fresh_process
from latency_pkl.runtimes import engine_of, standard_of
from latency_pkl.sampling import build_network, launch_of, random_config
from latency_pkl.timing import measure_latency
from models.latency import load_table
from models.search_space import SPACE
from tools.distributed import pick_device
from tools.files import check_target, write_atomic
from tools.options import Parser, add_device_arg, count, run_script

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend)


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    add_device_arg(parser)
    parser.add_argument('--table', required=True, help='a table of this machine, made by make_lat_lut.py')
    parser.add_argument('--plot', help='PNG file to write')
    parser.add_argument('--networks', type=count(2), default=20)
    parser.add_argument('--img_size', type=count(32), default=224)
    parser.add_argument('--seed', type=count(0), default=77)
    return parser.parse_args()


def plot(path, measured, methods):
    """Draw predicted over measured latency, a marker per method, and the line of equality."""
    figure, axes = plt.subplots(figsize=(6, 5), dpi=120)
    for (name, predicted), marker, colour in zip(methods.items(), 'o^', ('#0072b2', '#d55e00'), strict=True):
        axes.scatter(measured, predicted, marker=marker, color=colour, label=name, s=36)
    ends = [0, 1.05 * max(measured)]
    axes.plot(ends, ends, color='0.5', linewidth=1, label='predicted = measured')
    axes.set(xlabel='measured latency of the whole network [ms]', ylabel='predicted latency [ms]', xlim=ends, ylim=ends)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    write_atomic(path, partial(figure.savefig, format='png'))


def main(args):
    """Time random networks whole and in parts; print and draw the errors of both predictions."""
    if args.plot:
        check_target(args.plot, '--plot')
    device = pick_device(args.device)
    table = load_table(args.table, args.img_size, SPACE)
    torch.set_num_threads(table.setting('threads', 1))
    batch_size = table.setting('batch_size', 1)
    launch = launch_of(table, device)
    rng, standard = random.Random(args.seed), standard_of(table, batch_size, engine_of('torch', None, device), launch)
    methods, measured = {'in-context table': [], 'blocks timed alone': []}, []
    alone_seconds, parts = 0.0, 0
    for _ in range(args.networks):
        config = random_config(rng, ends=False, num_classes=1000, space=SPACE)
        build = partial(build_network, config, device, args.seed)
        whole = measure_latency(build, batch_size, args.img_size, device, standard, launch=launch)
        measured.append(whole.ms)
        methods['in-context table'].append(table.of_config(config))
        start = time.monotonic()
        alone = in_fresh_process(isolated_sum, build, batch_size, args.img_size, device)
        alone_seconds += time.monotonic() - start
        parts += len(list(config.blocks())) + 1  # the first stem is timed with the block behind it
        methods['blocks timed alone'].append(
            alone / (whole.slowness or 1)
        )  # at the same speed of the machine as the whole
    for name, predicted in methods.items():
        ratio = np.array(predicted) / np.array(measured)
        errors = 100 * (ratio - 1)
        print(
            f'{name}: predicted / measured {ratio.min():.3f} to {ratio.max():.3f}, '
            f'mean error {np.abs(errors).mean():.2f} %, worst {np.abs(errors).max():.2f} %, bias {errors.mean():+.2f} %'
        )
    widths = sum(high for _, high in SPACE.table_widths(args.img_size).values())
    hours = alone_seconds / parts * widths / 3600
    print(f'Timing all {widths} widths alone would take some {hours:.1f} hours here')
    if args.plot:
        plot(args.plot, measured, methods)
        print(f'Plot: {args.plot}')


if __name__ == '__main__':
    run_script(main, get_args())
