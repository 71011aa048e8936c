"""Pictures and report of a run, drawn from its metrics.jsonl."""

import io
import logging
from collections.abc import Callable
from pathlib import Path

from tools.files import write_atomic, write_text
from tools.run import read_run

log = logging.getLogger('tf-nas')


def draw_run(path: str | Path, out: str | Path | None = None) -> list[Path]:
    """Write `plots/*.png`, `plots/*.svg` and `report.html` of a run, and return their paths.

    Args:
        path: a run folder or its metrics.jsonl.
        out: output folder; by default that of the run.

    Raises:
        BadInput: see `read_run`.
    """
    from tools.report.figures import figures_of
    from tools.report.page import make_report

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
    """Write the figure of `draw()` as `<stem>.png` and `<stem>.svg`; return both paths and the bytes of the SVG."""
    import matplotlib

    from tools.report.figures import STYLE

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


def draw_at_end(folder: Path) -> None:
    """Call `draw_run` at the end of a run. An error of drawing is only logged: the results of the run are safe."""
    log.info('drawing the pictures and the report')
    try:
        written = draw_run(folder)
    except Exception as e:
        log.warning('no pictures: %s: %s; python -m tools.plots %s draws them', type(e).__name__, e, folder)
    else:
        log.info('pictures: %s; report: %s', folder / 'plots', written[-1])
