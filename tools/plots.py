"""Draw the pictures and the report of a run from its metrics.jsonl, or compare runs.

    python -m tools.plots checkpoints/search-<time>-try                 (writes plots/ and report.html there)
    python -m tools.plots RUN_A RUN_B RUN_C --out comparison            (accuracy against latency and multiply-adds)

Needs neither images nor a GPU; may be run while the run goes on.
"""

import io
from collections.abc import Callable
from pathlib import Path

from tools.checkpoint import write_atomic, write_text
from tools.metrics import read_run
from tools.options import Parser, run_script


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='a run folder, or a metrics.jsonl')
    parser.add_argument('--out', help="folder of the pictures; default: the run's, or comparison")
    return parser.parse_args()


def draw_run(path: str | Path, out: str | Path | None = None) -> list[Path]:
    """Write `plots/*.png`, `plots/*.svg` and `report.html` of a run; returns what was written.

    Args:
        path: a run folder or its metrics.jsonl.
        out: where to; by default the run's folder.

    Raises:
        BadInput: see `read_run`.
    """
    from tools.figures import figures_of
    from tools.report import make_report

    run = read_run(path)
    folder = Path(out) if out else Path(path) if Path(path).is_dir() else Path(path).parent
    written, pictures = [], {}
    for name, (caption, draw) in figures_of(run).items():
        paths, svg = save_figure(draw, folder / 'plots' / name)
        written += paths
        pictures[name] = (caption, svg)
    write_text(folder / 'report.html', make_report(run, pictures))
    return [*written, folder / 'report.html']


def save_figure(draw: Callable, stem: Path) -> tuple[list[Path], bytes]:
    """Write what `draw()` draws as `<stem>.png` and `<stem>.svg`; returns both paths and the bytes of the SVG."""
    import matplotlib

    from tools.figures import STYLE

    stem.parent.mkdir(parents=True, exist_ok=True)
    paths, svg = [], io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = draw()
        figure.savefig(svg, format='svg', metadata={'Date': None})
        png = io.BytesIO()
        figure.savefig(png, format='png')
    for suffix, buffer in (('.png', png), ('.svg', svg)):
        paths.append(stem.with_name(stem.name + suffix))
        write_atomic(paths[-1], lambda f, buffer=buffer: f.write(buffer.getvalue()))
    return paths, svg.getvalue()


def draw_at_end(folder: Path, log: Callable[..., None]) -> None:
    """`draw_run` at the end of a run, which a picture that cannot be drawn must not cost: then one line of the log."""
    try:
        written = draw_run(folder)
    except Exception as e:
        log('no pictures: %s: %s; python -m tools.plots %s draws them', type(e).__name__, e, folder)
    else:
        log('pictures: %s; report: %s', folder / 'plots', written[-1])


def main(args):
    """Draw one run, or compare several."""
    if len(args.runs) == 1:
        written = draw_run(args.runs[0], args.out)
    else:
        from tools.compare import compare_runs

        written = compare_runs([read_run(path) for path in args.runs], Path(args.out or 'comparison'))
    for path in written:
        print(path)


if __name__ == '__main__':
    run_script(main, get_args())
