"""Comparison of several runs: a table, a CSV file, and pictures, with published networks beside trainings."""

import csv
import io
from itertools import cycle
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.checkpoint import HARMLESS
from tools.errors import BadInput
from tools.files import write_text
from tools.report.draw import save_figure
from tools.report.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE
from tools.report.page import make_comparison
from tools.run import Run

SETTING = ('device', 'batch_size', 'threads', 'img_size')
"""Settings that measured latencies must share to be drawn on one axis."""

IMAGENET = (1000, 224)
"""Number of classes and input size of the published networks."""

PUBLISHED = (
    ('TF-NAS (paper)', 'o', [
        ('A', 457, 76.87), ('B', 361, 76.28), ('C', 284, 75.15), ('D', 219, 74.19), ('CPU-A', 305, 75.83),
        ('CPU-B', 230, 74.44)
    ]),
    ('FBNet, FBNetV2', 's', [('FBNet-C', 378, 75.2), ('V2-F4', 236, 75.5), ('V2-L2', 419, 77.7)]),
    ('distilled or stronger recipe', '^', [('FBNetV3-A', 357, 79.57), ('FBNetV3-B', 462, 80.21), ('OFA', 595, 80.0)]),
)  # fmt: skip
"""Families: name, marker, (network, M MACs, top-1 on ImageNet in %). Quoted as published, not re-run."""

LEGEND_WIDTH = 88
"""Characters in a line of a legend."""


def compare_runs(runs: list[Run], out: Path) -> list[Path]:
    """Draw the comparisons that the runs allow, tabulate the runs, and return the paths of the files.

    Args:
        runs: searches and trainings.

    Raises:
        BadInput: a run has no epoch yet, or latencies were measured in different settings.
    """
    for run in runs:
        if not run.of('epoch'):
            raise BadInput(f'{run.name}: has no epoch yet; compare runs with an epoch done')
    trainings, searches = ([run for run in runs if run.header['task'] == task] for task in ('training', 'search'))
    timed = [run for run in trainings if run.of('latency')]
    setting = _common_setting(timed) if timed else {}
    figures = {'epochs': lambda: _epochs_figure(trainings, searches)}
    if trainings:
        figures['accuracy_multiply_adds'] = lambda: _macs_figure(trainings)
    for run in trainings:
        if run not in timed:
            print(f'{run.name}: no measured latency, so it is not in the picture of latencies')
    if timed:
        figures['accuracy_latency'] = lambda: _latency_figure(timed, setting)
    written, pictures = [], {}
    for name, draw in figures.items():
        paths, pictures[name] = save_figure(draw, out / name)
        written += paths
    names, rows = results(runs)
    write_text(out / 'results.csv', results_csv(names, rows))
    write_text(out / 'report.html', make_comparison(names, rows, pictures))
    return [*written, out / 'results.csv', out / 'report.html']


def results(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Return the names of columns with their units, and a row of texts for each run; '' for what a run has not.

    Flags are those that all runs have and that differ. Latencies `target` and `predicted` are by the table, in `unit`;
    the predicted one is that of the last architecture. `best_top1_percent` is a training's best; a search's last
    validation, on Gumbel paths. `minutes` are those from the first to the last line of the run, with pauses.
    """
    flags = [run.header['flags'] for run in runs]
    shared = set.intersection(*map(set, flags)) - HARMLESS - {'target_lat'}
    differ = sorted(name for name in shared if any(own[name] != flags[0][name] for own in flags))
    names = ['run', 'task', *differ, 'target', 'predicted', 'unit', 'measured_ms']
    names += ['macs_m', 'params_m', 'best_top1_percent', 'minutes']
    rows = []
    for run in runs:
        network = run.header.get('network') or run.of('epoch')[-1]['network']
        times = [line['time'] for line in run.lines if 'time' in line]
        latencies = [line['ms'] for line in run.of('latency')]
        rows.append(
            [
                run.name,
                run.header['task'],
                *(_flag(run.header['flags'][name]) for name in differ),
                _number(run.header.get('latency', {}).get('target'), '.4f'),
                _number(network['latency'], '.4f'),
                network['unit'] if network['latency'] is not None else '',
                _number(latencies[-1] if latencies else None, '.4f'),
                _number(network['macs'], '.2f'),
                _number(network['params'], '.4f'),
                _number(_best(run), '.2f'),
                _number((max(times) - min(times)) / 60 if times else None, '.1f'),
            ]
        )
    return names, rows


def _flag(value: object) -> str:
    """Return the value of a flag as on a command line."""
    return ' '.join(map(str, value)) if isinstance(value, list) else str(value)


def results_csv(names: list[str], rows: list[list[str]]) -> str:
    """Return the results as CSV text."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([names, *rows])
    return text.getvalue()


def results_text(names: list[str], rows: list[list[str]]) -> str:
    """Return the results as lines of aligned columns, without those that are empty."""
    columns = [column for column in zip(names, *rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return '\n'.join('  '.join(f'{text:{width}}' for text, width in zip(line, widths, strict=True)) for line in lines)


def _number(value: float | None, form: str) -> str:
    return '' if value is None else f'{value:{form}}'


def _common_setting(runs: list[Run]) -> dict:
    """Return the setting that all latencies were measured in."""
    settings = [{name: run.of('latency')[-1].get(name) for name in SETTING} for run in runs]
    for run, setting in zip(runs, settings, strict=True):
        for name in SETTING:
            if setting[name] != settings[0][name]:
                raise BadInput(
                    f'{run.name} was measured with {name} {setting[name]}, {runs[0].name} with {settings[0][name]}: '
                    'latencies of different settings do not go on one axis; compare runs of one setting'
                )
    return settings[0]


def _best(run: Run) -> float | None:
    """Return a training's best top-1, or that of a search's last validation, in %; None without a validation."""
    found = [line['val']['top1'] or 0.0 for line in run.of('epoch') if line.get('val')]
    return None if not found else found[-1] if run.header['task'] == 'search' else max(found)


def _macs_figure(runs: list[Run]) -> Figure:
    """Draw accuracy against MACs, with published networks if all runs are on ImageNet."""
    figure = Figure(figsize=(7.2, 5.0))
    axis = figure.subplots()
    if all((run.header['flags'].get('num_classes'), run.header['flags'].get('img_size')) == IMAGENET for run in runs):
        for (family, marker, rows), colour in zip(PUBLISHED, (ORANGE, GREEN, PURPLE), strict=True):
            x, y = [row[1] for row in rows], [row[2] for row in rows]
            names = ', '.join(row[0] for row in rows)
            axis.plot(x, y, marker, color=colour, mfc='white', mew=1.4, label=f'{family}: {names} (published)')
    else:
        print('published networks are left out: they are for 1,000 classes at 224 pixels')
    _draw_runs(axis, [(run.header['network']['macs'], run) for run in runs], 'M MACs')
    return figure


def _latency_figure(runs: list[Run], setting: dict) -> Figure:
    figure = Figure(figsize=(7.2, 4.6))
    about = f'{setting["device"]}, batch {setting["batch_size"]}, {setting["img_size"]} pixels'
    axis = figure.subplots()
    _draw_runs(axis, [(run.of('latency')[-1]['ms'], run) for run in runs], 'measured latency in ms')
    axis.set_title(fill(about, LEGEND_WIDTH))
    return figure


def _draw_runs(axis: Axes, points: list[tuple[float, Run]], xlabel: str) -> None:
    """Draw a marker per run, numbered in the order of the legend."""
    for number, (x, run) in enumerate(points, start=1):
        axis.plot(x, _best(run), '*', color=BLUE, markersize=11, label=_label(number, run))
        axis.annotate(str(number), (x, _best(run)), (6, 0), textcoords='offset points', va='center', fontsize=8)
    axis.set_xlabel(xlabel)
    axis.set_ylabel('best top-1 in %')
    axis.grid(color='#E0E0E0', linewidth=0.6)
    axis.margins(0.14, 0.12)
    axis.legend(loc='upper left', bbox_to_anchor=(0, -0.13), borderaxespad=0)


def _label(number: int, run: Run) -> str:
    return fill(f'{number}: {run.name}', LEGEND_WIDTH, subsequent_indent='    ')


def _epochs_figure(trainings: list[Run], searches: list[Run]) -> Figure:
    """Draw accuracies of all runs, and the latency of the current architecture of searches, over epochs."""
    scaled = [run for run in searches if any(line.get('latency') for line in run.of('epoch'))]
    units = {run.header['latency']['unit'] for run in scaled}
    if len(units) > 1:
        print(f'latencies are not drawn over epochs: tables in {" and ".join(sorted(units))} do not go on one axis')
    panels = [(trainings, 'val', 'validation top-1 in %')] if trainings else []
    panels += [(searches, 'w_top1', 'training top-1 in %')] if searches else []
    panels += [(scaled, 'latency', f'latency in {units.pop()}')] if len(units) == 1 else []
    figure = Figure(figsize=(7.2, 0.6 + 2.7 * len(panels)))
    for axis, (runs, name, label) in zip(figure.subplots(len(panels), 1, squeeze=False).flat, panels, strict=True):
        looks = zip(cycle((BLUE, ORANGE, GREEN, PURPLE, BLACK)), cycle(('-', '--', '-.', ':')), strict=False)
        for number, (run, (colour, style)) in enumerate(zip(runs, looks, strict=False), start=1):
            x, y = _curve(run, name)
            axis.plot(x, y, style, marker='.', color=colour, linewidth=1.2, label=_label(number, run))
            axis.annotate(str(number), (x[-1], y[-1]), (5, 0), textcoords='offset points', va='center', fontsize=8)
            if name == 'latency':
                axis.axhline(run.header['latency']['target'], color=colour, linestyle=style, linewidth=0.6)
        axis.set_ylabel(label)
        axis.grid(axis='y', color='#E0E0E0', linewidth=0.6)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlim(0, 1.05 * max(line['epoch'] + 1 for run in runs for line in run.of('epoch')))
        if name == 'latency':
            axis.set_title('Current architecture, scaled (thin lines: targets)')
        else:
            axis.set_title('Trainings' if name == 'val' else 'Searches: weights on Gumbel paths')
            axis.legend(loc='best')
    axis.set_xlabel('epochs done')
    return figure


def _curve(run: Run, name: str) -> tuple[list[int], list[float]]:
    """Return (epochs done, values) of a number of epochs: `val` (top-1), `latency` (after scaling), or any other."""
    part = {'val': 'top1', 'latency': 'after'}.get(name)
    lines = [line for line in run.of('epoch') if line.get(name) is not None]
    return [line['epoch'] + 1 for line in lines], [line[name][part] if part else line[name] for line in lines]
