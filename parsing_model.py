"""Turn a searched model into a network config, and print its size, MACs and latency.

    python parsing_model.py --model_path checkpoints/search-<time>-try/searched_model_90.pth.tar \\
        --save_path model.config --lookup_path latency_pkl/latency_gpu.pkl --print_lat
    python parsing_model.py --config_path models/zoo/tf_nas_a.config --num_classes 10 --save_path model.config

The most probable network of a search that meets a target; several targets; and corrected by its measured time:

    python parsing_model.py --model_path searched.pth.tar --lookup_path table.pkl --target_lat 12 15 18
    python parsing_model.py --model_path searched.pth.tar --lookup_path table.pkl --target_lat 60% --fit_measured
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dataset.images import MEAN, STD
from dataset.lists import parse_list
from dataset.loaders import USUAL_SIZE
from dataset.splits import training_flags
from latency_pkl.sampling import build_network, launch_of, standard_of
from latency_pkl.timing import ROUNDS, host_note, measure_latency, pool_timings
from models.config import build_config, dump_config
from models.describe import count_mult_adds, count_params
from models.elasticity import fit_widths
from models.latency import device_note, load_table
from models.model_eval import NetworkEval
from models.parsing import is_config_file, load_architecture, load_search_checkpoint, mask_widths, search_flags
from models.search_space import SPACE
from models.table_files import table_size
from models.targeting import most_probable
from tools.distributed import pick_device
from tools.environment import device_name
from tools.errors import BadInput
from tools.files import check_target, write_text
from tools.next_step import batch_for, changed, shown, suggest
from tools.options import (
    DEFAULT_TABLE,
    RECIPE_BATCH,
    Parser,
    add_arch_args,
    add_device_arg,
    add_size_arg,
    class_count,
    count,
    project_file,
    run_script,
)
from tools.settle import settle, with_flags

MEASURED_ROUNDS = 4
MEASURED_CLOSE = 0.005


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = Parser(__doc__)
    add_arch_args(parser)
    parser.add_argument('--save_path', help='config file to write; default: model.config, none for a --config_path')
    parser.add_argument(
        '--lookup_path', help=f'latency table; default: that of the search or the config, else {DEFAULT_TABLE}'
    )
    parser.add_argument('--print_lat', action='store_true', help='print latencies: of the table, and measured')
    parser.add_argument('--target_lat', nargs='+', help='in ms, or shares such as 60%%; one config for each')
    parser.add_argument('--fit_measured', action='store_true', help='correct the fit by the measured time')
    parser.add_argument('--width_divisor', type=count(), help='with --target_lat: widths are multiples of it')
    parser.add_argument('--num_classes', type=class_count, help='default: those of the search or the config, else 1000')
    add_size_arg(parser, 'of the search or the config')
    parser.add_argument(
        '--threads', type=count(1, 1024), help="CPU threads of measured latencies; default: the table's, or 1"
    )
    parser.add_argument(
        '--rounds',
        type=count(),
        help='times that a network is built and timed for one latency, up to twice as many if they differ much;'
        f' default: {ROUNDS}',
    )
    add_device_arg(parser)
    args = parser.parse_args(argv)
    if args.rounds and not (args.print_lat or args.fit_measured):
        parser.error(f'--rounds {args.rounds} is of measured latencies: give --print_lat or --fit_measured too')
    if args.width_divisor and not args.target_lat:
        parser.error(f'--width_divisor {args.width_divisor} is of a fit: give --target_lat too')
    return args


def names_config(args):
    """Return whether the network is given as a config, not as a searched model."""
    return bool(args.config_path) or is_config_file(args.model_path)


def fit(state, widths, table, target, num_classes, divisor):
    """Return the most probable network that meets a latency in the table: (architecture, config, that latency)."""
    arch = most_probable(state, table, SPACE, target)
    config = build_config(arch, fit_widths(arch, widths, table, SPACE, target, divisor), num_classes, SPACE)
    return arch, config, table.of_config(config)


def fit_to_clock(state, widths, table, target, num_classes, args, device):
    """`fit`, corrected by the measured time of the network until that meets the target; prints each round.

    Networks of one architecture take the same time relative to the table, up to noise. So their timings are pooled, and
    after a timing that does not fit with its pool, the network is timed again. Returns the network whose pooled latency
    is nearest to the target, standard error included.
    """
    batch_size = table.setting('batch_size', 32 if device.type == 'cuda' else 1)
    launch = launch_of(table, device)
    standard = standard_of(table, batch_size, device, launch)
    least, _, most = table.reach(SPACE)
    aim, timed = target, {}
    for number in range(1, 2 * MEASURED_ROUNDS + 1):
        arch, config, predicted = fit(state, widths, table, aim, num_classes, args.width_divisor)
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


def fitted_configs(args, paths, found, table, device):
    """Yield (path, config) for each target, with the meta of `found`."""
    if names_config(args):
        raise BadInput('--target_lat needs a searched model (--model_path searched_model_NN.pth.tar), not a config')
    state, masks = load_search_checkpoint(args.model_path, SPACE)
    widths, targets = mask_widths(masks), [table.target(text, SPACE) for text in args.target_lat]
    num_classes = found.classifier.out_features
    for path, text, target in zip(paths, args.target_lat, targets, strict=True):
        print(f'Target: {target:.4f} {table.unit}')
        if args.fit_measured:
            config = fit_to_clock(state, widths, table, target, num_classes, args, device)
        else:
            config = fit(state, widths, table, target, num_classes, args.width_divisor)[1]
        yield path, replace(config, meta=replace(found.meta, target=target, target_given=text, unit=table.unit))


def config_paths(save_path, targets):
    """Return the path of each target's config: `save_path`, or for several targets such as model_20pc.config."""
    if not save_path or len(targets or ()) < 2:
        return [save_path]
    path = Path(save_path)
    return [path.with_name(f'{path.stem}_{text.replace("%", "pc")}{path.suffix}') for text in targets]


def report(path, config, table, args, device):
    """Write one config if there is a path for it, and print its size and latencies. Returns it, with these."""
    if table:
        config = replace(config, meta=replace(config.meta, predicted=table.of_config(config), unit=table.unit))
    if path:
        write_text(path, dump_config(config))
        print(f'Config: {path}')
    net, meta = NetworkEval(config), config.meta
    print(f'Params: {count_params(net):.6f} M')
    print(f'FLOPs: {count_mult_adds(net, args.img_size):.2f} M')
    if table:
        given = f' (given as {meta.target_given})' if meta.target_given else ''
        target = f'; target {meta.target:.4f} {table.unit}{given}' if meta.target else ''
        print(f'Lat_LUT: {meta.predicted:.4f} {table.unit}, predicted by {shown(args.lookup_path)}{target}')
    if args.print_lat:
        places = [('GPU', device, 32), ('GPU', device, 1)] if device.type == 'cuda' else []
        for number, (name, place, batch_size) in enumerate([*places, ('CPU', torch.device('cpu'), 1)]):
            launch = launch_of(table, place)
            standard = standard_of(table, batch_size, place, launch)
            build = partial(build_network, config, place, 0)
            measured = measure_latency(build, batch_size, args.img_size, place, standard, args.rounds, launch)
            print(f'Lat_{name} bs={batch_size}: {measured}{host_note(measured, launch)}, {measured.reference}')
            if number == 0:
                where = f'{device_name(place)}, batch {batch_size}'
                config = replace(config, meta=replace(meta, measured=measured.ms, measured_on=where))
        if path:
            write_text(path, dump_config(config))


def settle_flags(args, found, is_config):
    """Return the flags with what the search or config has, the table if it is needed, and the meta of the network."""
    source, meta = args.model_path or args.config_path, found.meta
    lookup_path = args.lookup_path or meta.table or DEFAULT_TABLE
    needed = args.print_lat or args.target_lat
    if needed and lookup_path == meta.table and not Path(lookup_path).is_file():
        raise BadInput(f'{lookup_path}, the latency table of {source}, is not there; name one with --lookup_path')
    if needed and meta.table and Path(lookup_path).resolve() != Path(meta.table).resolve():
        print(f'warning: --lookup_path is {lookup_path}, {source} has {meta.table}')
    path = project_file(lookup_path, DEFAULT_TABLE)
    known = [(meta.img_size, source), (table_size(path) if needed else None, lookup_path)]
    is_known = args.img_size or any(size for size, _ in known)
    img_size = settle('--img_size', args.img_size, known, USUAL_SIZE, print)
    if is_known:
        meta = replace(meta, img_size=img_size, mean=meta.mean or MEAN, std=meta.std or STD)
    if not is_config and not args.num_classes:
        print(f'--num_classes {found.classifier.out_features}: from {source}')
    args = with_flags(args, lookup_path=lookup_path, img_size=img_size, rounds=args.rounds or ROUNDS)
    args = with_flags(args, width_divisor=args.width_divisor or 1)
    table = load_table(path, img_size, SPACE) if needed else None
    return args, table, replace(meta, table=str(Path(path).absolute())) if table else meta


def suggest_training(path, args):
    """Print the command that trains the network of a config, if the search's images are still there."""
    if names_config(args):
        return
    folder = Path(args.model_path).absolute().parent
    flags = search_flags(args.model_path)
    images = training_flags(flags, folder)
    if not images:
        return
    images['config_path'] = Path(path)
    if 'train_list' in images:
        batch = batch_for(len(parse_list(images['train_list'])), RECIPE_BATCH)
        images |= {'batch_size': batch, 'lr_scale': 'linear'} if batch < RECIPE_BATCH else {}
    kept = {name: flags.get(name, usual) for name, usual in (('save', './checkpoints'), ('note', 'try'))}
    kept = {name: value for name, value in kept.items() if value not in ('./checkpoints', 'try')}
    suggest('train it', 'train_eval.py', {**images, **kept, **changed(args, device='auto')})


def main(args):
    """Read, fit if a target is given, write, print."""
    device = pick_device(args.device)
    is_config = names_config(args)
    save_path = args.save_path or (None if is_config else 'model.config')
    if args.target_lat and len(set(args.target_lat)) < len(args.target_lat):
        raise BadInput(f'--target_lat {" ".join(args.target_lat)}: a target is there twice; give each once')
    if args.fit_measured and not args.target_lat:
        raise BadInput('--fit_measured needs a --target_lat')
    paths = config_paths(save_path, args.target_lat)
    found = load_architecture(args.model_path or args.config_path, args.num_classes, SPACE)
    found = found.with_classes(args.num_classes) if args.num_classes else found
    for path in filter(None, paths):
        check_target(path, '--save_path', [args.lookup_path, found.meta.table, None if is_config else args.model_path])
    args, table, meta = settle_flags(args, found, is_config)
    found = replace(found, meta=meta)
    if args.fit_measured and table.unit != 'ms':
        raise BadInput(f'--fit_measured: {args.lookup_path} counts {table.unit}, not ms')
    if table and (note := device_note(table, args.lookup_path, device_name(device))):
        print(note)
    torch.set_num_threads(args.threads or (table.setting('threads', 1) if table else 1))
    configs = fitted_configs(args, paths, found, table, device) if args.target_lat else [(save_path, found)]
    for path, config in configs:
        report(path, config, table, args, device)
    if save_path:
        suggest_training(paths[0], args)


if __name__ == '__main__':
    run_script(main, get_args())
