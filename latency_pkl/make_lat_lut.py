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
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latency_pkl.estimate import CARDS, estimate
from latency_pkl.fit import fit_table
from latency_pkl.sampling import build_network, launch_of, random_config, reference_config, sample_of, standard_of
from latency_pkl.timing import (
    LAUNCHES,
    ROUNDS,
    Bench,
    Passes,
    bench_apart,
    fastest_probe,
    host_ratio,
    host_report,
    measure_in_turns,
    typical_parts,
    undisturbed_share,
)
from models.config import NetworkConfig, dump_config
from models.latency import LatencyTable, load_table, save_table
from models.limits import counted_table
from models.search_space import SPACE
from tools.distributed import pick_device
from tools.environment import device_name
from tools.errors import BadInput
from tools.files import check_target
from tools.options import Parser, add_device_arg, class_count, count, image_size, number, run_script

TURN, UNSEEN, LEAST_SAMPLES = 8, 5, 20
"""Networks of a turn, one of them unseen by the fit; different unseen networks; networks that a fit needs."""

ENOUGH = 0.5
"""Share of the reference network's time that must be undisturbed in a turn for its speed to count."""

SLACKS = (1, 1.25, 1.5, 2, 3, 10)
"""Factors on the time of the fastest probes, tried in this order until no block shape is missing."""

SHARING = 2
"""Networks between two builds of the reference network."""

PASSES, UNSEEN_PASSES = 8, 16
"""Timed passes of each network, and of an unseen one."""

PATIENCE = 4
"""Multiple of the budget for a slow machine to show every block shape."""


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = Parser(__doc__)
    add_device_arg(parser)
    parser.add_argument('--metric', choices=('latency', 'flops', 'params'), default='latency', help='what to tabulate')
    parser.add_argument(
        '--batch_size', type=count(), help="images a pass; default: 32 on a GPU, 1 on a CPU; with --check the table's"
    )
    parser.add_argument(
        '--threads', type=count(1, 1024), help="CPU threads of a pass; default: 1; with --check the table's"
    )
    parser.add_argument(
        '--launch',
        choices=LAUNCHES,
        help='times of a GPU: its own (queued), or with waits for its host (eager); default: queued; '
        "with --check the table's",
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
        default=ROUNDS,
        help='times that --check builds and times each network; up to twice as many if they differ much',
    )
    parser.add_argument('--tolerance', type=number(float, 0), default=5.0, help='mean error of --check, in per cent')
    return parser.parse_args(argv)


@dataclass
class Turn:
    """Passes of some networks, of one that the fit does not use, and of the reference network between them."""

    fitted: list[tuple[NetworkConfig, Passes]]
    unseen: tuple[NetworkConfig, Passes]
    reference: list[Passes]

    @property
    def passes(self) -> list[Passes]:
        """Passes of all networks."""
        return [*(passes for _, passes in [*self.fitted, self.unseen]), *self.reference]


def time_turn(rng, unseen, args, device):
    """Time an unseen network and new ones, each followed by the reference network, which is rebuilt often."""
    setting, timed, of_reference = (args.batch_size, args.img_size, device), [], []
    reference = partial(build_network, reference_config(args.num_classes, SPACE), device, seed=0)
    configs = [unseen, *(random_config(rng, i % 2 == 0, args.num_classes, SPACE) for i in range(TURN - 1))]
    for some in (configs[i : i + SHARING] for i in range(0, TURN, SHARING)):
        with bench_apart(Bench(reference, *setting, launch=args.launch)) as beside:
            for config in some:
                build = partial(build_network, config, device, rng.getrandbits(32))
                bench = Bench(build, *setting, by_part=config is not unseen, launch=args.launch)
                with bench_apart(bench) as timer:
                    timed.append((config, timer(UNSEEN_PASSES if config is unseen else PASSES)))
                of_reference.append(beside())
    return Turn(timed[1:], timed[0], of_reference)


def measure(args, device):
    """Time turns of networks for `args.budget` seconds, longer if undisturbed timings of block shapes are missing."""
    rng, start, turns = random.Random(args.seed), time.monotonic(), []
    unseen = [random_config(rng, False, args.num_classes, SPACE) for _ in range(UNSEEN)]
    with tqdm(total=round(args.budget), unit='s', desc='timing networks', mininterval=1) as bar:
        while True:
            turns.append(time_turn(rng, unseen[len(turns) % UNSEEN], args, device))
            spent = time.monotonic() - start
            bar.update(min(round(spent), bar.total) - bar.n)
            if spent < args.budget:
                continue
            lacks = missing(samples_of(turns, args.img_size, fastest_of(turns))[0], args.img_size)
            if not lacks or spent >= args.budget * PATIENCE:
                return turns


def fastest_of(turns):
    """Return the `fastest_probe` of all turns, ms."""
    return fastest_probe(passes for turn in turns for passes in turn.passes)


def samples_of(turns, img_size, fastest):
    """Return the samples of the fit and the numbers of their turns, without networks that were never undisturbed."""
    pairs = [(sample_of(*timed, img_size, fastest), i) for i, turn in enumerate(turns) for timed in turn.fitted]
    pairs = [(sample, i) for sample, i in pairs if sample.total > 0]
    return [sample for sample, _ in pairs], [i for _, i in pairs]


def speed_of(turns, fastest):
    """Return the reference network's latency, ms, and its time in each turn as a multiple of it, [turns].

    A turn counts by the parts that were undisturbed then. If they are less than `ENOUGH`, its value is interpolated
    between the turns before and after.
    """
    passes = [Passes.joined(turn.reference) for turn in turns]
    usual, seen = typical_parts(passes, fastest), np.array([one.seen(fastest) for one in passes])
    if not seen.any():
        seen[:] = True
    own = np.array([typical_parts([one], fastest) for one in passes])
    share = (usual * seen).sum(axis=1) / usual.sum()
    known = np.flatnonzero(share >= min(ENOUGH, share.max()))
    slowness = (own * seen).sum(axis=1)[known] / (usual * seen).sum(axis=1)[known]
    return float(usual.sum()), np.interp(np.arange(len(turns)), known, slowness)


def missing(samples, img_size):
    """Return what a fit lacks, in words; empty if nothing."""
    keys = SPACE.table_widths(img_size).keys()
    seen = {key for sample in samples for key, _, _ in sample.blocks}
    fixed = any(sample.fixed > 0 for sample in samples)
    if len(samples) >= LEAST_SAMPLES and keys <= seen and fixed:
        return ''
    shapes = f'{len(samples)} networks showed {len(seen)} of {len(keys)} block shapes'
    return shapes if fixed else f'{shapes} and no fixed layers'


def errors_of(pairs):
    """Return (mean, worst, bias) of errors in per cent, from pairs of predicted and measured latency."""
    errors = np.array([100 * (predicted / measured - 1) for predicted, measured in pairs])
    return float(np.abs(errors).mean()), float(np.abs(errors).max()), float(errors.mean())


def unseen_pairs(fit, turns, slowness, img_size, fastest):
    """Return (predicted, measured) of each unseen network: of the whole network, or of its undisturbed parts."""
    table, pairs = LatencyTable(fit.base, fit.curves, {}, img_size), []
    for i in range(min(UNSEEN, len(turns))):
        config, passes = turns[i].unseen[0], Passes.joined([turn.unseen[1] for turn in turns[i::UNSEEN]])
        usual = slowness[i::UNSEEN].mean()
        if passes.parts.shape[1] == 1:
            pairs.append((table.of_config(config), typical_parts([passes], fastest).sum() / usual))
            continue
        sample = sample_of(config, passes, img_size, fastest)
        if sample.total > 0:
            pairs.append((sample.predicted(fit.base, fit.curves), sample.total / usual))
    return pairs


def measured_table(args, device):
    """Measure a latency table of this machine: (base, curves, meta)."""
    turns = measure(args, device)
    probe = fastest_of(turns)
    for slack in SLACKS:
        fastest = slack * probe
        samples, numbers = samples_of(turns, args.img_size, fastest)
        lack = missing(samples, args.img_size)
        if not lack:
            break
    else:
        raise BadInput(f'--budget {args.budget:g}: {lack} in {PATIENCE} times that; give it more seconds')
    undisturbed = 100 * undisturbed_share([passes for turn in turns for passes in turn.passes])
    reference_ms, slowness = speed_of(turns, fastest)
    fit = fit_table(samples, slowness[numbers], args.img_size, SPACE)
    unseen = unseen_pairs(fit, turns, slowness, args.img_size, fastest)
    mean, worst, bias = errors_of(unseen)
    low, high = np.quantile(slowness, (0.25, 0.75))
    print(f'{len(samples)} networks timed; curves were multiplied by {fit.factor:.4f} to fit the mean network')
    print(
        f'Reference network: {reference_ms:.4f} ms, in half of {len(turns)} turns from '
        f'{100 * (low - 1):+.1f} to {100 * (high - 1):+.1f} %'
    )
    if device.type == 'cpu':
        also = f'; probes up to {slack:g} times as slow counted too, for else shapes were missing' if slack > 1 else ''
        print(f'Timings with an undisturbed core, which are those that count: {undisturbed:.0f} %{also}')
    else:
        ratios = [host_ratio([passes]) for turn in turns for _, passes in turn.fitted]
        print(host_report(ratios, args.launch, undisturbed / 100))
    print(f'Against {len(unseen)} unseen networks: mean error {mean:.2f} %, worst {worst:.2f} %, bias {bias:+.2f} %')
    meta = {
        'unit': 'ms',
        'device': device_name(device),
        'batch_size': args.batch_size,
        'threads': args.threads,
        'method': 'blocks timed inside running random networks, fitted to the times of the networks',
        'reference': dump_config(reference_config(args.num_classes, SPACE)),
        'reference_ms': reference_ms,
        'samples': len(samples),
        'unseen_networks': len(unseen),
        'residual_mean_percent': round(mean, 3),
        'residual_worst_percent': round(worst, 3),
        'residual_bias_percent': round(bias, 3),
        'undisturbed_percent': round(undisturbed, 1),
        'probe_slack': slack,
        'spread_percent': round(100 * float(high - low), 3),
    }
    if device.type == 'cuda':
        meta['launch'] = args.launch
    return fit.base, fit.curves, meta


def counted(args):
    """Make a table of MACs or parameters in millions: (base, curves, meta)."""
    what = 'macs' if args.metric == 'flops' else args.metric
    table = counted_table(what, args.img_size, args.num_classes, SPACE)
    return table.base, table.curves, table.meta


def estimated_table(args):
    """Estimate the table of a card that is not available: (base, curves, meta)."""
    card = CARDS[args.estimate]
    base, curves = estimate(card, args.img_size, args.batch_size, args.num_classes, SPACE)
    method = 'estimated, not measured: a physical model of the card, see latency_pkl/estimate.py'
    return base, curves, {'unit': 'ms', 'device': card.name, 'batch_size': args.batch_size, 'method': method}


def check(table, args, device):
    """Time fresh networks against a table. Return whether the mean error is within the tolerance."""
    if table.unit != 'ms':
        raise BadInput(f'--check {args.check}: counts {table.unit}, which no clock measures')
    print(
        f'Table of: {table.meta.get("device", "an unknown device")}; timed on: {device_name(device)}, '
        f'batch {args.batch_size}, threads {args.threads}'
    )
    standard = standard_of(table, args.batch_size, device, args.launch)
    rng = random.Random(args.seed + 1_000_003)
    configs = [random_config(rng, False, args.num_classes, SPACE) for _ in range(args.networks)]
    builds = [partial(build_network, config, device, seed) for seed, config in enumerate(configs)]
    setting = args.batch_size, args.img_size, device, standard, args.rounds, args.launch
    measured, undisturbed = measure_in_turns(builds, *setting)
    pairs = [(table.of_config(config), one.ms) for config, one in zip(configs, measured, strict=True)]
    for predicted, ms in pairs:
        print(f'predicted {predicted:8.3f} ms  measured {ms:8.3f} ms  error {100 * (predicted / ms - 1):+6.2f} %')
    if standard:
        print(
            f'Measured by the reference network: the machine took {np.mean([one.slowness for one in measured]):.3f} '
            f'times as long as when the table was made ({standard.ms:.3f} ms)'
        )
    else:
        print('Measured by the clock alone: the table has no time of the reference network for this device')
    if device.type == 'cpu':
        print(f'Timings with an undisturbed core, which are those that count: {100 * undisturbed:.0f} %')
    else:
        print(host_report([one.host for one in measured], args.launch, undisturbed))
    mean, worst, bias = errors_of(pairs)
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
    if args.launch and device.type != 'cuda':
        raise BadInput(f'--launch {args.launch}: only for times measured on a GPU; leave it out')
    table = load_table(args.check, args.img_size, SPACE) if args.check else None
    usual = 32 if device.type == 'cuda' or args.estimate else 1
    args.batch_size = args.batch_size or (table.setting('batch_size', usual) if table else usual)
    args.threads = args.threads or (table.setting('threads', 1) if table else 1)
    usual = 'queued' if device.type == 'cuda' else 'eager'
    args.launch = args.launch or (launch_of(table, device) if table else usual)
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
        base, curves, meta = measured_table(args, device) if measures else counted(args)
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
