"""Make a latency table of this machine from running networks, checked against others.

    python latency_pkl/make_lat_lut.py --device cpu --save_path my_cpu.pkl
    python latency_pkl/make_lat_lut.py --device cuda --batch_size 32 \\
        --save_path my_gpu.pkl
    python latency_pkl/make_lat_lut.py --runtime onnxruntime \\
        --save_path my_onnxruntime.pkl
    python latency_pkl/make_lat_lut.py --metric flops --save_path flops.pkl

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
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools.needed  # noqa: F401  # isort: skip

import numpy as np
import torch

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
from latency_pkl.measured import errors_of, measured_table, undisturbed_line
from latency_pkl.runtimes import engine_of_table, standard_of
from latency_pkl.sampling import launch_of, random_config, reference_config, tf32_of
from latency_pkl.timing import LAUNCHES, ROUNDS, host_report, measure_in_turns
from models.config import load_config
from models.counted import counted_table
from models.elasticity import check_divisor
from models.onnx_graph import OPSET
from models.parsing import USUAL_CLASSES
from models.search_space import SPACE
from models.tables import load_table, save_table, table_size, warn_of_errors
from tools.chain import settle, with_flags
from tools.distributed import pick_device
from tools.environment import set_tf32
from tools.errors import BadInput
from tools.files import check_target
from tools.options import (
    USUAL_SIZE,
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

PARTNERS = {'configs': 'kit', 'width_divisor': 'kit', 'note': 'timings'}  # by flag: the one that it belongs to
OF_TABLES = ('check', 'metric', 'runtime', 'provider', 'launch', 'tf32')
# by flag: those that are not used with it; the first flag that is given counts
UNUSED = {'timings': OF_TABLES, 'kit': (*OF_TABLES, 'save_path'), 'check': ('metric', 'save_path')}


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = Parser(__doc__)
    add_device_arg(parser)
    add_runtime_args(parser)
    table, check, hardware = (parser.groups[name] for name in ('latency', 'check', 'hardware'))
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
    table.add_argument(
        '--img_size',
        type=image_size,
        help="height and width of the input in pixels; default: 224; with --check the table's",
    )
    table.add_argument(
        '--num_classes', type=class_count, help="classes of the networks; default: 1000; with --check the table's"
    )
    table.add_argument('--budget', type=number(float, 5), default=105.0, help='seconds to measure')
    parser.groups['output'].add_argument(
        '--save_path',
        metavar='FILE',
        help='table to write; default: latency_pkl/<metric>_<device, runtime>_<size>_bs<batch>.pkl, '
        'with --timings latency_<folder>_<csv>_<size>.pkl',
    )
    table.add_argument('--seed', type=count(0), default=2, help='seed of the random networks')
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
    add_kit_args(parser)
    args = parser.parse_args(argv)
    refuse_unused(parser, args)
    return args


def add_kit_args(parser):
    """Add flags of networks that are timed on another device."""
    kit = parser.groups['kit']
    kit.add_argument(
        '--kit',
        metavar='DIR',
        help='write networks to time on another device, to DIR and DIR.zip; with --timings: '
        'the kit that was timed, if the timings are not in its folder',
    )
    kit.add_argument('--configs', nargs='+', metavar='CONFIG', help='with --kit: these networks, not random ones')
    kit.add_argument('--width_divisor', type=count(), help=f'of the widths in a --kit; default: {WIDTH_DIVISOR}')
    kit.add_argument('--timings', metavar='CSV', help='make a table from the times of the networks of a kit')
    kit.add_argument('--note', help='with --timings: name of the device; default: as the timings name it')


def refuse_unused(parser, args):
    """End with one line if a flag would not be used."""
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    job = next((name for name in UNUSED if name in given), None)
    for name, partner in PARTNERS.items():
        if name in given and job != partner:
            remedy = f'leave it out with --{job}' if job else f'give --{partner} too'
            parser.error(f'--{name} is of --{partner}: {remedy}')
    for name in UNUSED.get(job, ()):
        if name in given:
            parser.error(f'--{name} is not used with --{job}: leave one of them out')


def counted(args):
    """Make a table of MACs or parameters in millions: (base, curves, meta)."""
    what = 'macs' if args.metric == 'flops' else args.metric
    table = counted_table(what, args.img_size, args.num_classes, SPACE)
    return table.base, table.curves, table.meta


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
        print(undisturbed_line(100 * undisturbed, engine))
    else:
        print(host_report([one.host for one in measured], args.launch, undisturbed))
    mean, worst, bias = errors_of(pairs)
    noise = 100 * np.mean([one.error for one in measured])
    print(f'Standard error of a measured latency: {noise:.2f} %, which is part of the errors')
    print(f'{len(pairs)} networks: mean error {mean:.2f} %, worst {worst:.2f} %, bias {bias:+.2f} %')
    return mean <= args.tolerance


def make_kit(args, configs):
    """Write a kit of random networks, or of given ones: `configs` by path."""
    divisor = args.width_divisor or WIDTH_DIVISOR
    check_divisor(divisor, SPACE)
    if configs:
        networks = {REFERENCE: reference_config(args.num_classes, SPACE)}
        for path, config in configs.items():
            name = Path(path).name.removesuffix('.config')
            if name in networks:
                raise BadInput(f'--configs: two networks are named {name}; rename one')
            networks[name] = config
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
        'opset': OPSET,
        'seed': args.seed,
    }
    size = write_kit(args.kit, networks, settings, held_back)
    print(f'{args.kit}.zip: {len(networks)} networks, {size / 1e6:.1f} MB. On the device: python time_networks.py')


def table_of_timings(args):
    """Write the table of a kit's times."""
    timings = read_timings(args.timings)
    kit = read_kit(args.kit or Path(args.timings).parent)
    csv = Path(args.timings).absolute()
    path = args.save_path or f'latency_pkl/latency_{csv.parent.name}_{csv.stem}_{kit.settings["img_size"]}.pkl'
    check_target(path, '--save_path', [args.timings])
    fit, meta = timed_table(timings, kit, SPACE, args.note)
    if warning := warn_of_errors(meta):
        meta['warning'] = warning
    save_table(fit.base, fit.curves, meta | {'metric': 'latency', 'date': time.strftime('%Y-%m-%d')}, path)
    print(f'{path}: {len(fit.curves)} block shapes, base {fit.base:.4f} ms, of {meta["device"]}')
    if warning:
        print(warning)


def main(args):
    """Make a table, check one, or write a kit."""
    start = time.monotonic()
    configs = {path: load_config(path) for path in args.configs or ()}
    if configs:
        known = [(config.meta.img_size, path) for path, config in configs.items()]
        args = with_flags(args, img_size=settle('--img_size', args.img_size, known, USUAL_SIZE))
    args = with_flags(args, img_size=args.img_size or (table_size(args.check) if args.check else None) or USUAL_SIZE)
    table = load_table(args.check, args.img_size, SPACE) if args.check else None
    classes = table.setting('num_classes', USUAL_CLASSES) if table else USUAL_CLASSES
    args = with_flags(args, num_classes=args.num_classes or classes)
    if args.timings:
        table_of_timings(args)
        return
    if args.kit:
        make_kit(args, configs)
        return
    measures = args.metric == 'latency'
    device = pick_device(args.device) if measures else torch.device('cpu')
    engine = engine_of_table(table.meta if table else {}, args.runtime, args.provider, device)
    if not measures and args.runtime:
        raise BadInput(f'--runtime {args.runtime}: only for a table that is measured; leave it out')
    if args.launch and engine.clock.type != 'cuda':
        raise BadInput(f'--launch {args.launch}: only for times that torch measures on a GPU; leave it out')
    usual = 32 if device.type == 'cuda' else 1
    launch = 'queued' if engine.clock.type == 'cuda' else 'eager'
    args = with_flags(
        args,
        batch_size=args.batch_size or (table.setting('batch_size', usual) if table else usual),
        threads=args.threads or (table.setting('threads', 1) if table else 1),
        launch=args.launch or (launch_of(table, engine.clock) if table else launch),
        tf32=args.tf32 if args.tf32 is not None else tf32_of(table) if table else True,
    )
    torch.set_num_threads(args.threads)
    set_tf32(args.tf32)
    if table:
        if not check(table, args, engine):
            sys.exit(1)
        return
    of = '_'.join(filter(None, (device.type, args.runtime)))
    path = args.save_path or f'latency_pkl/{args.metric}_{of}_{args.img_size}_bs{args.batch_size}.pkl'
    check_target(path, '--save_path')
    base, curves, meta = measured_table(args, engine) if measures else counted(args)
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
