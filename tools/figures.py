"""The pictures of one run, drawn from its `metrics.jsonl`.

Position, shade and line style carry the values, with colour only in addition, so that the pictures can be read in grey
and by colour-blind readers (palette: Okabe & Ito 2008; shades: cividis, whose lightness rises evenly).
"""

import math
from collections.abc import Callable
from itertools import groupby
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from tools.run import Run

BLUE, ORANGE, GREEN, BLACK, GREY = '#0072B2', '#E69F00', '#009E73', '#000000', '#8C8C8C'
LIGHT, LINES = '#E3E3E3', '#BDBDBD'
STYLE = {
    'font.family': 'DejaVu Sans',
    'font.size': 8.5,
    'axes.titlesize': 9,
    'axes.titlelocation': 'left',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.axisbelow': True,
    'legend.frameon': False,
    'savefig.dpi': 200,
    'svg.hashsalt': 'tf-nas',
    'figure.constrained_layout.use': True,
}
TITLE_WIDTH = 12.5  # characters of a title in an inch of its picture
BAND = 0.01  # half-width of the band around the target, as a share of it
GRID = 6  # columns of the picture of operators

Picture = tuple[str, Callable[[], Figure]]


def figures_of(run: Run) -> dict[str, Picture]:
    """Return the pictures that a run allows: name -> (caption, function that draws it)."""
    found: dict[str, Picture] = {}
    network, epochs = network_of(run), run.of('epoch')
    if network:
        title = network_title(run, network)
        found['network'] = title, lambda: network_figure(with_measured(run, network), title)
    if epochs and run.header['task'] == 'search':
        found['search'] = 'Latency of the current architecture, loss and accuracy', lambda: search_figure(run)
        found['operators'] = 'Operator probabilities of every block', lambda: operators_figure(run)
        found['depth'] = 'Weights of the exits', lambda: depth_figure(run)
    if epochs and run.header['task'] == 'training':
        found['training'] = 'Training', lambda: training_figure(run)
    return found


# ---------------------------------------------------------------- a network


def network_of(run: Run) -> dict | None:
    """Return the network of a training, or the current one of a search; see `models.describe.describe_network`."""
    epochs = run.of('epoch')
    return run.header.get('network') or (epochs[-1].get('network') if epochs else None)


def with_measured(run: Run, network: dict) -> dict:
    """Return a network with the measured latencies of its blocks, if the run has them."""
    lines = [line for line in run.of('latency') if len(line.get('parts', ())) == len(network['blocks']) + 2]
    if not lines:
        return network
    parts = lines[-1]['parts']
    rows = [row | {'latency': ms} for row, ms in zip(network['blocks'], parts[1:-1], strict=True)]
    return network | {'blocks': rows, 'latency': sum(parts), 'unit': 'ms'}


def network_title(run: Run, network: dict) -> str:
    """Return a line with MACs, parameters and latencies of a run's network."""
    parts = [f'{network["macs"]:.1f} M MACs', f'{network["params"]:.2f} M parameters']
    if network['latency'] is not None:
        parts.append(f'{network["latency"]:.2f} {network["unit"]} by the table')
    for line in run.of('latency'):
        parts.append(f'{line["ms"]:.2f} ms measured on {line["device"]}, batch {line["batch_size"]}')
    return f'{run.name}: {", ".join(parts)}'


def network_figure(network: dict, title: str) -> Figure:
    """Draw a network, one column per block: width in its range, layers, and costs."""
    rows = network['blocks']
    columns = max(len(rows) + 1, 14)  # short networks are drawn to the same scale
    figure = Figure(figsize=(1.4 + 0.52 * columns, 5.4))
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[2.6, 1.2, 2])
    _draw_widths(axes[0], rows)
    _draw_layers(axes[1], rows)
    _draw_costs(axes[2], network)
    _mark_stages(axes, rows)
    axes[0].set_xlim(-0.6, columns - 0.4)
    figure.suptitle(fill(title, int(TITLE_WIDTH * figure.get_figwidth())), x=0.01, ha='left', fontsize=9.5)
    return figure


def _draw_widths(axis: Axes, rows: list[dict]) -> None:
    """Draw mid over input channels of each block, as the filled part of its operator's range."""
    top = 0
    for x, row in enumerate(rows):
        ratio = row['mid'] / row['in']
        low = (row['low'] or row['mid']) / row['in']
        high = (row['high'] or row['mid']) / row['in']
        top = max(top, high)
        look = {'edgecolor': BLACK, 'linewidth': 0.8}
        axis.add_patch(Rectangle((x - 0.33, low), 0.66, high - low, facecolor='white', **look))
        axis.add_patch(Rectangle((x - 0.33, low), 0.66, ratio - low, facecolor=BLUE, **look))
        if row['expand']:
            axis.plot([x - 0.43, x + 0.43], [row['expand']] * 2, color=ORANGE, linewidth=1.8, solid_capstyle='butt')
        axis.annotate(str(row['mid']), (x, high), (0, 2), textcoords='offset points', ha='center', fontsize=7.5)
    axis.set_ylim(0, top * 1.13)
    axis.set_ylabel('mid / input channels')
    axis.set_title('Width: mid channels (number, filled) in the range of the operator (box); bar: nominal expansion')
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(axis='x', length=0)


def _draw_layers(axis: Axes, rows: list[dict]) -> None:
    """Write kernel, channels, squeeze channels and sizes."""
    names = ['kernel', 'channels', 'SE channels', 'size']
    for x, row in enumerate(rows):
        out_size = -(-row['size'] // row['stride'])
        size = f'{row["size"]}²' if row['stride'] == 1 else f'{row["size"]}²→{out_size}²'
        texts = [f'{row["kernel"]}×{row["kernel"]}', f'{row["in"]}→{row["out"]}', str(row['se'] or '–'), size]
        for y, text in enumerate(texts):
            axis.text(x, y, text, ha='center', va='center', fontsize=6.6 if '→' in text else 7.5)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(length=0)
    axis.spines[['left', 'bottom']].set_visible(False)


def _draw_costs(axis: Axes, network: dict) -> None:
    """Draw the share of each block in latency and MACs; the last column is the fixed stem and head."""
    rows = network['blocks']
    shares = [('macs', 'MACs', {'color': 'white', 'hatch': '/////'})]
    if network['unit'] == 'ms' and network['latency'] is not None:
        shares.insert(0, ('latency', 'latency', {'color': BLUE}))
    wide = 0.8 / len(shares)
    for i, (key, label, look) in enumerate(shares):
        values = [row[key] for row in rows]
        values.append(network[key] - sum(values))
        values = 100 * np.array(values) / network[key]
        places = np.arange(len(values)) + (i - (len(shares) - 1) / 2) * wide
        bars = axis.bar(places, values, wide * 0.92, label=label, edgecolor=BLACK, linewidth=0.7, **look)
        axis.bar_label(bars, [f'{value:.0f}' for value in values], fontsize=6, padding=1)
    axis.set_ylabel('share in %')
    axis.margins(y=0.14)
    axis.set_title('What each block costs (last column: the fixed stem and head)')
    axis.legend(loc='upper right', ncols=2, bbox_to_anchor=(1, 1.16), borderaxespad=0, handlelength=1.6)
    numbers = [str(int(row['place'].split('.')[1]) + 1) for row in rows]
    axis.set_xticks(range(len(rows) + 1), [*numbers, 'fixed'])
    axis.set_xlabel('block of stage')


def _mark_stages(axes: list[Axes], rows: list[dict]) -> None:
    """Shade every second stage, and write the names and activations of stages."""
    start = 0
    for i, (stage, own) in enumerate(groupby(rows, key=lambda row: row['stage'])):
        own = list(own)
        end = start + len(own)
        for axis in axes[: len(axes) if i % 2 == 0 else 0]:
            axis.axvspan(start - 0.5, end - 0.5, color='#F2F2F2', zorder=-5, linewidth=0)
        axes[0].text((start + end - 1) / 2, 0.12, f'{stage}\n{own[0]["act"]}', ha='center', va='bottom', fontsize=7.5)
        start = end


# ---------------------------------------------------------------- a search


def search_figure(run: Run) -> Figure:
    """Draw latency of the current architecture before and after scaling, loss and accuracy, over epochs."""
    figure = Figure(figsize=(7.2, 6.6))
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[1.5, 1, 1])
    _draw_latency(axes[0], run)
    for axis, name, label in zip(axes[1:], ('loss', 'top1'), ('loss', 'top-1 in %'), strict=True):
        for which, of, look, colour in (('w', 'weights', '-', BLUE), ('a', 'architecture', '--', ORANGE)):
            axis.plot(*_over(run.of('step'), f'{which}_{name}'), look, color=colour, linewidth=1.2, label=of)
        axis.set_ylabel(label)
    validated = [line for line in run.of('epoch') if line.get('val')]
    points = [line['epoch'] + 1 for line in validated], [line['val']['top1'] for line in validated]
    axes[2].plot(*points, 'D', color=BLACK, markersize=4, label='validation, Gumbel paths')
    for axis in axes[1:]:
        axis.legend(loc='best', ncols=3)
    _mark_epochs(axes, run)
    return figure


def _draw_latency(axis: Axes, run: Run) -> None:
    about, lines = run.header['latency'], [line for line in run.of('epoch') if line.get('latency')]
    target, unit = about['target'], about['unit']
    epochs = [line['epoch'] + 1 for line in lines]
    least, most, before, after = (
        np.array([line['latency'][name] for line in lines]) for name in ('least', 'most', 'before', 'after')
    )
    axis.bar(epochs, most - least, 1, least, color=LIGHT, linewidth=0, label='reach of its operators')
    axis.plot(*_over(run.of('step'), 'mixture_latency'), color=ORANGE, linewidth=1.2, label='mixture in training')
    axis.axhspan(target * (1 - BAND), target * (1 + BAND), color=GREEN, alpha=0.3, linewidth=0)
    axis.axhline(target, color=GREEN, linewidth=1.4, label=f'target {target:.4g} {unit} ± {BAND:.0%}')
    axis.plot(epochs, before, 'o', markerfacecolor='white', color=BLUE, markersize=5, label='before scaling')
    axis.plot(epochs, after, 'o-', color=BLUE, linewidth=0.8, markersize=3.2, label='after scaling')
    axis.set_ylabel(f'latency in {unit}' if unit == 'ms' else unit)
    axis.margins(y=0.12)
    title = f'The current architecture (table of {about.get("device", "an unknown device")})'
    axis.set_title(fill(title, int(TITLE_WIDTH * axis.figure.get_figwidth())), pad=36)
    axis.legend(loc='lower left', ncols=3, bbox_to_anchor=(0, 1), borderaxespad=0.2)


def _mark_epochs(axes: list[Axes], run: Run) -> None:
    """Give axes over epochs their range and grid, and mark the end of a warm-up."""
    flags = run.header['flags']
    for axis in axes:
        axis.set_xlim(0, 1.012 * flags['epochs'])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(axis='y', color='#E0E0E0', linewidth=0.6)
        if flags.get('warmup_epochs'):
            axis.axvline(flags['warmup_epochs'], color=GREY, linewidth=0.9, linestyle=':')
    axes[-1].set_xlabel('epochs done (dotted line: the warm-up ends)' if flags.get('warmup_epochs') else 'epochs done')


def _over(lines: list[dict], name: str) -> tuple[list[float], list[float]]:
    """Return (epochs done, values) of a number in step lines, with a gap between two epochs."""
    x, y, epoch = [], [], None
    for line in lines:
        if line.get(name) is None:
            continue
        if line['epoch'] != epoch:
            x.append(line['epoch'])
            y.append(math.nan)
        epoch = line['epoch']
        x.append(epoch + line['step'] / line['steps'])
        y.append(line[name])
    return x, y


def operators_figure(run: Run) -> Figure:
    """Draw the operator probabilities of each block over epochs, and their entropy."""
    lines = [line for line in run.of('epoch') if 'ops' in line]
    blocks, labels = run.header['space']['blocks'], [op['label'] for op in run.header['space']['ops']]
    values = np.zeros((len(lines), len(blocks), len(labels)))  # [epochs, blocks, ops]
    for x, line in enumerate(lines):
        for y, ops in enumerate(line['ops']):  # blocks may lack the last operator
            values[x, y, : len(ops)] = ops
    epochs = [line['epoch'] + 1 for line in lines]
    warming_up = [epoch <= run.header['flags']['warmup_epochs'] for epoch in epochs]  # nothing is chosen yet
    columns = min(GRID, len(blocks))
    rows = -(-len(blocks) // columns)
    figure = Figure(figsize=(9.6, 1.3 * rows + 2.6))
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.3 * rows, 1.9])
    grid = top.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    even = 1 / len(labels)  # in the middle shade; up to twice that, shades are as steep on both sides
    norm = TwoSlopeNorm(even, 0, max(values.max(), 2 * even))
    for axis in grid.flat[len(blocks) :]:
        axis.set_visible(False)
    for i, (axis, block) in enumerate(zip(grid.flat, blocks, strict=False)):
        image = _heat_map(axis, values[:, i].T, lines, norm)
        current = [_current(run, line, i) for line in lines]
        drawn = [math.nan if op is None or early else op for op, early in zip(current, warming_up, strict=True)]
        axis.step(epochs, drawn, where='mid', color='white', linewidth=2.4)
        axis.step(epochs, drawn, where='mid', color=BLACK, linewidth=1.1)
        dropped = current[-1] is None
        name = f'{block["stage"]}.{block["name"].removeprefix("block")}'
        title = f'{name}: dropped' if dropped else f'{name}: {labels[current[-1]]}'
        axis.set_title(title, fontsize=8, color='#767676' if dropped else BLACK)
        axis.set_yticks(range(len(labels)), labels, fontsize=6.5)
    bar = top.colorbar(image, ax=grid, shrink=0.6 if rows > 1 else 1, pad=0.01, aspect=10 * rows)
    bar.set_label('probability (line: current)')
    bar.set_ticks([0, even, norm.vmax], labels=['0', f'1/{len(labels)}', f'{norm.vmax:.2f}'])
    _draw_entropy(bottom.subplots(), lines, values, run)
    return figure


def _heat_map(axis: Axes, values: np.ndarray, lines: list[dict], norm=None):
    """Draw values [rows, epochs] as shades."""
    ends = lines[0]['epoch'] + 0.5, lines[-1]['epoch'] + 1.5
    extent = (*ends, len(values) - 0.5, -0.5)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=2)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return axis.imshow(values, cmap='cividis', norm=norm, aspect='auto', interpolation='nearest', extent=extent)


def _current(run: Run, line: dict, block: int) -> int | None:
    """Return the operator of a block in the current architecture; None if the block comes after its stage's exit."""
    blocks = run.header['space']['blocks']
    stage = blocks[block]['stage']
    number = sum(other['stage'] == stage for other in blocks[:block])
    chosen = line['arch'][stage]
    return chosen[number] if number < len(chosen) else None


def _draw_entropy(axis: Axes, lines: list[dict], values: np.ndarray, run: Run) -> None:
    """Draw the entropy of each block's operator probabilities: 1 if all are equal, 0 if one operator has all."""
    epochs = [line['epoch'] + 1 for line in lines]
    most = np.log([max(len(ops), 2) for ops in lines[-1]['ops']])
    entropy = -(values * np.log(np.maximum(values, 1e-12))).sum(axis=2) / most
    for i in range(values.shape[1]):
        axis.plot(epochs, entropy[:, i], color=LINES, linewidth=0.7, label='a block' if i == 0 else None)
    axis.plot(epochs, entropy.mean(axis=1), color=BLUE, linewidth=2, label='mean')
    for share, look in ((0.5, '--'), (0.9, ':')):
        level = collapsed_entropy(share, values.shape[2])
        axis.axhline(level, color=BLACK, linewidth=0.8, linestyle=look, label=f'one operator has {share:.0%}')
    axis.set_ylim(0, 1.04)
    axis.set_ylabel('entropy')
    axis.set_title('Entropy of the operator probabilities, as a share of its maximum')
    axis.legend(loc='upper left', bbox_to_anchor=(1.0, 1.0))
    _mark_epochs([axis], run)


def collapsed_entropy(share: float, count: int) -> float:
    """Return the normalised entropy if one operator has `share` and the others are equal."""
    rest = (1 - share) / max(count - 1, 1)
    return -(share * math.log(share) + (1 - share) * math.log(rest)) / math.log(max(count, 2))


def depth_figure(run: Run) -> Figure:
    """Draw the weights of the exits of each stage over epochs."""
    lines = [line for line in run.of('epoch') if 'exits' in line]
    names, rows = [], []
    for stage, depths in run.header['space']['exits'].items():
        for i, depth in enumerate(depths):
            rows.append([line['exits'][stage][i] for line in lines])
            current = len(lines[-1]['arch'][stage]) == depth
            names.append(f'{stage}: {depth} {"■" if current else "–"} {rows[-1][-1]:.2f}')
    figure = Figure(figsize=(5.6, 1.6 + 0.2 * len(names)))
    axis = figure.subplots()
    image = _heat_map(axis, np.array(rows), lines, matplotlib.colors.Normalize(0, 1))
    axis.set_yticks(range(len(names)), names)
    axis.set_title('Weight of each exit, by number of blocks (■ current; last weight)')
    axis.set_xlabel('epochs done')
    figure.colorbar(image, aspect=30, label='weight')
    return figure


# ---------------------------------------------------------------- a training


def training_figure(run: Run) -> Figure:
    """Draw loss and accuracy of training and validation, and the learning rate, over epochs."""
    figure = Figure(figsize=(7.2, 6.2))
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[1.3, 1.3, 0.7])
    lines = run.of('epoch')
    epochs = [line['epoch'] + 1 for line in lines]
    for axis, name, label in zip(axes, ('loss', 'top1'), ('loss', 'top-1 in %'), strict=False):
        axis.plot(*_over(run.of('step'), name), color=LINES, linewidth=0.8, label='training, within the epoch')
        axis.plot(epochs, [line['train'][name] for line in lines], 's--', color=BLUE, markersize=3, label='training')
        axis.plot(epochs, [line['val'][name] for line in lines], 'o-', color=ORANGE, markersize=3, label='validation')
        axis.set_ylabel(label)
    axes[0].legend(loc='best')
    axes[1].set_title(f'best {max(line["val"]["top1"] or 0 for line in lines):.2f} %')
    rates = [line['lr'] for line in lines]
    axes[2].plot([epochs[0] - 1, *epochs], [*rates, rates[-1]], drawstyle='steps-post', color=BLACK)
    axes[2].set_ylabel('learning rate')
    _mark_epochs(axes, run)
    return figure
