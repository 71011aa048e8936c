"""Comparison of several trainings, in pictures with published networks and in a CSV file."""

import csv
import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.errors import BadInput
from tools.files import write_text
from tools.report.draw import save_figure
from tools.report.figures import BLUE, GREEN, ORANGE, PURPLE
from tools.run.metrics import Run

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


def compare_runs(runs: list[Run], out: Path) -> list[Path]:
    """Draw the comparisons that the runs allow, tabulate the runs, and return the paths of the files.

    Args:
        runs: trainings.

    Raises:
        BadInput: a run is not a training or has no epoch yet, or latencies were measured in different settings.
    """
    for run in runs:
        if run.header['task'] != 'training' or not run.of('epoch'):
            raise BadInput(f'{run.name}: comparing needs trainings with an epoch done, this is a {run.header["task"]}')
    timed = [run for run in runs if run.of('latency')]
    setting = _common_setting(timed) if timed else {}
    written, _ = save_figure(lambda: _macs_figure(runs), out / 'accuracy_multiply_adds')
    for run in runs:
        if run not in timed:
            print(f'{run.name}: no measured latency, so it is not in the picture of latencies')
    if timed:
        written += save_figure(lambda: _latency_figure(timed, setting), out / 'accuracy_latency')[0]
    write_text(out / 'results.csv', results_csv(runs))
    return [*written, out / 'results.csv']


def results_csv(runs: list[Run]) -> str:
    """Return a line a run: name, M MACs, M parameters, best top-1 in %, measured ms (empty if not measured)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['run', 'macs_m', 'params_m', 'best_top1_percent', 'measured_ms'])
    for run in runs:
        network, latencies = run.header['network'], run.of('latency')
        ms = f'{latencies[-1]["ms"]:.4f}' if latencies else ''
        writer.writerow([run.name, f'{network["macs"]:.2f}', f'{network["params"]:.4f}', f'{_best(run):.2f}', ms])
    return text.getvalue()


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


def _best(run: Run) -> float:
    return max(line['val']['top1'] or 0 for line in run.of('epoch'))


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
    points = [(run.of('latency')[-1]['ms'], run) for run in runs]
    _draw_runs(figure.subplots(), points, f'measured latency in ms ({about})')
    return figure


def _draw_runs(axis: Axes, points: list[tuple[float, Run]], xlabel: str) -> None:
    """Draw a marker per run, numbered in the order of the legend."""
    for number, (x, run) in enumerate(points, start=1):
        axis.plot(x, _best(run), '*', color=BLUE, markersize=11, label=f'{number}: {run.name}')
        axis.annotate(str(number), (x, _best(run)), (6, 0), textcoords='offset points', va='center', fontsize=8)
    axis.set_xlabel(xlabel)
    axis.set_ylabel('best top-1 in %')
    axis.grid(color='#E0E0E0', linewidth=0.6)
    axis.margins(0.14, 0.12)
    axis.legend(loc='upper left', bbox_to_anchor=(0, -0.13), borderaxespad=0)
