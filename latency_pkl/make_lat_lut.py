"""Make a latency table of this machine: blocks timed inside running networks, checked against whole networks.

python latency_pkl/make_lat_lut.py --device cpu --save_path latency_pkl/my_cpu.pkl
python latency_pkl/make_lat_lut.py --device cuda --batch_size 32 --save_path latency_pkl/my_gpu.pkl
python latency_pkl/make_lat_lut.py --metric flops --save_path latency_pkl/flops.pkl
python latency_pkl/make_lat_lut.py --estimate titan_rtx --save_path latency_pkl/latency_gpu.pkl
python latency_pkl/make_lat_lut.py --check latency_pkl/my_cpu.pkl
"""

import itertools
import random
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latency_pkl.estimate import CARDS, estimate
from latency_pkl.fit import fit_table
from latency_pkl.sampling import Sample, build_network, random_config, reference_config, standard_of, time_blocks
from models.config import dump_config, fixed_layers, op_spec
from models.latency import LatencyTable, load_table, save_table
from models.layers import ConvLayer, MBInvertedResBlock
from models.search_space import SPACE
from tools.checkpoint import check_target
from tools.distributed import pick_device
from tools.errors import BadInput
from tools.fresh import in_fresh_process
from tools.options import Parser, add_device_arg, class_count, count, image_size, number, run_script
from tools.profiling import count_mult_adds, count_params, device_name, measure_in_turns, time_once

TURN, UNSEEN, LEAST_SAMPLES = 8, 6, 20
"""Of so many timings one is of the reference network and one of a network kept from the fit; how many those are; how
many networks a fit needs."""

NEAREST = 4
"""Timings of the reference network that tell how slow the machine was at a time."""

PATIENCE = 4
"""Times the budget that a slow machine gets to show every block shape."""


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    add_device_arg(parser)
    parser.add_argument('--metric', choices=('latency', 'flops', 'params'), default='latency', help='what to tabulate')
    parser.add_argument(
        '--batch_size', type=count(), help="images a pass; default: 32 on a GPU, 1 on a CPU; with --check the table's"
    )
    parser.add_argument(
        '--threads', type=count(1, 1024), help="CPU threads of a pass; default: 1; with --check the table's"
    )
    parser.add_argument('--img_size', type=image_size, default=224, help='input size in pixels')
    parser.add_argument('--num_classes', type=class_count, default=1000)
    parser.add_argument('--budget', type=number(float, 5), default=105.0, help='seconds to measure')
    parser.add_argument(
        '--save_path', help='table to write; default: latency_pkl/<metric>_<device>_<size>_bs<batch>.pkl'
    )
    parser.add_argument('--seed', type=count(0), default=2)
    parser.add_argument('--estimate', choices=CARDS, help='measure nothing; estimate the table of a card from its data')
    parser.add_argument('--check', metavar='TABLE', help='make no table; time fresh networks against this one')
    parser.add_argument('--networks', type=count(2), default=20, help='networks that --check times')
    parser.add_argument(
        '--rounds',
        type=count(),
        default=24,
        help='times that --check times each network; up to three times as many where they differ much',
    )
    parser.add_argument('--tolerance', type=number(float, 0), default=5.0, help='mean error of --check, in per cent')
    return parser.parse_args()


@dataclass
class Timings:
    """What was timed, each with the seconds since the start."""

    fitted: list[tuple[float, Sample]] = field(default_factory=list)
    unseen: list[tuple[float, int, float]] = field(default_factory=list)
    """Time, number of the network, ms."""
    reference: list[tuple[float, float]] = field(default_factory=list)

    @property
    def samples(self) -> list[Sample]:
        """The timed networks that the fit sees."""
        return [sample for _, sample in self.fitted]

    @property
    def reference_ms(self) -> float:
        """Time of the reference network."""
        return float(np.median([ms for _, ms in self.reference]))

    def slowness(self, when: float) -> float:
        """How many times as slow as usual the machine was at that time, by the reference network."""
        nearest = sorted(self.reference, key=lambda timing: abs(timing[0] - when))[:NEAREST]
        return float(np.median([ms for _, ms in nearest])) / self.reference_ms


def measure(args, device):
    """Time networks for `args.budget` seconds, longer where block shapes are missing, on a CPU each in a process of its
    own: new ones to fit, by turns the reference network and some that the fit does not see. Returns the timings, and
    the configs of the unseen networks."""
    rng, start = random.Random(args.seed), time.monotonic()
    timed = partial(in_fresh_process, time_blocks) if device.type == 'cpu' else time_blocks
    reference = reference_config(args.num_classes)
    timings, unseen = Timings(), [random_config(rng, False, args.num_classes) for _ in range(UNSEEN)]
    with tqdm(total=round(args.budget), unit='s', desc='timing networks', mininterval=1) as bar:
        for i in itertools.count():
            spent = time.monotonic() - start
            if spent >= args.budget and (
                spent >= PATIENCE * args.budget or not missing(timings.samples, args.img_size)
            ):
                return timings, unseen
            turn, place = divmod(i, TURN)
            if place == 0:
                build = partial(build_network, reference, device, seed=0)
                timings.reference.append((spent, time_once(build, args.batch_size, args.img_size, device)))
            elif place == TURN // 2:
                build = partial(build_network, unseen[turn % UNSEEN], device, rng.getrandbits(32))
                ms = time_once(build, args.batch_size, args.img_size, device)
                timings.unseen.append((spent, turn % UNSEEN, ms))
            else:
                config = random_config(rng, place % 2 == 0, args.num_classes)
                sample = timed(config, rng.getrandbits(32), args.batch_size, args.img_size, device)
                timings.fitted.append((spent, sample))
            bar.update(min(round(spent), bar.total) - bar.n)


def missing(samples, img_size):
    """What a fit lacks, in words; empty where nothing."""
    keys = SPACE.table_widths(img_size).keys()
    seen = {key for sample in samples for key, _, _ in sample.blocks}
    if len(samples) >= LEAST_SAMPLES and keys <= seen:
        return ''
    return f'{len(samples)} networks showed {len(seen)} of {len(keys)} block shapes'


def compare(table, wholes):
    """Errors of a table against timed networks, in per cent: (mean, worst, bias)."""
    errors = np.array([100 * (table.of_config(config) / ms - 1) for config, ms in wholes])
    return float(np.abs(errors).mean()), float(np.abs(errors).max()), float(errors.mean())


def measured_table(args, device):
    """A latency table of this machine: (base, curves, how it was made)."""
    timings, configs = measure(args, device)
    if lack := missing(timings.samples, args.img_size):
        raise BadInput(f'--budget {args.budget:g}: {lack} in {PATIENCE} times that; give it more seconds')
    samples, slowness = timings.samples, np.array([timings.slowness(when) for when, _ in timings.fitted])
    fit = fit_table(samples, slowness, args.img_size)
    unseen = []
    for number_, config in enumerate(configs):
        times = [ms / timings.slowness(when) for when, which, ms in timings.unseen if which == number_]
        unseen += [(config, float(np.median(times)))] if times else []
    mean, worst, bias = compare(LatencyTable(fit.base, fit.curves, {}, args.img_size), unseen)
    low, high = np.quantile([ms for _, ms in timings.reference], (0.25, 0.75)) / timings.reference_ms
    print(
        f'{len(samples)} networks timed; sums of their parts were fitted to the whole by factors of '
        f'{fit.factors[0]:.4f} (base) and {fit.factors[1]:.4f} (blocks)'
    )
    print(
        f'Reference network: {timings.reference_ms:.4f} ms, half of its {len(timings.reference)} timings from '
        f'{100 * (low - 1):+.1f} to {100 * (high - 1):+.1f} %'
    )
    print(f'Against {len(unseen)} unseen networks: mean error {mean:.2f} %, worst {worst:.2f} %, bias {bias:+.2f} %')
    meta = {
        'unit': 'ms',
        'device': device_name(device),
        'batch_size': args.batch_size,
        'threads': args.threads,
        'method': 'blocks timed inside running random networks, fitted to the times of the whole networks',
        'reference': dump_config(reference_config(args.num_classes)),
        'reference_ms': timings.reference_ms,
        'samples': len(samples),
        'unseen_networks': len(unseen),
        'residual_mean_percent': round(mean, 3),
        'residual_worst_percent': round(worst, 3),
        'residual_bias_percent': round(bias, 3),
        'spread_percent': round(100 * float(high - low), 3),
    }
    return fit.base, fit.curves, meta


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


def check(table, args, device):
    """Time fresh networks against a table; returns whether the mean error is within the tolerance."""
    if table.unit != 'ms':
        raise BadInput(f'--check {args.check}: counts {table.unit}, which no clock measures')
    print(
        f'Table of: {table.meta.get("device", "an unknown device")}; timed on: {device_name(device)}, '
        f'batch {args.batch_size}, threads {args.threads}'
    )
    standard = standard_of(table, args.batch_size, device)
    rng = random.Random(args.seed + 1_000_003)
    configs = [random_config(rng, False, args.num_classes) for _ in range(args.networks)]
    builds = [partial(build_network, config, device, seed) for seed, config in enumerate(configs)]
    measured = measure_in_turns(builds, args.batch_size, args.img_size, device, standard, args.rounds, 3 * args.rounds)
    wholes = [(config, one.ms) for config, one in zip(configs, measured, strict=True)]
    for config, ms in wholes:
        predicted = table.of_config(config)
        print(f'predicted {predicted:8.3f} ms  measured {ms:8.3f} ms  error {100 * (predicted / ms - 1):+6.2f} %')
    if standard:
        print(
            f'Measured by the reference network: the machine took {np.mean([one.slowness for one in measured]):.3f} '
            f'times as long as when the table was made ({standard.ms:.3f} ms)'
        )
    else:
        print('Measured by the clock alone: the table has no time of the reference network for this device')
    mean, worst, bias = compare(table, wholes)
    noise = 100 * np.mean([one.error for one in measured])
    print(f'Standard error of a measured latency: {noise:.2f} %, which is part of the errors')
    print(f'{args.networks} networks: mean error {mean:.2f} %, worst {worst:.2f} %, bias {bias:+.2f} %')
    return mean <= args.tolerance


def main(args):
    """Make a table, or check one."""
    start = time.monotonic()
    if args.estimate and args.metric != 'latency':
        raise BadInput(f'--metric {args.metric}: counted, not estimated; leave out --estimate {args.estimate}')
    measures = args.metric == 'latency' and not args.estimate
    device = pick_device(args.device) if measures else torch.device('cpu')
    table = load_table(args.check, args.img_size) if args.check else None
    usual = 32 if device.type == 'cuda' or args.estimate else 1
    args.batch_size = args.batch_size or (table.setting('batch_size', usual) if table else usual)
    args.threads = args.threads or (table.setting('threads', 1) if table else 1)
    torch.set_num_threads(args.threads)
    if table:
        if not check(table, args, device):
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
        'torchvision': version('torchvision'),
        'date': time.strftime('%Y-%m-%d'),
        'seed': args.seed,
    }
    save_table(base, curves, meta, path)
    print(
        f'{path}: {len(curves)} block shapes, base {base:.4f} {meta["unit"]}, made in {time.monotonic() - start:.0f} s'
    )


if __name__ == '__main__':
    run_script(main, get_args())
