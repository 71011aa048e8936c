"""Make a latency table of this machine: blocks timed inside running networks, checked against whole networks.

    python latency_pkl/make_lat_lut.py --device cpu --save_path my_cpu.pkl
    python latency_pkl/make_lat_lut.py --device cuda --batch_size 32 \\
        --save_path my_gpu.pkl
    python latency_pkl/make_lat_lut.py --runtime onnxruntime \\
        --save_path my_onnxruntime.pkl
    python latency_pkl/make_lat_lut.py --metric flops --save_path flops.pkl
    python latency_pkl/make_lat_lut.py --estimate titan_rtx \\
        --save_path latency_pkl/latency_gpu.pkl

Check a table against fresh networks:

    python latency_pkl/make_lat_lut.py --check my_cpu.pkl

Of another device: write networks to time there, and make a table from their times:

    python latency_pkl/make_lat_lut.py --kit phone_kit
    python latency_pkl/make_lat_lut.py --timings phone_kit/timings.csv \\
        --save_path phone.pkl
"""

import random
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools.needed  # noqa: F401  # isort: skip

import numpy as np
import torch
from tqdm import tqdm

from latency_pkl.estimate import CARDS, estimate
from latency_pkl.fit import fit_table
from latency_pkl.kit import (
    LEAST_NETWORKS,
    NETWORKS,
    REFERENCE,
    WIDTH_DIVISOR,
    held_back_of,
    kit_networks,
    read_kit,
    read_timings,
    timed_table,
    write_kit,
)
from latency_pkl.runtimes import engine_of_table, standard_of
from latency_pkl.sampling import launch_of, random_config, reference_config, sample_of, tf32_of
from latency_pkl.timing import (
    LAUNCHES,
    ROUNDS,
    Passes,
    bench_apart,
    fastest_probe,
    host_ratio,
    host_report,
    measure_in_turns,
    typical_parts,
    undisturbed_share,
)
from latency_pkl.width_grid import MULTIPLES, on_grid, time_grid, with_penalties
from models.config import NetworkConfig, dump_config, fixed_layers, load_config, op_spec
from models.describe import count_mult_adds, count_params
from models.elasticity import check_divisor
from models.latency import LatencyTable, load_table, save_table, warn_of_errors
from models.layers import ConvLayer, MBInvertedResBlock
from models.onnx_graph import OPSETS, USUAL_OPSET
from models.search_space import SPACE
from tools.distributed import pick_device
from tools.environment import set_tf32
from tools.errors import BadInput
from tools.files import check_target
from tools.options import (
    Parser,
    add_device_arg,
    add_runtime_args,
    add_tf32_arg,
    class_count,
    count,
    image_size,
    number,
    run_script,
)

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
    add_runtime_args(parser)
    table, check, kit, hardware = (parser.groups[name] for name in ('latency', 'check', 'kit', 'hardware'))
    table.add_argument('--metric', choices=('latency', 'flops', 'params'), default='latency', help='what to tabulate')
    table.add_argument(
        '--batch_size', type=count(), help="images a pass; default: 32 on a GPU, 1 on a CPU; with --check the table's"
    )
    hardware.add_argument(
        '--threads', type=count(1, 1024), help="CPU threads of a pass; default: 1; with --check the table's"
    )
    table.add_argument(
        '--launch',
        choices=LAUNCHES,
        help='times of a GPU: its own (queued), or with waits for its host (eager); default: queued; '
        "with --check the table's",
    )
    add_tf32_arg(parser, None, "; default: yes; with --check the table's")
    table.add_argument('--img_size', type=image_size, default=224, help='height and width of the input in pixels')
    table.add_argument('--num_classes', type=class_count, default=1000, help='classes of the networks')
    table.add_argument('--budget', type=number(float, 5), default=105.0, help='seconds to measure')
    parser.groups['output'].add_argument(
        '--save_path',
        metavar='FILE',
        help='table to write; default: latency_pkl/<metric>_<device>_<size>_bs<batch>.pkl',
    )
    table.add_argument('--seed', type=count(0), default=2, help='seed of the random networks')
    table.add_argument('--estimate', choices=CARDS, help='measure nothing; estimate the table of a card from its data')
    check.add_argument('--check', metavar='TABLE', help='make no table; time fresh networks against this one')
    check.add_argument(
        '--networks', type=count(2), help=f'networks that --check times (default: 20), or of a --kit ({NETWORKS})'
    )
    check.add_argument(
        '--rounds',
        type=count(),
        default=ROUNDS,
        help='times that --check builds and times each network; up to twice as many if they differ much',
    )
    check.add_argument('--tolerance', type=number(float, 0), default=5.0, help='mean error of --check, in per cent')
    kit.add_argument(
        '--kit',
        metavar='DIR',
        help='write networks to time on another device, to DIR and DIR.zip; with --timings: '
        'the kit that was timed, if the timings are not in its folder',
    )
    kit.add_argument('--configs', nargs='+', metavar='CONFIG', help='with --kit: these networks, not random ones')
    kit.add_argument('--width_divisor', type=count(), help=f'of the widths in a --kit; default: {WIDTH_DIVISOR}')
    kit.add_argument(
        '--opset', type=count(OPSETS[0], OPSETS[-1]), help=f'of the ONNX files in a --kit; default: {USUAL_OPSET}'
    )
    kit.add_argument('--timings', metavar='CSV', help='make a table from the times of the networks of a kit')
    kit.add_argument('--note', help='with --timings: name of the device; default: as the timings name it')
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


def time_turn(rng, unseen, args, engine, divisor=1):
    """Time an unseen network and new ones, each followed by the reference network, which is rebuilt often.

    Widths are multiples of the divisor. Only those of the last network are not, if there is one.
    """
    setting, timed, of_reference = (args.img_size, args.batch_size), [], []
    reference = engine.bench(reference_config(args.num_classes, SPACE), 0, *setting, launch=args.launch)
    divisors = [divisor] * (TURN - 2) + [1]
    drawn = [random_config(rng, i % 2 == 0, args.num_classes, SPACE, d) for i, d in enumerate(divisors)]
    configs = [unseen, *drawn]
    for some in (configs[i : i + SHARING] for i in range(0, TURN, SHARING)):
        with bench_apart(reference) as beside:
            for config in some:
                is_new = config is not unseen
                bench = engine.bench(config, rng.getrandbits(32), *setting, by_part=is_new, launch=args.launch)
                with bench_apart(bench) as timer:
                    timed.append((config, timer(PASSES if is_new else UNSEEN_PASSES)))
                of_reference.append(beside())
    return Turn(timed[1:], timed[0], of_reference)


def measure(args, engine, divisor, start):
    """Time turns of networks until `args.budget` seconds after `start`, longer if undisturbed timings of block shapes
    are missing.
    """
    rng, turns = random.Random(args.seed), []
    unseen = [random_config(rng, False, args.num_classes, SPACE, divisor) for _ in range(UNSEEN)]
    with tqdm(total=round(args.budget), unit='s', desc='timing networks', mininterval=1) as bar:
        while True:
            turns.append(time_turn(rng, unseen[len(turns) % UNSEEN], args, engine, divisor))
            spent = time.monotonic() - start
            bar.update(min(round(spent), bar.total) - bar.n)
            if spent < args.budget:
                continue
            lacks = missing(samples_of(turns, args.img_size, fastest_of(turns), divisor)[0], args.img_size)
            if not lacks or spent >= args.budget * PATIENCE:
                return turns


def fastest_of(turns):
    """Return the `fastest_probe` of all turns, ms."""
    return fastest_probe(passes for turn in turns for passes in turn.passes)


def samples_of(turns, img_size, fastest, divisor, on=True):
    """Return the samples of networks on the width grid, or off it, and the numbers of their turns.

    Networks that were never undisturbed are left out.
    """
    timed = [(one, i) for i, turn in enumerate(turns) for one in turn.fitted if on_grid(one[0], divisor) == on]
    pairs = [(sample_of(*one, img_size, fastest), i) for one, i in timed]
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


def measured_table(args, engine):
    """Measure a latency table of this machine: (base, curves, meta)."""
    start = time.monotonic()
    grid = time_grid(engine, args, SPACE)
    print(grid)
    divisor = grid.divisor
    turns = measure(args, engine, divisor, start)
    probe = fastest_of(turns)
    for slack in SLACKS:
        fastest = slack * probe
        samples, numbers = samples_of(turns, args.img_size, fastest, divisor)
        lack = missing(samples, args.img_size)
        if not lack:
            break
    else:
        raise BadInput(f'--budget {args.budget:g}: {lack} in {PATIENCE} times that; give it more seconds')
    undisturbed = 100 * undisturbed_share([passes for turn in turns for passes in turn.passes])
    reference_ms, slowness = speed_of(turns, fastest)
    fit = fit_table(samples, slowness[numbers], args.img_size, SPACE)
    unseen = unseen_pairs(fit, turns, slowness, args.img_size, fastest)
    off_grid, off_numbers = samples_of(turns, args.img_size, fastest, divisor, on=False)
    curves = with_penalties(fit.curves, off_grid, slowness[off_numbers], divisor, grid.price)
    mean, worst, bias = errors_of(unseen)
    low, high = np.quantile(slowness, (0.25, 0.75))
    print(f'{len(samples)} networks timed; curves were multiplied by {fit.factor:.4f} to fit the mean network')
    print(
        f'Reference network: {reference_ms:.4f} ms, in half of {len(turns)} turns from '
        f'{100 * (low - 1):+.1f} to {100 * (high - 1):+.1f} %'
    )
    if engine.clock.type == 'cpu':
        also = f'; probes up to {slack:g} times as slow counted too, for else shapes were missing' if slack > 1 else ''
        print(f'Timings with an undisturbed core, which are those that count: {undisturbed:.0f} %{also}')
    else:
        ratios = [host_ratio([passes]) for turn in turns for _, passes in turn.fitted]
        print(host_report(ratios, args.launch, undisturbed / 100))
    print(f'Against {len(unseen)} unseen networks: mean error {mean:.2f} %, worst {worst:.2f} %, bias {bias:+.2f} %')
    meta = {
        'unit': 'ms',
        **engine.meta,
        'batch_size': args.batch_size,
        'threads': args.threads,
        'dtype': 'float32',
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
        'width_divisor': divisor,
        'width_costs': dict(zip(map(str, MULTIPLES), grid.costs.round(4).tolist(), strict=True)),
    }
    if engine.clock.type == 'cuda':
        meta |= {'launch': args.launch, 'tf32': args.tf32}
    return fit.base, curves, meta


def counted_table(args):
    """Make a table of MACs or parameters in millions, which are linear in the width: (base, curves, meta)."""
    fixed = fixed_layers(args.num_classes, SPACE)
    sizes = {block.key(op): (block, op) for block, _, op in SPACE.positions(args.img_size)}

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
    unit = 'M MACs' if args.metric == 'flops' else 'M parameters'
    return base, curves, {'unit': unit, 'device': 'any', 'method': 'counted'}


def estimated_table(args):
    """Estimate the table of a card that is not available: (base, curves, meta)."""
    card = CARDS[args.estimate]
    base, curves = estimate(card, args.img_size, args.batch_size, args.num_classes, SPACE)
    method = 'estimated, not measured: a physical model of the card, see latency_pkl/estimate.py'
    return base, curves, {'unit': 'ms', 'device': card.name, 'batch_size': args.batch_size, 'method': method}


def check(table, args, engine):
    """Time fresh networks against a table. Return whether the mean error is within the tolerance."""
    if table.unit != 'ms':
        raise BadInput(f'--check {args.check}: counts {table.unit}, which no clock measures')
    runtime = ' '.join(str(engine.meta[name]) for name in ('runtime', 'runtime_version') if name in engine.meta)
    print(
        f'Table of: {table.meta.get("device", "an unknown device")}; timed on: {engine.meta["device"]}, '
        f'batch {args.batch_size}, threads {args.threads}, {runtime}, widths: multiples of {table.width_divisor}'
    )
    networks = args.networks or 20
    print(f'Timing {networks} networks, each built {args.rounds} times or more', flush=True)
    standard = standard_of(table, args.batch_size, engine, args.launch)
    rng = random.Random(args.seed + 1_000_003)
    drawn = (args.num_classes, SPACE, table.width_divisor)
    configs = [random_config(rng, False, *drawn) for _ in range(networks)]
    builds = [engine.build(config, seed, args.img_size, args.batch_size) for seed, config in enumerate(configs)]
    setting = args.batch_size, args.img_size, engine.clock, standard, args.rounds, args.launch
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
    if engine.clock.type == 'cpu':
        print(f'Timings with an undisturbed core, which are those that count: {100 * undisturbed:.0f} %')
    else:
        print(host_report([one.host for one in measured], args.launch, undisturbed))
    mean, worst, bias = errors_of(pairs)
    noise = 100 * np.mean([one.error for one in measured])
    print(f'Standard error of a measured latency: {noise:.2f} %, which is part of the errors')
    print(f'{len(pairs)} networks: mean error {mean:.2f} %, worst {worst:.2f} %, bias {bias:+.2f} %')
    return mean <= args.tolerance


def make_kit(args):
    """Write a kit of random networks, or of given ones."""
    divisor = args.width_divisor or WIDTH_DIVISOR
    check_divisor(divisor, SPACE)
    if args.configs:
        networks = {REFERENCE: reference_config(args.num_classes, SPACE)}
        for path in args.configs:
            name = Path(path).name.removesuffix('.config')
            if name in networks:
                raise BadInput(f'--configs: two networks are named {name}; rename one')
            networks[name] = load_config(path)
        held_back = 0
    else:
        number = args.networks or NETWORKS
        if number < LEAST_NETWORKS:
            raise BadInput(f'--networks {number}: a --kit needs at least {LEAST_NETWORKS} for a fit')
        networks = kit_networks(number, args.num_classes, SPACE, divisor, random.Random(args.seed))
        held_back = held_back_of(number)
    settings = {
        'img_size': args.img_size,
        'num_classes': args.num_classes,
        'batch_size': args.batch_size or 1,
        'width_divisor': divisor,
        'opset': args.opset or USUAL_OPSET,
        'seed': args.seed,
    }
    size = write_kit(args.kit, networks, settings, held_back)
    print(f'{args.kit}.zip: {len(networks)} networks, {size / 1e6:.1f} MB. On the device: python time_networks.py')


def table_of_timings(args):
    """Write the table of a kit's times."""
    timings = read_timings(args.timings)
    kit = read_kit(args.kit or Path(args.timings).parent)
    path = args.save_path or f'latency_pkl/latency_{Path(args.timings).stem}_{kit.settings["img_size"]}.pkl'
    check_target(path, '--save_path', [args.timings])
    fit, meta = timed_table(timings, kit, SPACE, args.note)
    save_table(fit.base, fit.curves, meta | {'metric': 'latency', 'date': time.strftime('%Y-%m-%d')}, path)
    print(f'{path}: {len(fit.curves)} block shapes, base {fit.base:.4f} ms, of {meta["device"]}')


def main(args):
    """Make a table, check one, or write a kit."""
    start = time.monotonic()
    if args.timings:
        table_of_timings(args)
        return
    if args.kit:
        make_kit(args)
        return
    if args.estimate and args.metric != 'latency':
        raise BadInput(f'--metric {args.metric}: counted, not estimated; leave out --estimate {args.estimate}')
    measures = args.metric == 'latency' and not args.estimate
    device = pick_device(args.device) if measures else torch.device('cpu')
    table = load_table(args.check, args.img_size, SPACE) if args.check else None
    engine = engine_of_table(table.meta if table else {}, args.runtime, args.provider, device)
    if not measures and args.runtime:
        raise BadInput(f'--runtime {args.runtime}: only for a table that is measured; leave it out')
    if args.launch and engine.clock.type != 'cuda':
        raise BadInput(f'--launch {args.launch}: only for times that torch measures on a GPU; leave it out')
    usual = 32 if device.type == 'cuda' or args.estimate else 1
    args.batch_size = args.batch_size or (table.setting('batch_size', usual) if table else usual)
    args.threads = args.threads or (table.setting('threads', 1) if table else 1)
    usual = 'queued' if engine.clock.type == 'cuda' else 'eager'
    args.launch = args.launch or (launch_of(table, engine.clock) if table else usual)
    args.tf32 = args.tf32 if args.tf32 is not None else tf32_of(table) if table else True
    torch.set_num_threads(args.threads)
    set_tf32(args.tf32)
    if table:
        if not check(table, args, engine):
            sys.exit(1)
        return
    of = args.estimate or '_'.join(filter(None, (device.type, args.runtime)))
    path = args.save_path or f'latency_pkl/{args.metric}_{of}_{args.img_size}_bs{args.batch_size}.pkl'
    check_target(path, '--save_path')
    if args.estimate:
        base, curves, meta = estimated_table(args)
    else:
        base, curves, meta = measured_table(args, engine) if measures else counted_table(args)
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
    if warning := warn_of_errors(meta):
        meta['warning'] = warning
    save_table(base, curves, meta, path)
    print(
        f'{path}: {len(curves)} block shapes, base {base:.4f} {meta["unit"]}, made in {time.monotonic() - start:.0f} s'
    )
    if warning:
        print(warning)


if __name__ == '__main__':
    run_script(main, get_args())
