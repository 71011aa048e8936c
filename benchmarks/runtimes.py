"""Latency tables of runtimes: time to make one, errors on unseen networks, networks fitted by the clock, odd widths.

python benchmarks/runtimes.py --runtime onnxruntime --folder results
python benchmarks/runtimes.py --runtime torch onnxruntime openvino --folder results --plot runtimes.png

A folder keeps the tables, and the output of every step. Without the step "table", the one in the folder is used.
"""

import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latency_pkl.runtimes import RUNTIMES, engine_of
from latency_pkl.timing import measure_in_turns
from models.config import load_config
from tools.distributed import pick_device
from tools.environment import ROOT
from tools.errors import BadInput
from tools.files import check_target, write_atomic, write_text
from tools.options import Parser, add_device_arg, count, image_size, run_script

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend)

MULTIPLES = (1, 2, 4, 8, 16)
MOST_SECONDS, MOST_MEAN, MOST_WORST, MOST_BIAS = 120, 2.0, 5.0, 1.0
"""Goals: seconds to make a table; mean, worst and mean signed error of unseen networks in per cent."""

COLOURS = ('#0072b2', '#d55e00', '#009e73')


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    add_device_arg(parser)
    parser.add_argument('--runtime', nargs='+', choices=('torch', *RUNTIMES), default=['onnxruntime'])
    parser.add_argument('--folder', required=True, help='folder of tables and results, made if it does not exist')
    parser.add_argument(
        '--steps', nargs='+', choices=('table', 'check', 'loop', 'widths'), default=['table', 'check', 'loop', 'widths']
    )
    parser.add_argument('--plot', help='PNG file: predicted over measured latency of all checks in the folder')
    parser.add_argument('--img_size', type=image_size, default=224)
    parser.add_argument('--seed', type=count(0), default=1601, help='of the networks of the check')
    parser.add_argument('--networks', type=count(2), default=20, help='networks of the check')
    parser.add_argument('--budget', type=count(5), default=105, help='seconds to measure a table')
    parser.add_argument('--rounds', type=count(), default=24, help='rounds of timings')
    parser.add_argument('--searches', type=count(), default=3, help='architectures that are fitted to three targets')
    return parser.parse_args()


def run(path, *words):
    """Run a script of the project and return its output, which is printed and kept in a file."""
    command = [sys.executable, *map(str, words)]
    print('$', ' '.join(['python', *command[1:]]), flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    if done.returncode not in (0, 1):  # 1: --check is above its tolerance
        raise BadInput(f'{words[0]} ended with exit code {done.returncode}')
    write_text(path, done.stdout)
    return done.stdout


def make_table(table, runtime, args):
    """Make a table, and compare the time with the goal."""
    start = time.monotonic()
    words = ['--runtime', runtime, '--device', args.device, '--img_size', args.img_size, '--budget', args.budget]
    run(table.with_suffix('.txt'), 'latency_pkl/make_lat_lut.py', *words, '--save_path', table)
    seconds = time.monotonic() - start
    print(f'{runtime}: a table in {seconds:.0f} s: {verdict(seconds <= MOST_SECONDS)} ({MOST_SECONDS} s)', flush=True)


def check(table, path, runtime, args):
    """Time unseen networks against the table, and compare the errors with the goals."""
    words = ['--check', table, '--device', args.device, '--img_size', args.img_size, '--seed', args.seed]
    words += ['--networks', args.networks, '--rounds', args.rounds]
    pairs = pairs_of(run(path, 'latency_pkl/make_lat_lut.py', *words))
    errors = 100 * (pairs[:, 0] / pairs[:, 1] - 1)
    mean, worst, bias = np.abs(errors).mean(), np.abs(errors).max(), errors.mean()
    good = mean <= MOST_MEAN and worst <= MOST_WORST and abs(bias) <= MOST_BIAS
    print(
        f'{runtime}: mean error {mean:.2f} %, worst {worst:.2f} %, bias {bias:+.2f} %: {verdict(good)} '
        f'({MOST_MEAN:g}, {MOST_WORST:g}, {MOST_BIAS:g} %)',
        flush=True,
    )


def pairs_of(output):
    """Return predicted and measured latencies, ms [networks, 2], from the output of --check."""
    return np.array(re.findall(r'^predicted +([\d.]+) ms  measured +([\d.]+) ms', output, re.M), dtype=float)


def verdict(good):
    """Return a goal's result in words."""
    return 'within the goal' if good else 'MISSES THE GOAL'


def time_widths(runtime, args):
    """Return a row of a table in Markdown: times of TF-NAS-A with widths rounded up to multiples."""
    engine = engine_of(runtime, None, pick_device(args.device))
    torch.set_num_threads(1)
    config = load_config(ROOT / 'models' / 'zoo' / 'tf_nas_a.config')
    builds = [engine.build(config.rounded_up(m), 0, args.img_size, 1) for m in MULTIPLES]
    measured, undisturbed = measure_in_turns(builds, 1, args.img_size, engine.clock, rounds=args.rounds)
    print(f'{runtime}: undisturbed timings {100 * undisturbed:.0f} %', flush=True)
    return f'| {runtime} | ' + ' | '.join(f'{one.ms:.1f} ± {one.ms * one.error:.1f}' for one in measured) + ' |'


def plot(path, folder):
    """Draw predicted over measured latency of the checks in a folder, a colour and marker per runtime."""
    figure, axes = plt.subplots(figsize=(6, 5), dpi=120)
    largest = 0.0
    found = [file for name in ('torch', *RUNTIMES) for file in folder.glob(f'check_{name}.txt')]
    for file, marker, colour in zip(found, 'o^s', COLOURS, strict=False):
        predicted, ms = pairs_of(file.read_text()).T
        error = 100 * np.abs(predicted / ms - 1).mean()
        name = file.stem.removeprefix('check_')
        axes.scatter(ms, predicted, marker=marker, color=colour, s=30, label=f'{name}: mean error {error:.1f} %')
        largest = max(largest, predicted.max(), ms.max())
    ends = [0, 1.05 * largest]
    axes.plot(ends, ends, color='0.5', linewidth=1, label='predicted = measured')
    axes.set(xlabel='measured latency [ms]', ylabel='predicted latency [ms]', xlim=ends, ylim=ends)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    write_atomic(path, partial(figure.savefig, format='png'))
    print(f'Plot: {path}')


def main(args):
    """Run the steps for each runtime, then print the times of odd widths and draw the plot."""
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if args.plot:
        check_target(args.plot, '--plot')
    rows = []
    for runtime in args.runtime:
        engine_of(runtime, None, pick_device(args.device))
        table = folder.resolve() / f'{runtime}.pkl'
        if 'table' in args.steps or not table.exists():
            make_table(table, runtime, args)
        if 'check' in args.steps:
            check(table, folder / f'check_{runtime}.txt', runtime, args)
        if 'loop' in args.steps:
            words = ['--table', table, '--img_size', args.img_size, '--searches', args.searches]
            run(folder / f'loop_{runtime}.txt', 'benchmarks/fit_measured.py', *words)
        if 'widths' in args.steps:
            rows.append(time_widths(runtime, args))
    if rows:
        head = ['| TF-NAS-A, one thread [ms] | as published | ' + ' | '.join(map(str, MULTIPLES[1:])) + ' |']
        lines = [*head, '|---' * (len(MULTIPLES) + 1) + '|', *rows]
        write_text(folder / 'widths.md', '\n'.join(lines) + '\n')
        print('\n'.join(lines))
    if args.plot:
        plot(args.plot, folder)


if __name__ == '__main__':
    run_script(main, get_args())
