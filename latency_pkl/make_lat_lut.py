"""Make a latency table of this machine: blocks timed inside running networks, checked against whole networks.

python latency_pkl/make_lat_lut.py --device cpu --save_path latency_pkl/my_cpu.pkl
python latency_pkl/make_lat_lut.py --device cuda --batch_size 32 --save_path latency_pkl/my_gpu.pkl
python latency_pkl/make_lat_lut.py --metric flops --save_path latency_pkl/flops.pkl
python latency_pkl/make_lat_lut.py --estimate titan_rtx --save_path latency_pkl/latency_gpu.pkl
python latency_pkl/make_lat_lut.py --check latency_pkl/my_cpu.pkl
"""

import random
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latency_pkl.estimate import CARDS, estimate
from latency_pkl.fit import fit_curves
from latency_pkl.sampling import build_network, random_config, time_blocks
from models.config import fixed_layers, op_spec
from models.latency import LatencyTable, load_table, save_table
from models.layers import ConvLayer, MBInvertedResBlock
from models.search_space import SPACE
from tools.checkpoint import check_target
from tools.distributed import pick_device
from tools.errors import BadInput
from tools.fresh import in_fresh_process
from tools.options import Parser, add_device_arg, class_count, count, image_size, number, run_script
from tools.profiling import count_mult_adds, count_params, device_name, measure_latency

WHOLE_EVERY = 4
"""Every so many networks one is timed as a whole: by turns for the calibration and for the residual."""

CALIBRATION_PRIOR = 0.01
"""Pull of the two calibration factors towards a common one, as a share of the data's weight."""


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    add_device_arg(parser)
    parser.add_argument('--metric', choices=('latency', 'flops', 'params'), default='latency', help='what to tabulate')
    parser.add_argument('--batch_size', type=count(), help='images a pass; default: 32 on a GPU, 1 on a CPU')
    parser.add_argument('--threads', type=count(1, 1024), default=1, help='CPU threads of a pass')
    parser.add_argument('--img_size', type=image_size, default=224, help='input size in pixels')
    parser.add_argument('--num_classes', type=class_count, default=1000)
    parser.add_argument('--budget', type=number(float, 5), default=100.0, help='seconds to measure')
    parser.add_argument(
        '--save_path', help='table to write; default: latency_pkl/<metric>_<device>_<size>_bs<batch>.pkl'
    )
    parser.add_argument('--seed', type=count(0), default=2)
    parser.add_argument('--estimate', choices=CARDS, help='measure nothing; estimate the table of a card from its data')
    parser.add_argument('--check', metavar='TABLE', help='make no table; time fresh networks against this one')
    parser.add_argument('--networks', type=count(2), default=20, help='networks that --check times')
    parser.add_argument('--tolerance', type=number(float, 0), default=5.0, help='mean error of --check, in per cent')
    return parser.parse_args()


class Bench:
    """Random networks of one setting, built and timed one after the other, on a CPU each in a process of its own."""

    def __init__(self, args, device: torch.device, seed: int):
        self.setting = args.batch_size, args.img_size, device
        self.num_classes = args.num_classes
        self.rng = random.Random(seed)

    def draw(self, ends: bool):
        """A random network's config, see `random_network`, and a seed for its weights."""
        return random_config(self.rng, ends, self.num_classes), self.rng.getrandbits(32)

    def blocks(self, passes: int = 6):
        """Time the blocks of a new network."""
        on_cpu = self.setting[-1].type == 'cpu'
        timed = partial(in_fresh_process, time_blocks) if on_cpu else time_blocks
        return timed(*self.draw(ends=True), *self.setting, passes)

    def whole(self, repeats: int = 12):
        """A new network's config, and its time in ms: the lesser of two runs, since disturbances only slow down."""
        config, seed = self.draw(ends=False)
        build = partial(build_network, config, self.setting[-1], seed)
        return config, min(measure_latency(build, *self.setting, repeats) for _ in range(2))


def measure(args, device):
    """Time networks for `args.budget` seconds; returns the samples, and whole networks to calibrate and to check
    with.
    """
    bench, start = Bench(args, device, args.seed), time.monotonic()
    samples, wholes = [], []
    with tqdm(total=round(args.budget), unit='s', desc='timing networks', mininterval=1) as bar:
        while (spent := time.monotonic() - start) < args.budget:
            if len(samples) % WHOLE_EVERY == WHOLE_EVERY - 1 and len(wholes) < len(samples) // WHOLE_EVERY + 1:
                wholes.append(bench.whole())
            else:
                samples.append(bench.blocks())
            bar.update(min(round(spent), bar.total) - bar.n)
    keys = SPACE.table_widths(args.img_size)
    unseen = keys.keys() - {key for sample in samples for key, _, _ in sample.blocks}
    if unseen or len(wholes) < 4:
        raise BadInput(
            f'--budget {args.budget:g}: in that time {len(samples)} networks showed {len(keys) - len(unseen)} of '
            f'{len(keys)} block shapes; give it more seconds'
        )
    return samples, wholes[0::2], wholes[1::2]


def compare(table, wholes):
    """Errors of a table against timed networks, in per cent: (mean, worst, bias)."""
    errors = np.array([100 * (table.of_config(config) / ms - 1) for config, ms in wholes])
    return float(np.abs(errors).mean()), float(np.abs(errors).max()), float(errors.mean())


def calibrate(table, wholes):
    """Factors for the base and for the blocks of a table that fit whole networks best, in relative error. Two, since a
    larger network leaves less of itself in the caches."""
    ms = np.array([ms for _, ms in wholes])
    blocks = np.array([table.of_config(config) for config, _ in wholes]) - table.base
    rows = np.stack([np.full_like(ms, table.base), blocks], axis=1) / ms[:, None]
    common = 1 / np.median(rows.sum(axis=1))
    keep = np.ones(len(ms), dtype=bool)
    for _ in range(2):
        prior = np.eye(2) * CALIBRATION_PRIOR * np.square(rows[keep]).sum() / 2
        right = rows[keep].sum(axis=0) + prior @ np.full(2, common)
        factors = np.linalg.solve(rows[keep].T @ rows[keep] + prior, right)
        errors = np.abs(rows @ factors - 1)
        keep = errors <= max(3 * np.median(errors), 0.02)  # without networks that a disturbance slowed down
    return np.maximum(factors, common / 2)


def measured_table(args, device):
    """A latency table of this machine: (base, curves, how it was made)."""
    samples, calibration, unseen = measure(args, device)
    base, curves, spread = fit_curves(samples, args.img_size)
    table = LatencyTable(base, curves, {}, args.img_size)
    base_scale, scale = calibrate(table, calibration)
    base, curves = base * base_scale, {key: curve * scale for key, curve in curves.items()}
    mean, worst, bias = compare(LatencyTable(base, curves, {}, args.img_size), unseen)
    print(
        f'{len(samples)} networks timed block by block; calibration factors {base_scale:.4f} (base) and {scale:.4f} '
        f'(blocks) from {len(calibration)} more'
    )
    print(f'Speed of the machine varied by {100 * spread:.1f} % during the run (5 % to 95 % of the networks)')
    print(f'Against {len(unseen)} unseen networks: mean error {mean:.2f} %, worst {worst:.2f} %, bias {bias:+.2f} %')
    meta = {
        'unit': 'ms',
        'device': device_name(device),
        'batch_size': args.batch_size,
        'threads': args.threads,
        'method': 'blocks timed inside running random networks, calibrated on whole networks',
        'samples': len(samples),
        'calibration_networks': len(calibration),
        'unseen_networks': len(unseen),
        'residual_mean_percent': round(mean, 3),
        'residual_worst_percent': round(worst, 3),
        'residual_bias_percent': round(bias, 3),
        'speed_spread_percent': round(100 * spread, 3),
    }
    return base, curves, meta


def counted_table(args):
    """A table of multiply-adds or parameters in millions, which are linear in the width: (base, curves, meta)."""
    fixed = fixed_layers(args.num_classes)
    sizes = {block.key(op): (block, op) for block, op in SPACE.layers(args.img_size)}

    def amount(layer, in_ch, size):
        return count_params(layer) if args.metric == 'params' else count_mult_adds(layer, size, in_ch)

    curves = {}
    for key, (_, high) in SPACE.table_widths(args.img_size).items():
        block, op = sizes[key]
        ends = block.in_ch + 1, high
        at = [amount(MBInvertedResBlock(op_spec(block, op, w)), block.in_ch, block.in_size) for w in ends]
        slope = (at[1] - at[0]) / (ends[1] - ends[0])
        curves[key] = at[1] + slope * (np.arange(1, high + 1) - high)
    stem_size = SPACE.blocks(args.img_size)[0].in_size
    last = SPACE.blocks(args.img_size)[-1]
    base = amount(ConvLayer(fixed['first_stem']), 3, args.img_size)
    base += amount(MBInvertedResBlock(fixed['second_stem']), fixed['second_stem'].in_channels, stem_size)
    base += amount(ConvLayer(fixed['feature_mix_layer']), last.out_ch, -(-last.in_size // last.stride))
    base += fixed['classifier'].in_features * args.num_classes / 1e6
    if args.metric == 'params':
        base += args.num_classes / 1e6
    unit = 'M multiply-adds' if args.metric == 'flops' else 'M parameters'
    return base, curves, {'unit': unit, 'device': 'any', 'method': 'counted'}


def estimated_table(args):
    """A table of a card that is not at hand: (base, curves, meta)."""
    card = CARDS[args.estimate]
    base, curves = estimate(card, args.img_size, args.batch_size, args.num_classes)
    method = 'estimated, not measured: a physical model of the card, see latency_pkl/estimate.py'
    return base, curves, {'unit': 'ms', 'device': card.name, 'batch_size': args.batch_size, 'method': method}


def check(args, device):
    """Time fresh networks against a table; returns whether the mean error is within the tolerance."""
    table = load_table(args.check, args.img_size)
    bench = Bench(args, device, args.seed + 1_000_003)
    wholes = []
    for _ in range(args.networks):
        config, ms = bench.whole()
        wholes.append((config, ms))
        predicted = table.of_config(config)
        print(f'predicted {predicted:8.3f} ms  measured {ms:8.3f} ms  error {100 * (predicted / ms - 1):+6.2f} %')
    mean, worst, bias = compare(table, wholes)
    print(f'{args.networks} networks: mean error {mean:.2f} %, worst {worst:.2f} %, bias {bias:+.2f} %')
    return mean <= args.tolerance


def main(args):
    """Make a table, or check one."""
    start = time.monotonic()
    measures = args.metric == 'latency' and not args.estimate
    device = pick_device(args.device) if measures else torch.device('cpu')
    torch.set_num_threads(args.threads)
    args.batch_size = args.batch_size or (32 if device.type == 'cuda' or args.estimate else 1)
    if args.check:
        if not check(args, device):
            sys.exit(1)
        return
    of = args.estimate or device.type
    path = args.save_path or f'latency_pkl/{args.metric}_{of}_{args.img_size}_bs{args.batch_size}.pkl'
    check_target(path, '--save_path')
    if args.estimate:
        base, curves, meta = estimated_table(args)
    else:
        base, curves, meta = measured_table(args, device) if measures else counted_table(args)
    meta |= {
        'metric': args.metric,
        'img_size': args.img_size,
        'num_classes': args.num_classes,
        'dtype': 'float32',
        'torch': str(torch.__version__),
        'torchvision': torchvision.__version__,
        'date': time.strftime('%Y-%m-%d'),
        'seed': args.seed,
    }
    save_table(base, curves, meta, path)
    print(
        f'{path}: {len(curves)} block shapes, base {base:.4f} {meta["unit"]}, made in {time.monotonic() - start:.0f} s'
    )


if __name__ == '__main__':
    run_script(main, get_args())
