"""Turn a searched model into a network config, and print its size, MACs and latency.

    python parsing_model.py --print_lat \\
        --model_path checkpoints/search-<time>-try/searched_model_90.pth.tar \\
        --lookup_path latency_pkl/latency_gpu.pkl --save_path model.config
    python parsing_model.py --config_path models/zoo/tf_nas_a.config \\
        --num_classes 10 --save_path model.config
    python parsing_model.py --config_path models/zoo/tf_nas_a.config \\
        --width_divisor 8 --save_path aligned.config

The most probable network of a search that meets a target; several targets; and corrected by its measured time:

    python parsing_model.py --model_path searched.pth.tar \\
        --lookup_path table.pkl --target_lat 12 15 18
    python parsing_model.py --model_path searched.pth.tar \\
        --lookup_path table.pkl --target_lat 60% --fit_measured
    python parsing_model.py --model_path searched.pth.tar \\
        --lookup_path phone.pkl --target_lat 15 --timings found.csv

Within a limit on parameters, MACs or another latency; and a random network, to compare with:

    python parsing_model.py --model_path searched.pth.tar \\
        --lookup_path table.pkl --target_lat 20% 40% --limit params=5
    python parsing_model.py --random 1 --num_classes 10 \\
        --lookup_path table.pkl --target_lat 40% --save_path random.config
"""

import logging
from dataclasses import replace
from pathlib import Path

import tools.needed  # noqa: F401  # isort: skip
import torch

from dataset.lists import parse_list, training_flags
from dataset.transforms import MEAN, STD
from latency_pkl.closed_loop import fit_to_clock, fit_to_timings
from latency_pkl.kit import found_networks, read_timings
from latency_pkl.runtimes import engine_of_table, standard_of
from latency_pkl.sampling import launch_of, tf32_of
from latency_pkl.timing import ROUNDS, host_note, measure_latency
from models.config import dump_config, load_config
from models.describe import count_mult_adds, count_params
from models.fitting import Fitter, read_limit
from models.model_eval import NetworkEval
from models.parsing import is_config_file, random_search, read_searched
from models.search_space import SPACE
from models.tables import compare_table, load_table, table_size
from models.targeting import Target
from tools.chain import changed, settle, shown, suggest, with_flags
from tools.distributed import pick_device
from tools.environment import device_name, set_tf32
from tools.errors import BadInput
from tools.files import check_target, write_text
from tools.options import (
    DEFAULT_TABLE,
    RECIPE_BATCH,
    USUAL_SIZE,
    Parser,
    add_arch_args,
    add_device_arg,
    add_runtime_args,
    add_size_arg,
    class_count,
    count,
    project_file,
    run_script,
)

log = logging.getLogger('tf-nas')

UNMEASURED = {'measured': None, 'measured_on': None}  # of a meta if the network or its latency is another one


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = Parser(__doc__)
    sources, network, output = add_arch_args(parser), parser.groups['network'], parser.groups['output']
    sources.add_argument('--random', metavar='SEED', type=count(0), help='a random architecture, to compare with')
    network.add_argument('--num_classes', type=class_count, help='default: as the search or the config has, else 1000')
    add_size_arg(parser, 'of the search or the config')
    output.add_argument('--save_path', metavar='FILE', help='default: model.config, none for a --config_path')
    add_latency_args(parser)
    add_device_arg(parser)
    add_runtime_args(parser)
    args = parser.parse_args(argv)
    if args.rounds and not (args.print_lat or args.fit_measured):
        parser.error(f'--rounds {args.rounds} is of measured latencies: give --print_lat or --fit_measured too')
    for name in ('fit_measured', 'timings', 'limit'):
        if getattr(args, name) and not args.target_lat:
            parser.error(f'--{name} needs a --target_lat')
    if args.timings and args.fit_measured:
        parser.error('--timings corrects the fit by times that are there: leave out --fit_measured')
    if args.target_lat and len(set(args.target_lat)) < len(args.target_lat):
        parser.error(f'--target_lat {" ".join(args.target_lat)}: a target is there twice; give each once')
    if odd := [text for text in args.target_lat or () if '/' in text]:
        parser.error(f'--target_lat {odd[0]}: expected a number, or a share such as 60%')
    if args.target_lat and names_config(args):
        parser.error('--target_lat needs a searched model (--model_path searched_model_NN.pth.tar), not a config')
    return args


def add_latency_args(parser):
    """Add flags of the table, of targets and of timing."""
    latency = parser.groups['latency']
    latency.add_argument(
        '--lookup_path', metavar='FILE', help=f'latency table; default: of the search or config, else {DEFAULT_TABLE}'
    )
    latency.add_argument('--print_lat', action='store_true', help='time the network, and print its latencies')
    latency.add_argument(
        '--target_lat', metavar='MS', nargs='+', help='in ms, or shares such as 60%%; a config for each'
    )
    latency.add_argument(
        '--width_divisor', type=count(), help="widths are multiples of it; default with --target_lat: the table's"
    )
    latency.add_argument(
        '--limit', metavar='TABLE=VALUE', nargs='+', default=[], help='at most VALUE in a table, such as params=5 (M)'
    )
    latency.add_argument('--fit_measured', action='store_true', help='correct the fit by the measured time')
    latency.add_argument('--timings', metavar='CSV', help='correct the fit by times of networks that were found before')
    latency.add_argument('--rounds', type=count(), help=f'builds of a network for one latency; default: {ROUNDS}')
    parser.groups['hardware'].add_argument(
        '--threads', type=count(1, 1024), help="CPU threads of measured latencies; default: the table's, or 1"
    )


def names_config(args):
    """Return whether the network is given as a config, not as a searched model or by --random."""
    return bool(args.config_path) or bool(args.model_path) and is_config_file(args.model_path)


def source_of(args):
    """Return where the network comes from, for messages."""
    return args.model_path or args.config_path or f'--random {args.random}'


def config_paths(save_path, targets):
    """Return the path of each target's config: `save_path`, or for several targets such as model_20pc.config."""
    if not save_path or len(targets or ()) < 2:
        return [save_path]
    path = Path(save_path)
    return [path.with_name(f'{path.stem}_{text.replace("%", "pc")}{path.suffix}') for text in targets]


def settle_flags(args, meta, num_classes):
    """Return the flags with what the search or config has, the table if it is needed, and the meta of the network."""
    source = source_of(args)
    lookup_path = args.lookup_path or meta.table or DEFAULT_TABLE
    needed = args.lookup_path or args.print_lat or args.target_lat or args.width_divisor
    if needed and lookup_path == meta.table and not Path(lookup_path).is_file():
        raise BadInput(f'{lookup_path}, the latency table of {source}, is not there; name one with --lookup_path')
    if needed and meta.table and Path(lookup_path).resolve() != Path(meta.table).resolve():
        log.warning('--lookup_path is %s, %s has %s', lookup_path, source, meta.table)
        meta = replace(meta, target=None, target_given=None, **UNMEASURED)  # they hold for the other table
    path = project_file(lookup_path, DEFAULT_TABLE)
    known = [(meta.img_size, source), (table_size(path) if needed else None, lookup_path)]
    img_size = settle('--img_size', args.img_size, known, USUAL_SIZE)
    if args.img_size or any(size for size, _ in known):
        meta = replace(meta.at_size(img_size), mean=meta.mean or MEAN, std=meta.std or STD)
    if not names_config(args) and not args.num_classes:
        log.info('--num_classes %d: from %s', num_classes, source)
    args = with_flags(args, lookup_path=lookup_path, img_size=img_size, rounds=args.rounds or ROUNDS)
    if not needed:
        return args, None, meta
    return args, load_table(path, img_size, SPACE), replace(meta, table=str(Path(path).absolute()))


def fitted_configs(args, paths, searched, found, table, engine):
    """Yield (path, config) for each target, with the meta of `found`."""
    divisor, num_classes = args.width_divisor or table.width_divisor, found.classifier.out_features
    limits = [read_limit(text, args.img_size, num_classes, SPACE) for text in args.limit]
    targets = [Target(table, SPACE, table.target(text, SPACE), divisor) for text in args.target_lat]
    for target in targets:
        target.check()
    timed = found_networks(read_timings(args.timings), table) if args.timings else []
    for path, text, target in zip(paths, args.target_lat, targets, strict=True):
        fit = Fitter(searched.state, searched.widths, target, num_classes, limits)
        print(f'Target: {target.value:.4f} {table.unit}')
        if args.timings:
            config = fit_to_timings(fit, target.value, timed)
        elif args.fit_measured:
            config = fit_to_clock(fit, target.value, engine, args.rounds)
        else:
            arch, config, _ = fit(target.value)
            print(f'Given up in log-probability: {fit.given_up(arch):.4f}')
        for limit in limits:
            total = limit.table.of_config(config)
            print(f'Limit {limit.name}: {total:.4f}, at most {limit.value:.4f} {limit.table.unit}')
        yield path, replace(config, meta=replace(found.meta, target=target.value, target_given=text, unit=table.unit))


def timings_of(table, engine, fitted):
    """Return what is timed: name of the device, engine, batch size.

    The table's batch size is first if the table is of this device, or if the network was `fitted` beside it.
    """
    places = [('GPU', engine, 32), ('GPU', engine, 1)] if engine.device.type == 'cuda' else []
    if engine.runtime == 'torch' or not places:
        places.append(('CPU', replace(engine, device=torch.device('cpu')), 1))
    if fitted or table.is_of(device_name(engine.device)):
        name, _, usual = places[0]
        places.insert(0, (name, engine, table.setting('batch_size', usual)))
    return list(dict.fromkeys(places))


def report(path, config, table, args, engine):
    """Write one config if there is a path for it, and print its size and latencies."""
    meta = config.meta
    if table:
        meta = replace(meta, predicted=table.of_config(config), unit=table.unit)
        config = replace(config, meta=meta)
    if path:
        write_text(path, dump_config(config))
        log.info('Config: %s', path)
    net = NetworkEval(config)
    print(f'Params: {count_params(net):.6f} M')
    print(f'FLOPs: {count_mult_adds(net, args.img_size):.2f} M')
    if table:
        given = f' (given as {meta.target_given})' if meta.target_given else ''
        target = f'; target {meta.target:.4f} {table.unit}{given}' if meta.target else ''
        print(f'Lat_LUT: {meta.predicted:.4f} {table.unit}, predicted by {shown(args.lookup_path)}{target}')
    if args.print_lat:
        config = print_latencies(config, table, args, engine)
        if path:
            write_text(path, dump_config(config))


def print_latencies(config, table, args, engine):
    """Time a network, print its latencies, and return the config with the first of them."""
    for number, (name, place, batch_size) in enumerate(timings_of(table, engine, args.fit_measured)):
        launch = launch_of(table, place.clock)
        standard = standard_of(table, batch_size, place, launch)
        log.info('Timing on the %s, batch %d: usually 15 to 40 s', name, batch_size)
        build = place.build(config, 0, args.img_size, batch_size)
        measured = measure_latency(build, batch_size, args.img_size, place.clock, standard, args.rounds, launch)
        runtime = '' if place.runtime == 'torch' else f' {place.runtime}'
        print(f'Lat_{name} bs={batch_size}{runtime}: {measured}{host_note(measured, launch)}, {measured.reference}')
        if number == 0:
            where = f'{device_name(place.device)}{runtime}, batch {batch_size}'
            config = replace(config, meta=replace(config.meta, measured=measured.ms, measured_on=where))
    return config


def suggest_training(path, flags, args):
    """Log the command that trains the network of a config, if the search's images are still there.

    Args:
        flags: of the search.
    """
    try:
        images = training_flags(flags, Path(args.model_path).absolute().parent)
    except BadInput as e:  # images that are gone are no fault of the config
        log.info('no command to train it: %s', e)
        return
    if not images:
        return
    images['config_path'] = Path(path)
    if 'train_list' in images:
        most = len(parse_list(images['train_list'])) // 8  # at least eight batches per epoch
        batch = 1 << max(most, 2).bit_length() - 1
        if batch < RECIPE_BATCH:
            images |= {'batch_size': batch, 'lr_scale': 'linear'}
    kept = {name: flags[name] for name in ('save', 'note') if flags.get(name) not in (None, './checkpoints', 'try')}
    suggest('train it', 'train_eval.py', {**images, **kept, **changed(args, device='auto')})


def main(args):
    """Read, fit if a target is given, write, print."""
    device, is_config, searched = pick_device(args.device), names_config(args), None
    save_path = args.save_path or (None if is_config else 'model.config')
    paths = config_paths(save_path, args.target_lat)
    if is_config:
        found = load_config(args.model_path or args.config_path)
    else:
        random = args.random is not None
        searched = random_search(args.random, 1000, SPACE) if random else read_searched(args.model_path, SPACE)
        found = searched.config(SPACE)
    found = found.with_classes(args.num_classes) if args.num_classes else found
    num_classes = found.classifier.out_features
    for path in filter(None, paths):
        check_target(path, '--save_path', [args.lookup_path, found.meta.table, None if is_config else args.model_path])
    args, table, meta = settle_flags(args, found.meta, num_classes)
    found, engine = replace(found, meta=meta), None
    set_tf32(tf32_of(table) if table else True)
    torch.set_num_threads(args.threads or (table.setting('threads', 1) if table else 1))
    if table:
        if (args.fit_measured or args.timings) and table.unit != 'ms':
            flag = '--timings' if args.timings else '--fit_measured'
            raise BadInput(f'{flag}: {args.lookup_path} counts {table.unit}, not ms')
        compare_table(table, args.lookup_path, device_name(device), num_classes)
        if args.print_lat or args.fit_measured:
            engine = engine_of_table(table.meta, args.runtime, args.provider, device)
    configs = [(save_path, found)]
    if args.target_lat:
        configs = fitted_configs(args, paths, searched, found, table, engine)
    elif args.width_divisor:
        print('Widths as given:')
        report(None, found, table, args, engine)
        print(f'Widths rounded up to multiples of {args.width_divisor}:')
        rounded = found.rounded_up(args.width_divisor)
        configs = [(save_path, replace(rounded, meta=replace(rounded.meta, **UNMEASURED)))]
    for path, config in configs:
        report(path, config, table, args, engine)
    if save_path and args.model_path and not is_config:
        suggest_training(paths[0], searched.flags, args)


if __name__ == '__main__':
    run_script(main, get_args())
