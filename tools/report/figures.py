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

BLUE, ORANGE, GREEN, PURPLE, BLACK, GREY = '#0072B2', '#E69F00', '#009E73', '#CC79A7', '#000000', '#8C8C8C'
SHADES = matplotlib.colormaps['cividis']
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
TITLE_WIDTH = 12.5
"""Characters of a title in an inch of its picture."""

CLOSE = 0.01
"""Half-width of the band around the target, as a share of the target."""


def block_label(block: dict) -> str:
    """Return the name of a block of a described search space, such as stage1.1."""
    return f'{block["stage"]}.{block["name"].removeprefix("block")}'


def network_figure(network: dict, title: str) -> Figure:
    """Draw a network, one column per block: width in its range, kernel, channels, squeeze-excitation, and costs.

    Args:
        network: see `models.describe.describe_network`.
    """
    rows = network['blocks']
    columns = max(len(rows) + 1, 14)  # short networks are drawn to the same scale
    figure = Figure(figsize=(1.4 + 0.52 * columns, 6.2))
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[2.6, 1.75, 2])
    _draw_widths(axes[0], rows)
    _draw_layers(axes[1], rows)
    _draw_costs(axes[2], network)
    _mark_stages(axes, rows)
    axes[0].set_xlim(-0.6, columns - 0.4)
    figure.suptitle(fill(title, int(TITLE_WIDTH * figure.get_figwidth())), x=0.01, ha='left', fontsize=9.5)
    return figure


def _draw_widths(axis: Axes, rows: list[dict]) -> None:
    """Draw mid over input channels of each block, as the filled part of its operator's range."""
    for x, row in enumerate(rows):
        ratio = row['mid'] / row['in']
        low, high = (row[end] / row['in'] if row[end] else ratio for end in ('low', 'high'))
        axis.add_patch(Rectangle((x - 0.33, low), 0.66, high - low, facecolor='white', edgecolor=BLACK, linewidth=0.8))
        axis.add_patch(Rectangle((x - 0.33, low), 0.66, ratio - low, facecolor=BLUE, edgecolor=BLACK, linewidth=0.8))
        if row['expand']:
            axis.plot([x - 0.43, x + 0.43], [row['expand']] * 2, color=ORANGE, linewidth=1.8, solid_capstyle='butt')
        axis.annotate(str(row['mid']), (x, high), (0, 2), textcoords='offset points', ha='center', fontsize=7.5)
    top = max((row['high'] or row['mid']) / row['in'] for row in rows)
    axis.set_ylim(0, top * 1.13)
    axis.set_ylabel('mid / input channels')
    axis.set_title(
        'Width: mid channels in use (number, filled) of the range of the operator (box); bar: nominal expansion'
    )
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(axis='x', length=0)


def _draw_layers(axis: Axes, rows: list[dict]) -> None:
    """Draw the kernel as a grid, and write channels, squeeze channels and sizes."""
    cell = 0.125
    for x, row in enumerate(rows):
        kernel, height = row['kernel'], cell * 1.25
        for i in range(kernel):
            for j in range(kernel):
                corner = x + (i - kernel / 2) * cell, 3.0 + (j - kernel / 2) * height
                fill = BLUE if kernel > 3 else '#9CC7E3'
                axis.add_patch(Rectangle(corner, cell, height, facecolor=fill, edgecolor='white', linewidth=0.6))
        size = f'{row["size"]}²' + (f'→{-(-row["size"] // row["stride"])}²' if row['stride'] > 1 else '')
        texts = (f'{row["in"]}→{row["out"]}', f'{row["se"]}' if row['se'] else '–', size)
        for y, text in zip((1.85, 1.05, 0.25), texts, strict=True):
            axis.text(x, y, text, ha='center', va='center', fontsize=6.6 if '→' in text else 7.5)
    axis.set_ylim(-0.15, 3.65)
    axis.set_yticks([3.0, 1.85, 1.05, 0.25], ['kernel', 'channels', 'SE channels', 'size'])
    axis.tick_params(length=0)
    axis.spines[['left', 'bottom']].set_visible(False)


def _draw_costs(axis: Axes, network: dict) -> None:
    """Draw the share of each block in latency and MACs; the last column is the fixed stem and head."""
    rows, unit = network['blocks'], network['unit']
    shares = [('MACs', [row['macs'] for row in rows], network['macs'], {'color': 'white', 'hatch': '/////'})]
    if network['latency'] is not None and unit not in ('M MACs', 'M multiply-adds'):
        latency = [row['latency'] for row in rows]
        name = network.get('latency_name', 'latency by the table') if unit == 'ms' else unit
        shares.insert(0, (name, latency, network['latency'], {'color': BLUE}))
    wide = 0.8 / len(shares)
    for i, (label, values, total, look) in enumerate(shares):
        values = [100 * value / total for value in [*values, total - sum(values)]]
        places = np.arange(len(values)) + (i - (len(shares) - 1) / 2) * wide
        bars = axis.bar(places, values, wide * 0.92, label=label, edgecolor=BLACK, linewidth=0.7, **look)
        axis.bar_label(bars, [f'{value:.0f}' for value in values], fontsize=6, padding=1)
    axis.set_ylabel('share in %')
    axis.margins(y=0.14)
    axis.set_title('What each block costs (last column: the fixed stem and head)')
    axis.legend(loc='upper right', ncols=2, bbox_to_anchor=(1, 1.16), borderaxespad=0, handlelength=1.6)
    axis.set_xticks(range(len(rows) + 1), [_block_number(row) for row in rows] + ['fixed'])
    axis.set_xlabel('block of stage')


def _block_number(row: dict) -> str:
    return str(int(row['place'].split('.')[1]) + 1)


def _mark_stages(axes: list[Axes], rows: list[dict]) -> None:
    """Shade every second stage, and write the names and activations of stages."""
    start = 0
    for i, (stage, own) in enumerate(groupby(rows, key=lambda row: row['stage'])):
        own = list(own)
        end = start + len(own)
        for axis in axes:
            if i % 2 == 0:
                axis.axvspan(start - 0.5, end - 0.5, color='#F2F2F2', zorder=-5, linewidth=0)
        name = f'{stage}\n{own[0]["act"]}' if len(own) < 3 else f'{stage}, {own[0]["act"]}'
        axes[0].text((start + end - 1) / 2, 0.12, name, ha='center', va='bottom', fontsize=7.5)
        start = end


def search_figure(run: Run) -> Figure:
    """Draw latency of the current architecture before and after scaling, loss and accuracy, over epochs."""
    limits = run.header['latency'].get('limits', {})
    figure = Figure(figsize=(7.2, 6.6 + 1.3 * len(limits)))
    axes = figure.subplots(3 + len(limits), 1, sharex=True, height_ratios=[1.5, *[0.8] * len(limits), 1, 1])
    _draw_latency(axes[0], run)
    for axis, name in zip(axes[1:], limits, strict=False):
        _draw_limit(axis, run, name)
    loss, accuracy = axes[-2:]
    steps = run.of('step')
    _draw_curves(loss, steps, {'w_loss': 'weights', 'a_loss': 'architecture'})
    loss.set_ylabel('loss')
    _draw_curves(accuracy, steps, {'w_top1': 'weights', 'a_top1': 'architecture'})
    validated = [line for line in run.of('epoch') if line.get('val')]
    points = [line['epoch'] + 1 for line in validated], [line['val']['top1'] for line in validated]
    accuracy.plot(*points, 'D', color=BLACK, markersize=4, label='validation, Gumbel paths')
    accuracy.set_ylabel('top-1 in %')
    accuracy.set_xlabel('epochs done')
    for axis in (loss, accuracy):
        axis.legend(loc='best', ncols=3)
    _mark_warmup(axes, run)
    return figure


def _draw_latency(axis: Axes, run: Run) -> None:
    about, lines = run.header['latency'], [line for line in run.of('epoch') if line.get('latency')]
    target, unit = about['target'], about['unit']
    epochs = [line['epoch'] + 1 for line in lines]
    values = {name: [line['latency'][name] for line in lines] for name in ('least', 'most', 'before', 'after')}
    reach = [most - least for least, most in zip(values['least'], values['most'], strict=True)]
    axis.bar(epochs, reach, 1, values['least'], color='#E3E3E3', linewidth=0, label='reach of its operators')
    mixed = [line for line in run.of('step') if line.get('mixture_latency')]
    axis.plot(*_over(mixed, 'mixture_latency'), color=ORANGE, linewidth=1.2, label='mixture in training')
    axis.axhspan(target * (1 - CLOSE), target * (1 + CLOSE), color=GREEN, alpha=0.3, linewidth=0)
    axis.axhline(target, color=GREEN, linewidth=1.4, label=f'target {target:.4g} {unit} ± {CLOSE:.0%}')
    axis.plot(epochs, values['before'], 'o', markerfacecolor='white', color=BLUE, markersize=5, label='before scaling')
    axis.plot(epochs, values['after'], 'o-', color=BLUE, linewidth=0.8, markersize=3.2, label='after scaling')
    axis.set_ylabel(f'latency in {unit}' if unit == 'ms' else unit)
    axis.margins(y=0.12)
    title = fill(f'The current architecture ({_table_name(about)})', int(TITLE_WIDTH * axis.figure.get_figwidth()))
    axis.set_title(title, pad=36)
    axis.legend(loc='lower left', ncols=3, bbox_to_anchor=(0, 1), borderaxespad=0.2)


def _draw_limit(axis: Axes, run: Run, name: str) -> None:
    """Draw the total of the current architecture in a limit's table, and the limit."""
    about, lines = run.header['latency']['limits'][name], [line for line in run.of('epoch') if line.get('latency')]
    epochs = [line['epoch'] + 1 for line in lines]
    values = {when: [line['latency']['limits'][name][when] for line in lines] for when in ('before', 'after')}
    mixed = [line for line in run.of('step') if line.get(f'mixture_{name}')]
    axis.plot(*_over(mixed, f'mixture_{name}'), color=ORANGE, linewidth=1.2)
    axis.axhline(about['limit'], color=BLACK, linewidth=1.4, linestyle='--', label=f'limit {about["limit"]:.4g}')
    axis.plot(epochs, values['before'], 'o', markerfacecolor='white', color=BLUE, markersize=5)
    axis.plot(epochs, values['after'], 'o-', color=BLUE, linewidth=0.8, markersize=3.2)
    axis.set_ylabel(f'{name} in ms' if about['unit'] == 'ms' else about['unit'])
    axis.margins(y=0.12)
    axis.legend(loc='best')


def _table_name(about: dict) -> str:
    method = str(about.get('method') or '')
    how = 'estimated table' if method.startswith('estimated') else 'table'
    return f'{how} of {about["device"]}' if about.get('device') else 'latency table'


def _mark_warmup(axes: list[Axes], run: Run) -> None:
    flags = run.header['flags']
    for axis in axes:
        axis.set_xlim(0, 1.012 * flags['epochs'])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(axis='y', color='#E0E0E0', linewidth=0.6)
        axis.axvline(flags['warmup_epochs'], color=GREY, linewidth=0.9, linestyle=':')
    axes[0].annotate(
        'warm-up ends',
        (flags['warmup_epochs'], 0),
        (-2, 4),
        xycoords=('data', 'axes fraction'),
        textcoords='offset points',
        rotation=90,
        ha='right',
        va='bottom',
        fontsize=7,
        color='#555555',
    )


def _over(lines: list[dict], name: str) -> tuple[list[float], list[float]]:
    """Return (epochs done, values) of a number in step lines."""
    lines = [line for line in lines if line.get(name) is not None]
    return [line['epoch'] + line['step'] / line['steps'] for line in lines], [line[name] for line in lines]


def _draw_curves(axis: Axes, lines: list[dict], names: dict[str, str]) -> None:
    """Draw numbers of step lines as curves of different style and colour, interrupted between epochs."""
    for (name, label), style, colour in zip(names.items(), ('-', '--', ':'), (BLUE, ORANGE, GREEN), strict=False):
        for _, epoch in groupby(lines, key=lambda line: line['epoch']):
            x, y = _over(list(epoch), name)
            mark = '.' if len(x) == 1 else None
            shown = label if y and not any(drawn.get_label() == label for drawn in axis.lines) else None
            axis.plot(x, y, style, marker=mark, color=colour, linewidth=1.2, label=shown)


def operators_figure(run: Run) -> Figure:
    """Draw the operator probabilities of each block over epochs, and their entropy."""
    lines = [line for line in run.of('epoch') if 'ops' in line]
    labels = [op['label'] for op in run.header['space']['ops']]
    values = np.zeros((len(lines), len(run.header['space']['blocks']), len(labels)))  # [epochs, blocks, ops]
    for x, line in enumerate(lines):
        for y, ops in enumerate(line['ops']):  # blocks may lack the last operator
            values[x, y, : len(ops)] = ops
    blocks = run.header['space']['blocks']
    columns = min(6, len(blocks))
    rows = -(-len(blocks) // columns)
    figure = Figure(figsize=(9.6, 1.3 * rows + 2.6))
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.3 * rows, 1.9])
    grid = top.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    even = 1 / len(labels)  # in the middle shade; up to twice that, shades are as steep on both sides
    norm = TwoSlopeNorm(even, 0, max(values.max(), 2 * even))
    epochs, ends = [line['epoch'] + 1 for line in lines], (lines[0]['epoch'] + 0.5, lines[-1]['epoch'] + 1.5)
    for i, axis in enumerate(grid.flat):
        if i >= len(blocks):
            axis.set_visible(False)
            continue
        image = axis.imshow(
            values[:, i].T,
            cmap=SHADES,
            norm=norm,
            aspect='auto',
            interpolation='nearest',
            extent=(*ends, len(labels) - 0.5, -0.5),
        )
        undecided = np.ptp(values[:, i, : len(lines[-1]['ops'][i])], axis=1) < 1e-6
        chosen = np.where(undecided, np.nan, [_operator(run, line, i) for line in lines])
        axis.step(epochs, chosen, where='mid', color='white', linewidth=2.4)
        axis.step(epochs, chosen, where='mid', color=BLACK, linewidth=1.1)
        name, current = block_label(blocks[i]), _current(run, lines[-1], i)
        found = 'dropped' if current is None else labels[current]
        axis.set_title(f'{name}: {found}', fontsize=8, color='#767676' if current is None else BLACK)
        axis.set_yticks(range(len(labels)), labels, fontsize=6.5)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=2)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    bar = top.colorbar(image, ax=grid, shrink=0.6 if rows > 1 else 1, pad=0.01, aspect=10 * rows)
    bar.set_label('probability (line: the current operator)' if rows > 1 else 'probability')
    ticks = [0, even / 2, even, *np.linspace(even, norm.vmax, 4)[1:]]
    bar.set_ticks(ticks, labels=[f'{tick:.2g}' if tick != even else f'1/{len(labels)}' for tick in ticks])
    _draw_entropy(bottom.subplots(), lines, values, run)
    return figure


def _current(run: Run, line: dict, block: int) -> int | None:
    """Return the operator of a block in the current architecture; None if the block comes after its stage's exit."""
    blocks = run.header['space']['blocks']
    stage = blocks[block]['stage']
    number = sum(other['stage'] == stage for other in blocks[: block + 1])
    if number > _depth(run, line, stage):
        return None
    return line['arch'][stage][number - 1] if 'arch' in line else int(np.argmax(line['ops'][block]))


def _operator(run: Run, line: dict, block: int) -> int:
    """Return the operator of a block in the current architecture, or the most probable one if the block is dropped."""
    current = _current(run, line, block)
    return int(np.argmax(line['ops'][block])) if current is None else current


def _depth(run: Run, line: dict, stage: str) -> int:
    """Return the number of blocks of a stage in the current architecture."""
    if 'arch' in line:
        return len(line['arch'][stage])
    return run.header['space']['exits'][stage][int(np.argmax(line['exits'][stage]))]


def _draw_entropy(axis: Axes, lines: list[dict], values: np.ndarray, run: Run) -> None:
    """Draw the entropy of each block's operator probabilities: 1 if all are equal, 0 if one operator has all."""
    epochs = [line['epoch'] + 1 for line in lines]
    most = np.log([max(len(ops), 2) for ops in lines[-1]['ops']])
    entropy = -(values * np.log(np.maximum(values, 1e-12))).sum(axis=2) / most
    for i in range(values.shape[1]):
        axis.plot(epochs, entropy[:, i], color='#BDBDBD', linewidth=0.7, label='a block' if i == 0 else None)
    axis.plot(epochs, entropy.mean(axis=1), color=BLUE, linewidth=2, label='mean')
    for share, look in ((0.5, '--'), (0.9, ':')):
        level = _collapsed(share, values.shape[2])
        axis.axhline(level, color=BLACK, linewidth=0.8, linestyle=look, label=f'one operator has {share:.0%}')
    axis.set_ylim(0, 1.04)
    axis.set_ylabel('entropy')
    axis.set_title('Entropy of the operator probabilities, as a share of its maximum')
    axis.set_xlabel('epochs done')
    axis.legend(loc='upper left', bbox_to_anchor=(1.0, 1.0))
    _mark_warmup([axis], run)


def _collapsed(share: float, count: int) -> float:
    """Return the normalised entropy if one operator has `share` and the others are equal."""
    rest = (1 - share) / max(count - 1, 1)
    return -(share * math.log(share) + (1 - share) * math.log(rest)) / math.log(max(count, 2))


def depth_figure(run: Run) -> Figure:
    """Draw exit weights, and widths of the current operators in their ranges, over epochs."""
    lines = [line for line in run.of('epoch') if 'exits' in line]
    exits, blocks = run.header['space']['exits'], run.header['space']['blocks']
    names = [(stage, i) for stage, depths in exits.items() for i in range(len(depths))]
    weights = np.array([[line['exits'][stage][i] for line in lines] for stage, i in names])
    figure = Figure(figsize=(9.6, 1.6 + 0.2 * max(len(names), len(blocks))))
    left, right = figure.subplots(1, 2)
    ends = lines[0]['epoch'] + 0.5, lines[-1]['epoch'] + 1.5
    look = {'cmap': SHADES, 'aspect': 'auto', 'interpolation': 'nearest'}
    image = left.imshow(weights, vmin=0, vmax=1, extent=(*ends, len(names) - 0.5, -0.5), **look)
    depths = [f'{exits[stage][i]} block{"s" * (exits[stage][i] != 1)}' for stage, i in names]
    left.set_yticks(range(len(names)), [f'{stage}: {depth}' for (stage, _), depth in zip(names, depths, strict=True)])
    left.set_title('Weight of each exit (■ current)')
    final = lines[-1]['exits']
    for y, (stage, i) in enumerate(names):
        current = exits[stage][i] == _depth(run, lines[-1], stage)
        _at_right(left, y, f'{final[stage][i]:.2f}' + (' ■' if current else ''))
    figure.colorbar(image, ax=left, pad=0.13, aspect=30, label='weight')
    image = right.imshow(_width_shares(run, lines), vmin=0, vmax=1, extent=(*ends, len(blocks) - 0.5, -0.5), **look)
    right.set_yticks(range(len(blocks)), [block_label(block) for block in blocks])
    right.set_title('Width of the current operator in its range')
    for y, widths in enumerate(lines[-1]['widths']):
        current = _current(run, lines[-1], y)
        _at_right(right, y, '–' if current is None else str(widths[current]))
    figure.colorbar(image, ax=right, pad=0.13, aspect=30, label='0: least, 0.5: at the start, 1: most')
    for axis, sizes in ((left, [len(d) for d in exits.values()]), (right, _stage_sizes(blocks))):
        for edge in np.cumsum(sizes)[:-1]:
            axis.axhline(edge - 0.5, color='white', linewidth=2)
        axis.set_xlabel('epochs done')
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(length=2)
        axis.spines[:].set_visible(False)
    return figure


def _stage_sizes(blocks: list[dict]) -> list[int]:
    return [len(list(own)) for _, own in groupby(blocks, key=lambda block: block['stage'])]


def _at_right(axis: Axes, y: int, text: str) -> None:
    """Write text to the right of row `y` of a heat map."""
    axis.annotate(
        text, (1, y), (3, 0), xycoords=('axes fraction', 'data'), textcoords='offset points', va='center', fontsize=7
    )


def _width_shares(run: Run, lines: list[dict]) -> np.ndarray:
    """Return the width of each block's operator between least (0) and most (1): [blocks, epochs].

    The operator is the current one, or the most probable one of a block that is dropped.
    """
    shares = np.zeros((len(run.header['space']['blocks']), len(lines)))
    for y, block in enumerate(run.header['space']['blocks']):
        for x, line in enumerate(lines):
            op = _operator(run, line, y)
            low, _, high = block['widths'][op]
            shares[y, x] = (line['widths'][y][op] - low) / max(high - low, 1)
    return shares


def training_figure(run: Run) -> Figure:
    """Draw loss and accuracy of training and validation, and the learning rate, over epochs."""
    figure = Figure(figsize=(7.2, 6.2))
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[1.3, 1.3, 0.7])
    lines = run.of('epoch')
    epochs = [line['epoch'] + 1 for line in lines]
    for axis, name in zip(axes, ('loss', 'top1'), strict=False):
        x, y = _over(run.of('step'), name)
        axis.plot(x, y, color='#BDBDBD', linewidth=0.8, label='training, within the epoch')
        axis.plot(epochs, [line['train'][name] for line in lines], 's--', color=BLUE, markersize=3, label='training')
        axis.plot(epochs, [line['val'][name] for line in lines], 'o-', color=ORANGE, markersize=3, label='validation')
    best = max(range(len(lines)), key=lambda i: lines[i]['val']['top1'] or 0)
    axes[1].annotate(
        f'best {lines[best]["val"]["top1"]:.2f}',
        (epochs[best], lines[best]['val']['top1']),
        (0, 6),
        textcoords='offset points',
        ha='right',
        va='bottom',
    )
    axes[0].set_ylabel('loss')
    axes[1].set_ylabel('top-1 in %')
    axes[1].margins(y=0.14)
    axes[0].legend(loc='best')
    starts, rates = [line['epoch'] for line in lines], [line['lr'] for line in lines]
    axes[2].plot([*starts, epochs[-1]], [*rates, rates[-1]], drawstyle='steps-post', color=BLACK)
    axes[2].set_ylabel('learning rate')
    axes[2].set_xlabel('epochs done')
    for axis in axes:
        axis.grid(axis='y', color='#E0E0E0', linewidth=0.6)
        axis.set_xlim(0, 1.012 * run.header['flags']['epochs'])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def figures_of(run: Run) -> dict[str, tuple[str, Callable[[], Figure]]]:
    """Return the pictures that a run allows: name -> (caption, function that draws it)."""
    epochs = run.of('epoch')
    found: dict[str, tuple[str, Callable[[], Figure]]] = {}
    network = run.header.get('network') or (epochs[-1].get('network') if epochs else None)
    if network:
        title, timed = network_title(run, network), with_measured(run, network)
        found['network'] = (title, lambda: network_figure(timed, title))
    if epochs and run.header['task'] == 'search':
        found['search'] = ('Latency of the current architecture, loss and accuracy', lambda: search_figure(run))
        found['operators'] = ('Operator probabilities of every block', lambda: operators_figure(run))
        found['depth'] = ('Weights of the exits, and widths', lambda: depth_figure(run))
    if epochs and run.header['task'] == 'training':
        found['training'] = ('Training', lambda: training_figure(run))
    return found


def with_measured(run: Run, network: dict) -> dict:
    """Return a network with the measured latencies of its blocks, if the run has them."""
    parts = [line['parts'] for line in run.of('latency') if len(line.get('parts', ())) == len(network['blocks']) + 2]
    if not parts:
        return network
    rows = [row | {'latency': ms} for row, ms in zip(network['blocks'], parts[-1][1:-1], strict=True)]
    return network | {'blocks': rows, 'latency': sum(parts[-1]), 'unit': 'ms', 'latency_name': 'measured latency'}


def network_title(run: Run, network: dict) -> str:
    """Return a line with MACs, parameters and latencies of a run's network."""
    parts = [f'{network["macs"]:.1f} M MACs', f'{network["params"]:.2f} M parameters']
    if network['latency'] is not None and network['unit'] == 'ms':
        parts.append(f'{network["latency"]:.2f} ms by the table')
    for line in run.of('latency'):
        parts.append(f'{line["ms"]:.2f} ms measured on {line["device"]}, batch {line["batch_size"]}')
    what = (
        f'architecture after {run.of("epoch")[-1]["epoch"] + 1} epochs' if run.header['task'] == 'search' else 'network'
    )
    return f'{run.name}, {what}: {", ".join(parts)}'
