"""Several runs beside each other, and beside published networks."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.errors import BadInput
from tools.report.draw import save_figure
from tools.report.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE
from tools.run.folder import Run

SETTING = ('device', 'batch_size', 'threads', 'img_size')
"""What measured latencies must have in common to stand on one axis."""

IMAGENET = (1000, 224)
"""Classes and input size of the published numbers."""

PUBLISHED = (
    ('TF-NAS (paper)', 'o', [
        ('A', 457, 76.87), ('B', 361, 76.28), ('C', 284, 75.15), ('D', 219, 74.19), ('CPU-A', 305, 75.83),
        ('CPU-B', 230, 74.44)
    ]),
    ('FBNet, FBNetV2', 's', [('FBNet-C', 378, 75.2), ('V2-F4', 236, 75.5), ('V2-L2', 419, 77.7)]),
    ('distilled or stronger recipe', '^', [('FBNetV3-A', 357, 79.57), ('FBNetV3-B', 462, 80.21), ('OFA', 595, 80.0)]),
)  # fmt: skip
"""Families: name, marker, (network, M multiply-adds, top-1 on ImageNet in %). Quoted as published, not re-run."""

TORCHVISION = ('EfficientNet_B0_Weights', 'MobileNet_V3_Large_Weights', 'MNASNet1_0_Weights')
"""Networks whose numbers torchvision itself tells, in the metadata of its first weights."""


def torchvision_rows() -> list[tuple[str, float, float]]:
    """(name, M multiply-adds, top-1 in %) of `TORCHVISION`."""
    from torchvision import models

    rows = []
    for name in TORCHVISION:
        meta = getattr(models, name).IMAGENET1K_V1.meta
        short = name.removesuffix('_Weights').replace('_', '-')
        rows.append((short, 1000 * meta['_ops'], meta['_metrics']['ImageNet-1K']['acc@1']))
    return rows


def compare_runs(runs: list[Run], out: Path) -> list[Path]:
    """Write the comparisons that the runs allow; returns the files.

    Args:
        runs: trainings.

    Raises:
        BadInput: a run that is no training or has no epoch yet; latencies measured in different settings.
    """
    for run in runs:
        if run.header['task'] != 'training' or not run.of('epoch'):
            raise BadInput(f'{run.name}: comparing needs trainings with an epoch done, this is a {run.header["task"]}')
    written, _ = save_figure(lambda: _macs_figure(runs), out / 'accuracy_multiply_adds')
    timed = [run for run in runs if run.of('latency')]
    for run in runs:
        if run not in timed:
            print(f'{run.name}: no measured latency in it, so it is not in the picture of latencies')
    if timed:
        setting = _common_setting(timed)
        written += save_figure(lambda: _latency_figure(timed, setting), out / 'accuracy_latency')[0]
    return written


def _common_setting(runs: list[Run]) -> dict:
    """The setting that all latencies were measured in."""
    settings = [{name: run.of('latency')[-1].get(name) for name in SETTING} for run in runs]
    for run, setting in zip(runs, settings, strict=True):
        for name in SETTING:
            if setting[name] != settings[0][name]:
                raise BadInput(
                    f'{run.name} was measured with {name} {setting[name]}, {runs[0].name} with {settings[0][name]}: '
                    'latencies of different settings do not go on one axis; compare runs of one'
                )
    return settings[0]


def _best(run: Run) -> float:
    return max(line['val']['top1'] or 0 for line in run.of('epoch'))


def _macs_figure(runs: list[Run]) -> Figure:
    """Accuracy against multiply-adds; published networks where the runs are like theirs."""
    figure = Figure(figsize=(7.2, 5.0))
    axis = figure.subplots()
    points = []
    if all((run.header['flags'].get('num_classes'), run.header['flags'].get('img_size')) == IMAGENET for run in runs):
        families = [*PUBLISHED, ('torchvision', 'D', torchvision_rows())]
        for (family, marker, rows), colour in zip(families, (ORANGE, GREEN, PURPLE, GREY), strict=True):
            x, y = [row[1] for row in rows], [row[2] for row in rows]
            axis.plot(x, y, marker, color=colour, mfc='white', mew=1.4, label=f'{family}, published')
            points += [(row[1], row[2], row[0]) for row in rows]
    else:
        print('published networks are left out: they are for 1,000 classes at 224 pixels')
    own = [(run.header['network']['macs'], _best(run), run.name) for run in runs]
    axis.plot([p[0] for p in own], [p[1] for p in own], '*', color=BLUE, markersize=11, label='these runs')
    _finish(axis, [*points, *own], 'multiply-adds in M')
    return figure


def _latency_figure(runs: list[Run], setting: dict) -> Figure:
    figure = Figure(figsize=(7.2, 4.6))
    axis = figure.subplots()
    own = [(run.of('latency')[-1]['ms'], _best(run), run.name) for run in runs]
    axis.plot([p[0] for p in own], [p[1] for p in own], '*', color=BLUE, markersize=11)
    about = f'{setting["device"]}, batch {setting["batch_size"]}, {setting["img_size"]} pixels'
    _finish(axis, own, f'measured latency in ms ({about})')
    return figure


def _finish(axis: Axes, points: list[tuple[float, float, str]], xlabel: str) -> None:
    """Names beside the points where they overlap nothing, axes, legend."""
    axis.set_xlabel(xlabel)
    axis.set_ylabel('best top-1 in %')
    axis.grid(color='#E0E0E0', linewidth=0.6)
    axis.margins(0.14, 0.12)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(loc='upper left', bbox_to_anchor=(0, -0.13), ncols=3, borderaxespad=0)
    place_names(axis, points)


AROUND = [
    (1, 0, 'left'), (-1, 0, 'right'), (0, 1, 'center'), (0, -1, 'center'), (1, 1, 'left'), (-1, 1, 'right'),
    (1, -1, 'left'), (-1, -1, 'right'),
]  # fmt: skip
"""Directions from a point to its name, and the side of the name that is nearest."""


def place_names(axis: Axes, points: list[tuple[float, float, str]]) -> None:
    """Write each point's name at the nearest place around it where it overlaps no point and no other name."""
    figure = axis.figure
    figure.draw_without_rendering()
    figure.set_layout_engine('none')  # or the names would move the axes once more
    taken = [_box(axis.transData.transform((x, y)), 9, 9, figure) for x, y, _ in points]
    places = [(distance, *place) for distance in (6, 12, 20, 30, 42) for place in AROUND]
    for x, y, name in sorted(points):
        for distance, dx, dy, side in places:
            line = {'arrowstyle': '-', 'color': GREY, 'linewidth': 0.6} if distance > 6 else None
            text = axis.annotate(
                name, (x, y), (dx * distance, dy * distance), textcoords='offset points', ha=side, va='center',
                fontsize=7.5, color=BLACK, arrowprops=line,
            )  # fmt: skip
            text.get_window_extent()  # puts the text where it is to be drawn
            box = matplotlib.text.Text.get_window_extent(text)  # of the text alone, without its line
            inside = axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            if (distance, dx, dy, side) != places[-1]:
                text.remove()
        taken.append(box)


def _box(centre, width: float, height: float, figure: Figure):
    """A box in pixels around a point; sizes in points of type."""
    from matplotlib.transforms import Bbox

    scale = figure.dpi / 72
    x, y = centre
    return Bbox.from_extents(
        x - width / 2 * scale, y - height / 2 * scale, x + width / 2 * scale, y + height / 2 * scale
    )
