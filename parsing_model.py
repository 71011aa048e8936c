"""Turn a searched model into a network config, and print its size, MACs and latency.

    python parsing_model.py --model_path checkpoints/search-<time>-try/searched_model_90.pth.tar \\
        --save_path model.config --lookup_path latency_pkl/latency_gpu.pkl --print_lat
    python parsing_model.py --config_path models/zoo/tf_nas_a.config --num_classes 10 --save_path model.config

The most probable network of a search that meets a target; several targets; and corrected by its measured time:

    python parsing_model.py --model_path searched.pth.tar --lookup_path table.pkl --target_lat 12 15 18
    python parsing_model.py --model_path searched.pth.tar --lookup_path table.pkl --target_lat 60% --fit_measured

Within limits in other tables; several targets then also draw what each costs:

    python parsing_model.py --model_path searched.pth.tar --lookup_path table.pkl --target_lat 20% 40% 60% \\
        --limit params=5 --limit phone.pkl=40
"""

from functools import partial
from pathlib import Path

import torch

from latency_pkl.sampling import build_network, launch_of, standard_of
from latency_pkl.timing import ROUNDS, host_note, measure_latency, pool_timings
from models.config import build_config, dump_config
from models.describe import count_mult_adds, count_params
from models.elasticity import fit_widths
from models.latency import load_table
from models.limits import check_reachable, describe_fit, read_limits
from models.model_eval import NetworkEval
from models.parsing import is_config_file, load_architecture, load_search_checkpoint, mask_widths
from models.search_space import SPACE
from models.targeting import most_probable, target_range
from tools.distributed import pick_device
from tools.errors import BadInput
from tools.files import check_target, write_text
from tools.options import (
    DEFAULT_TABLE,
    Parser,
    add_arch_args,
    add_device_arg,
    add_limit_arg,
    class_count,
    count,
    image_size,
    project_file,
    run_script,
)
from tools.report.draw import save_figure

USUAL_CLASSES = 1000
MEASURED_ROUNDS = 4
MEASURED_CLOSE = 0.005


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = Parser(__doc__)
    add_arch_args(parser)
    parser.add_argument('--save_path', help='config file to write; default: model.config, none for a --config_path')
    parser.add_argument('--lookup_path', default=DEFAULT_TABLE, help='latency table')
    parser.add_argument('--print_lat', action='store_true', help='print latencies: of the table, and measured')
    parser.add_argument('--target_lat', nargs='+', help='in ms, or shares such as 60%%; one config for each')
    add_limit_arg(parser)
    parser.add_argument('--fit_measured', action='store_true', help='correct the fit by the measured time')
    parser.add_argument(
        '--width_divisor', type=count(), default=1, help='with --target_lat: widths are multiples of it'
    )
    parser.add_argument('--num_classes', type=class_count, help='default: those of a --config_path, otherwise 1000')
    parser.add_argument('--img_size', type=image_size, default=224, help='input size in pixels')
    parser.add_argument(
        '--threads', type=count(1, 1024), help="CPU threads of measured latencies; default: the table's, or 1"
    )
    parser.add_argument(
        '--rounds',
        type=count(),
        default=ROUNDS,
        help='times that a network is built and timed for one latency; up to twice as many if they differ much',
    )
    add_device_arg(parser)
    return parser.parse_args(argv)


def names_config(args):
    """Return whether the network is given as a config, not as a searched model."""
    return bool(args.config_path) or is_config_file(args.model_path)


def fit(state, widths, table, target, num_classes, divisor, limits=()):
    """Return the most probable network that meets a latency in the table: (architecture, config, that latency)."""
    arch = most_probable(state, table, SPACE, target, divisor, limits)
    fitted = fit_widths(arch, widths, table, SPACE, target, divisor, limits)
    config = build_config(arch, fitted, num_classes, SPACE)
    return arch, config, table.of_config(config)


def fit_to_clock(state, widths, table, target, num_classes, args, device, limits=()):
    """`fit`, corrected by the measured time of the network until that meets the target; prints each round.

    Networks of one architecture take the same time relative to the table, up to noise. So their timings are pooled, and
    after a timing that does not fit with its pool, the network is timed again. Returns the network whose pooled latency
    is nearest to the target, standard error included.
    """
    batch_size = table.setting('batch_size', 32 if device.type == 'cuda' else 1)
    launch = launch_of(table, device)
    standard = standard_of(table, batch_size, device, launch)
    least, most = target_range(table, SPACE, args.width_divisor, limits) if limits else table.reach(SPACE)[::2]
    aim, timed = target, {}
    for number in range(1, 2 * MEASURED_ROUNDS + 1):
        arch, config, predicted = fit(state, widths, table, aim, num_classes, args.width_divisor, limits)
        build = partial(build_network, config, device, number)
        measured = measure_latency(build, batch_size, args.img_size, device, standard, args.rounds, launch)
        timed.setdefault(str(arch), []).append((config, predicted, measured))
        pools = {arch: pool_timings([timing[1:] for timing in timings]) for arch, timings in timed.items()}
        own = pools[str(arch)]
        outlier = '' if own.fits[-1] else ', does not fit with the others'
        note = host_note(measured, launch)
        print(f'Round {number}: predicted {predicted:.4f}, measured {measured}{note}, target {target:.4f} ms{outlier}')
        choices = [
            (abs(pools[arch].ratio * ms / target - 1), arch, one) for arch in timed for one, ms, _ in timed[arch]
        ]
        off, nearest, config = min(choices, key=lambda choice: choice[0] + pools[choice[1]].error)
        pool = pools[nearest]
        rounds = MEASURED_ROUNDS + sum((~one.fits).sum() for one in pools.values())
        if not outlier:
            if pool.fits.sum() > 1 and (off <= MEASURED_CLOSE or number >= rounds):
                break
            aim = min(max(target / own.ratio, least), most)
    print(
        f'Measured latency is within {100 * off:.2f} % of the target, standard error {100 * pool.error:.2f} % '
        f'(mean over {pool.fits.sum() or len(pool.fits)} of {number} rounds)'
    )
    if max(off, pool.error) > MEASURED_CLOSE:
        print(f'This misses the goal of {100 * MEASURED_CLOSE:g} %: timings differed too much, or no width is nearer')
    return config


def fitted_configs(args, save_path, num_classes, table, device, limits):
    """Yield (path, config) for each target. Several targets within limits are drawn."""
    if names_config(args):
        raise BadInput('--target_lat needs a searched model (--model_path searched_model_NN.pth.tar), not a config')
    targets = [table.target(text, SPACE) for text in args.target_lat]
    for target in targets:
        check_reachable(table, SPACE, target, args.width_divisor, limits)
    state, masks = load_search_checkpoint(args.model_path, SPACE)
    path, widths, fits = Path(save_path), mask_widths(masks), []
    for text, target in zip(args.target_lat, targets, strict=True):
        one = path if len(args.target_lat) == 1 else path.with_name(f'{path.stem}_{text}{path.suffix}')
        print(f'Target: {target:.4f} {table.unit}')
        if args.fit_measured:
            config = fit_to_clock(state, widths, table, target, num_classes, args, device, limits)
        else:
            arch, config, _ = fit(state, widths, table, target, num_classes, args.width_divisor, limits)
            fits.append(describe_fit(arch, config, state, table, target, limits, SPACE))
            print(f'Given up in log-probability: {fits[-1]["given_up"]:.4f}')
        yield one, config
    if limits and len(fits) > 1:
        from tools.report.targets import targets_figure

        paths, _ = save_figure(partial(targets_figure, fits, table.unit), path.with_name(f'{path.stem}_targets'))
        print(f'Pictures: {" ".join(map(str, paths))}')


def report(path, config, table, args, device, limits):
    """Write one config if there is a path for it, and print its size and latencies."""
    if path:
        write_text(path, dump_config(config))
        print(f'Config: {path}')
    net = NetworkEval(config)
    print(f'Params: {count_params(net):.6f} M')
    print(f'FLOPs: {count_mult_adds(net, args.img_size):.2f} M')
    if table:
        print(f'Lat_LUT: {table.of_config(config):.4f} {table.unit}')
    for limit in limits:
        total = limit.table.of_config(config)
        verdict = 'at most' if limit.holds(total) else 'above the limit of'
        print(f'Limit {limit.name}: {total:.4f} {limit.table.unit} by the table, {verdict} {limit.value:.4f}')
    if args.print_lat:
        places = [('GPU', device, 32), ('GPU', device, 1)] if device.type == 'cuda' else []
        for name, place, batch_size in [*places, ('CPU', torch.device('cpu'), 1)]:
            launch = launch_of(table, place)
            standard = standard_of(table, batch_size, place, launch)
            build = partial(build_network, config, place, 0)
            measured = measure_latency(build, batch_size, args.img_size, place, standard, args.rounds, launch)
            print(f'Lat_{name} bs={batch_size}: {measured}{host_note(measured, launch)}')


def main(args):
    """Read, fit if a target is given, write, print."""
    device = pick_device(args.device)
    is_config = names_config(args)
    save_path = args.save_path or (None if is_config else 'model.config')
    num_classes = args.num_classes or (None if is_config else USUAL_CLASSES)
    if save_path:
        check_target(save_path, '--save_path', [args.lookup_path, None if is_config else args.model_path])
    lookup_path = project_file(args.lookup_path, DEFAULT_TABLE)
    table = load_table(lookup_path, args.img_size, SPACE) if args.print_lat or args.target_lat else None
    if args.target_lat and len(set(args.target_lat)) < len(args.target_lat):
        raise BadInput(f'--target_lat {" ".join(args.target_lat)}: a target is there twice; give each once')
    if args.fit_measured and not args.target_lat:
        raise BadInput('--fit_measured needs a --target_lat')
    if args.fit_measured and table.unit != 'ms':
        raise BadInput(f'--fit_measured: {args.lookup_path} counts {table.unit}, not ms')
    torch.set_num_threads(args.threads or (table.setting('threads', 1) if table else 1))
    if args.target_lat:
        limits = read_limits(args.limit, args.img_size, num_classes, SPACE)
        configs = fitted_configs(args, save_path, num_classes, table, device, limits)
    else:
        config = load_architecture(args.model_path or args.config_path, num_classes, SPACE)
        limits = read_limits(args.limit, args.img_size, num_classes or config.classifier.out_features, SPACE)
        configs = [(save_path, config.with_classes(num_classes) if num_classes else config)]
    for path, config in configs:
        report(path, config, table, args, device, limits)


if __name__ == '__main__':
    run_script(main, get_args())
