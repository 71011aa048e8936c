"""Print networks side by side: target, predicted and measured latency, size, and top-1 of those that were trained.

    python -m models.summary a.config b.config --runs checkpoints/eval-<time>-try

Latencies are those in the configs, as the parser wrote them; top-1 is the best of a training's metrics.jsonl.
"""

from pathlib import Path

import tools.needed  # noqa: F401  # isort: skip
from models.config import load_config
from models.describe import describe_network
from models.search_space import SPACE
from tools.options import USUAL_SIZE, Parser, run_script
from tools.run import read_run


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = Parser(__doc__)
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='a model.config')
    parser.add_argument('--runs', nargs='+', default=[], metavar='FOLDER', help='run folders of their trainings')
    return parser.parse_args(argv)


def figures_of(config, best):
    """Return the rows of a network's column, as texts by name; those that are not known are left out.

    Args:
        best: top-1 in % of the trained networks, by their blocks.
    """
    meta = config.meta
    network = describe_network(config, meta.img_size or USUAL_SIZE, SPACE)
    rows = {}
    if meta.target:
        rows['asked'] = f'{meta.target:.3f} {meta.unit}'
    if meta.predicted:
        rows['predicted'] = f'{meta.predicted:.3f} {meta.unit}'
    if meta.measured:
        rows['measured'] = f'{meta.measured:.3f} ms'
    if meta.measured and meta.target and meta.unit == 'ms':
        rows['off'] = f'{100 * (meta.measured / meta.target - 1):+.1f} %'
    rows['MACs'] = f'{network["macs"]:.2f} M'
    rows['parameters'] = f'{network["params"]:.2f} M'
    top1 = best.get(str(config.stages))
    if top1 is not None:
        rows['top-1'] = f'{top1:.1f} %'
    return rows


def main(args):
    """Print a column per network."""
    best = {}
    for folder in args.runs:
        ends = read_run(folder).of('end')
        if ends:
            best[str(load_config(Path(folder) / 'model.config').stages)] = ends[-1]['best_top1']
    columns = [figures_of(load_config(path), best) for path in args.configs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    print(f'{"":12}' + ''.join(f'{Path(path).stem:>16}' for path in args.configs))
    for name in names:
        print(f'{name:12}' + ''.join(f'{column.get(name, "-"):>16}' for column in columns))


if __name__ == '__main__':
    run_script(main, get_args())
