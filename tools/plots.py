"""Draw the pictures and the report of a run from its metrics.jsonl, or compare runs in a table.

    python -m tools.plots checkpoints/search-<time>-try
    python -m tools.plots RUN_A RUN_B RUN_C --out comparison

Needs neither images nor a GPU, and also works during the run.
"""

import base64
import csv
import io
import json
import logging
from collections.abc import Callable
from html import escape
from pathlib import Path

import tools.needed  # noqa: F401  # isort: skip
from tools.checkpoint import HARMLESS
from tools.errors import BadInput
from tools.files import write_atomic, write_text
from tools.options import Parser, run_script
from tools.run import Run, read_run

log = logging.getLogger('tf-nas')

CSS = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #111; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ccc; }
img { max-width: 100%; height: auto; } figure { margin: 1em 0; } figcaption { color: #444; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 2px 10px 2px 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #888; } .wide { overflow-x: auto; }
"""
LEFT_OUT = {'kind', 'time', 'ops', 'exits', 'widths', 'arch', 'network'}  # entries that the table of epochs leaves out
COLUMNS = {
    'kernel': 'kernel (pixels)', 'stride': 'stride', 'size': 'input size (pixels)', 'in': 'input channels',
    'mid': 'mid channels', 'out': 'output channels', 'se': 'SE channels', 'act': 'activation', 'macs': 'MACs (M)',
    'latency': 'latency',
}  # fmt: skip


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = Parser(__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='a run folder')
    parser.groups['output'].add_argument(
        '--out', metavar='FOLDER', help='folder of the results; default: that of the run, or comparison for several'
    )
    return parser.parse_args(argv)


# ---------------------------------------------------------------- one run


def draw_run(path: str | Path, out: str | Path | None = None) -> list[Path]:
    """Write `plots/*.png`, `plots/*.svg` and `report.html` of a run, and return their paths.

    Args:
        path: a run folder or its metrics.jsonl.
        out: output folder; by default that of the run.

    Raises:
        BadInput: see `read_run`.
    """
    from tools.figures import figures_of  # matplotlib takes a second to import

    run = read_run(path)
    folder = Path(out) if out else Path(path) if Path(path).is_dir() else Path(path).parent
    written, parts = [], []
    for name, (caption, draw) in figures_of(run).items():
        paths, svg = save_figure(draw, folder / 'plots' / name)
        written += paths
        source = f'data:image/svg+xml;base64,{base64.b64encode(svg).decode()}'
        parts.append(f'<h2>{name.capitalize()}</h2><figure><img alt="{escape(caption)}" src="{source}">')
        parts.append(f'<figcaption>{escape(caption)}</figcaption></figure>')
    write_text(folder / 'report.html', page(run.name, [*parts, *tables(run)]))
    return [*written, folder / 'report.html']


def save_figure(draw: Callable, stem: Path) -> tuple[list[Path], bytes]:
    """Write the figure of `draw()` as `<stem>.png` and `<stem>.svg`; return both paths and the bytes of the SVG."""
    import matplotlib

    from tools.figures import STYLE

    stem.parent.mkdir(parents=True, exist_ok=True)
    png, svg = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = draw()
        figure.savefig(svg, format='svg', metadata={'Date': None})
        figure.savefig(png, format='png')
    paths = [stem.with_name(f'{stem.name}.png'), stem.with_name(f'{stem.name}.svg')]
    write_atomic(paths[0], lambda f: f.write(png.getvalue()))
    write_atomic(paths[1], lambda f: f.write(svg.getvalue()))
    return paths, svg.getvalue()


def draw_at_end(folder: Path) -> None:
    """Call `draw_run` at the end of a run. An error of drawing is only logged: the results of the run are safe."""
    log.info('drawing the pictures and the report')
    try:
        written = draw_run(folder)
    except Exception as e:
        log.warning('no pictures: %s: %s; python -m tools.plots %s draws them', type(e).__name__, e, folder)
    else:
        log.info('pictures: %s; report: %s', folder / 'plots', written[-1])


def page(title: str, parts: list[str]) -> str:
    """Return an HTML page that needs no server."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{CSS}</style>'
    body = f'<h1>{escape(title)}</h1>{"".join(parts)}'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def tables(run: Run) -> list[str]:
    """Return the tables of a run: its blocks, epochs, flags and environment."""
    from tools.figures import network_of, with_measured

    parts, network = [], network_of(run)
    if network:
        network = with_measured(run, network)
        names = [name for name in COLUMNS if network['blocks'][0][name] is not None]
        rows = [[row['place'], *(row[name] for name in names)] for row in network['blocks']]
        titles = [COLUMNS[name] if name != 'latency' else f'latency ({network["unit"]})' for name in names]
        parts += ['<h2>Blocks</h2>', table(['block', *titles], rows)]
    epochs = [_flat({key: line[key] for key in line if key not in LEFT_OUT}) for line in run.of('epoch')]
    names = list(dict.fromkeys(name for row in epochs for name in row))
    done = 'finished' if run.of('end') else 'not finished'
    parts += [f'<h2>Epochs ({done})</h2>', table(names, [[row.get(name) for name in names] for row in epochs])]
    measured = [(line['device'], line['batch_size'], line['ms']) for line in run.of('latency')]
    if measured:
        parts += ['<h2>Measured latency</h2>', table(['device', 'batch size', 'ms'], measured)]
    for title, values in (('Flags', run.header['flags']), ('Environment', run.header['environment'])):
        parts += [f'<h2>{title}</h2>', table(['name', 'value'], list(values.items()))]
    return parts


def _flat(values: dict, prefix: str = '') -> dict:
    """Return the values of nested dicts by the joined names of their keys."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f'{prefix}{key} ')
        else:
            found[f'{prefix}{key}'] = value
    return found


def table(names: list[str], rows: list) -> str:
    """Return a table in HTML."""
    lines = [''.join(f'<th>{escape(name)}</th>' for name in names)]
    for row in rows:
        texts = [f'{value:.5g}' if isinstance(value, float) else str('' if value is None else value) for value in row]
        lines.append(''.join(f'<td>{escape(text)}</td>' for text in texts))
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


# ---------------------------------------------------------------- several runs


def compare(paths: list[str], out: Path) -> tuple[list[str], list[list[str]]]:
    """Write `results.csv` and `report.html` of searches and trainings; return the names of columns, and a row per run.

    Raises:
        BadInput: a run has no epoch yet.
    """
    runs = [read_run(path) for path in paths]
    flags = [run.header['flags'] for run in runs]
    shared = set.intersection(*map(set, flags)) - HARMLESS - {'target_lat'}
    differ = sorted(name for name in shared if any(own[name] != flags[0][name] for own in flags))
    rows = []
    for path, run in zip(paths, runs, strict=True):
        if not run.of('epoch'):
            raise BadInput(f'{run.name}: has no epoch yet; compare runs with an epoch done')
        own = {'run': run.name, 'task': run.header['task']}
        own |= {name: run.header['flags'][name] for name in differ}
        rows.append(own | results(run, Path(path)))
    names = list(rows[0])
    texts = [[_text(row[name]) for name in names] for row in rows]
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator='\n').writerows([names, *texts])
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / 'results.csv', buffer.getvalue())
    write_text(out / 'report.html', page('Comparison', [table(names, texts)]))
    return names, texts


def results(run: Run, path: Path) -> dict[str, object]:
    """Return the figures of a run by the names of their columns; None for what it lacks.

    Target and predicted latency are by the table, in `unit`. What a training's network was made for is in the config of
    its folder. The top-1 is the best of a training, or the last validation of a search, on Gumbel paths.
    """
    from tools.figures import network_of

    network, about = network_of(run), run.header.get('latency', {})
    config = (path if path.is_dir() else path.parent) / 'model.config'
    meta = {'target': about.get('target'), 'predicted': network['latency'], 'unit': about.get('unit')}
    if run.header['task'] == 'training' and config.is_file():
        meta = json.loads(config.read_text()).get('meta', {})
    measured = [line['ms'] for line in run.of('latency')] or [meta.get('measured')]
    target, got = meta.get('target'), measured[-1] if meta.get('unit') == 'ms' else meta.get('predicted')
    top1 = [line['val']['top1'] or 0.0 for line in run.of('epoch') if line.get('val')] or [None]
    return {
        'target': target,
        'predicted': meta.get('predicted'),
        'unit': meta.get('unit'),
        'measured_ms': measured[-1],
        'off_percent': 100 * (got / target - 1) if got and target else None,
        'macs_m': network['macs'],
        'params_m': network['params'],
        'top1_percent': top1[-1] if run.header['task'] == 'search' else max(top1),
    }


def _text(value: object) -> str:
    if isinstance(value, float):
        return f'{value:.5g}'
    if isinstance(value, list):
        return ' '.join(map(str, value))
    return '' if value is None else str(value)


def main(args):
    """Draw one run, or compare several."""
    if len(args.runs) == 1:
        for path in draw_run(args.runs[0], args.out):
            print(path)
        return
    out = Path(args.out or 'comparison')
    names, rows = compare(args.runs, out)
    for column in zip(names, *rows, strict=True):  # a line per figure, a column per run
        if any(column[1:]):
            print(''.join(f'{text:24}' for text in column).rstrip())
    print(f'Table: {out / "report.html"}, {out / "results.csv"}')


if __name__ == '__main__':
    run_script(main, get_args())
