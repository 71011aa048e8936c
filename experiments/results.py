"""The results of three_freedoms.py: results.jsonl, a table in Markdown, a picture."""

import itertools
import json
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats

from models.describe import changed_blocks, hardly_learned
from models.search_space import FREEDOMS, SPACE
from tools.files import write_atomic, write_text
from tools.report.summary import ROWS
from tools.run.metrics import read_run

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend without a screen)


@dataclass(frozen=True)
class Run:
    """One network from search to test.

    Args:
        arm: name in the table.
        seed: of search and training; of the draw if there is no search.
        target: as for `--target_lat`.
        freedoms: words after `--freedoms`; None: an architecture drawn at random, no search.
    """

    arm: str
    seed: int
    target: str
    freedoms: tuple[str, ...] | None = FREEDOMS

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f'{self.arm}-{self.seed}'


def read_numbers(text: str, **patterns: str) -> dict[str, float]:
    """Return the last number that each pattern's group matches in a text, by the pattern's name."""
    found = {name: re.findall(pattern, text) for name, pattern in patterns.items()}
    return {name: float(values[-1]) for name, values in found.items() if values}


def result_of(run: Run, args, table) -> dict | None:
    """Return the results of a tested run as plain values; None if it is not tested yet."""
    folder = Path(args.save) / run.name
    records = {path.stem: json.loads(path.read_text()) for path in folder.glob('*.json') if path.stem != 'architecture'}
    if not records.get('test', {}).get('finished'):
        return None
    target = table.target(run.target, SPACE)
    result = {'arm': run.arm, 'seed': run.seed, 'target': target, 'unit': table.unit}
    result |= read_numbers(records['test']['output'], top1=r'top1: ([\d.]+)', top5=r'top5: ([\d.]+)')
    parsed = dict(predicted=r'Lat_LUT: ([\d.]+)', macs=r'FLOPs: ([\d.]+)', params=r'Params: ([\d.]+)')
    result |= read_numbers(records['parse']['output'], **parsed)
    measured = [r['output'] for name, r in records.items() if name.startswith('measure-') and r['finished']]
    # the first of each output, which has the table's batch size
    times = [float(re.search(ROWS['measured'][0], text, re.M)[1]) for text in measured]
    if times:
        result['measured'] = statistics.median(times)
    result['off_target'] = 100 * (result['predicted'] / target - 1)
    if times and table.unit == 'ms':
        result['measured_off_target'] = 100 * (result['measured'] / target - 1)
    if run.freedoms is not None:
        result |= {'search_s': records['search']['wall_s'], 'search_cpu_s': records['search']['cpu_s']}
        result |= search_result(folder, args)
    result |= {'train_s': records['train']['wall_s'], 'train_cpu_s': records['train']['cpu_s']}
    for weights in folder.glob('train/*/checkpoint.pth.tar'):
        result['test_loss'] = read_run(weights.with_name('metrics.jsonl')).of('epoch')[-1]['val']['loss']
    paths = [r['output'] for name, r in records.items() if name.startswith('paths-') and r['finished']]
    if paths:
        own, *others = max((re.findall(r'supernet top1 ([\d.]+)', text) for text in paths), key=len)
        result |= {'own_path_top1': float(own), 'path_top1': [float(value) for value in others]}
    if records.get('runner_ups', {}).get('finished'):
        own, *others = re.findall(r'supernet top1 ([\d.]+)', records['runner_ups']['output'])
        result |= {'choice_test_top1': float(own), 'runner_up_test_top1': [float(value) for value in others]}
    return result


def search_result(folder: Path, args) -> dict:
    """Return what the metrics of a search show: the supernet's top-1 when architecture steps begin and at the end,
    whether it counts, the mean entropy of operators by epoch, [blocks whose choice changed, blocks] by epoch, from the
    architecture's second on, and the operator that wins most blocks."""
    (model,) = folder.glob('search/*/searched_model_*.pth.tar')  # a search killed early leaves a folder without one
    epochs = read_run(model.with_name('metrics.jsonl')).of('epoch')
    entropies = [statistics.mean(stats.entropy(row, base=len(row)) for row in line['ops']) for line in epochs]
    winners = [int(np.argmax(row)) for row in epochs[-1]['ops']]
    most = statistics.mode(winners)
    chosen = [line['arch'] for line in epochs if line.get('latency')]
    begin = next(line['val']['top1'] for line in epochs if line['epoch'] == args.warmup_epochs - 1)
    return {
        'supernet_top1': begin,
        'supernet_top1_end': epochs[-1]['val']['top1'],
        'counts': not hardly_learned(begin, args.num_classes),
        'entropy': entropies,
        'changed': [changed_blocks(*pair) for pair in itertools.pairwise(chosen)],
        'winner': most,
        'winner_share': winners.count(most) / len(winners),
    }


def interval(values: list[float], digits: int = 2) -> str:
    """Return mean and 95 % t-interval as text."""
    if not values:
        return ''
    mean = statistics.mean(values)
    if len(values) < 2:
        return f'{mean:.{digits}f} (n = 1)'
    return f'{mean:.{digits}f} ± {half_interval(values):.{digits}f}'


def half_interval(values: list[float]) -> float:
    """Return half of the mean's 95 % t-interval; 0 of one value."""
    if len(values) < 2:
        return 0.0
    return float(stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5)


def difference(ours: list[float], full: list[float]) -> str:
    """Return the mean difference to the full method with Welch's 95 % interval, as text."""
    if min(len(ours), len(full)) < 2:
        return ''
    ends = stats.ttest_ind(ours, full, equal_var=False).confidence_interval()
    return f'{statistics.mean(ours) - statistics.mean(full):+.2f} ({ends.low:+.2f} to {ends.high:+.2f})'


def holm(values: dict[str, float]) -> dict[str, float]:
    """Return p-values adjusted for their number by Holm's step-down method (1979)."""
    adjusted, most = {}, 0.0
    for i, name in enumerate(sorted(values, key=values.__getitem__)):
        most = adjusted[name] = max(most, min(1.0, (len(values) - i) * values[name]))
    return adjusted


def p_values(top1: dict[str, list[float]]) -> dict[str, float]:
    """Return Welch's p of each arm against `full`: as it is for `random`, adjusted by Holm over the others.

    Args:
        top1: accuracies by arm.
    """
    others = {arm: values for arm, values in top1.items() if arm != 'full' and len(values) > 1}
    if len(top1.get('full', ())) < 2:
        return {}
    raw = {arm: float(stats.ttest_ind(ours, top1['full'], equal_var=False).pvalue) for arm, ours in others.items()}
    return raw | holm({arm: p for arm, p in raw.items() if arm != 'random'})


COLUMNS = {
    'predicted': 'predicted', 'off_target': 'off target [%]', 'measured': 'measured [ms]',
    'measured_off_target': 'off target, measured [%]', 'macs': 'MACs [M]',
    'params': 'params [M]', 'search_s': 'search [s]', 'search_cpu_s': 'search [CPU s]',
    'supernet_top1': 'supernet top-1 at the first architecture step', 'supernet_top1_end': 'at the end',
    'last_entropy': 'entropy at the end', 'winner_share': 'blocks won by one operator',
}  # fmt: skip


def table_text(results: list[dict], planned: Counter[str]) -> str:
    """Return a Markdown table: one row for each arm, means with 95 % intervals over seeds.

    Args:
        planned: number of runs by arm.
    """
    unit = results[0]['unit']
    head = ['arm', 'n', 'top-1 [%]', 'top-1 against full', 'p', 'top-5 [%]']
    head += [f'{name} [{unit}]' if key == 'predicted' else name for key, name in COLUMNS.items()]
    rows = [head, ['---'] * len(head)]
    counted = [r | {'last_entropy': r['entropy'][-1]} if 'entropy' in r else r for r in results]
    counted = [r for r in counted if r.get('counts', True)]
    top1 = {arm: [r['top1'] for r in counted if r['arm'] == arm] for arm in planned}
    p = p_values(top1)
    for arm, of in planned.items():
        mine = [r for r in counted if r['arm'] == arm]
        at_chance = sum(r['arm'] == arm for r in results) - len(mine)
        n = f'{len(mine)} of {of}' if len(mine) < of else str(of)
        row = [arm, n + (f' ({at_chance} at chance)' if at_chance else ''), interval(top1[arm])]
        row += [difference(top1[arm], top1.get('full', [])) if arm != 'full' else '']
        row += [f'{p[arm]:.3f}' if arm in p else '']
        row += [interval([r[key] for r in mine if key in r]) for key in ('top5', *COLUMNS)]
        rows.append(row)
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def correlation(results: list[dict]) -> tuple[str, list[tuple[float, float]]]:
    """Return the rank correlation of supernet and trained-alone accuracy of the random networks, as text with one entry
    for each search of the full method, and the pairs of accuracies."""
    alone = [r['top1'] for r in sorted((r for r in results if r['arm'] == 'random'), key=lambda r: r['seed'])]
    lines, pairs = [], []
    for result in results:
        if len(result.get('path_top1', [])) == len(alone) > 2:
            found = stats.spearmanr(result['path_top1'], alone)
            lines.append(
                f'seed {result["seed"]}: rho = {found.statistic:+.2f} (p = {found.pvalue:.2f}, n = {len(alone)})'
            )
            pairs += zip(result['path_top1'], alone, strict=True)
    return '; '.join(lines), pairs


def draw(results: list[dict], pairs: list, save: Path) -> None:
    """Draw the accuracy of each arm's networks, entropy over epochs, and supernet against trained-alone accuracy."""
    arms = list(dict.fromkeys(r['arm'] for r in results))
    colours = dict(zip(arms, itertools.cycle(plt.get_cmap('tab10').colors), strict=False))
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), dpi=110)
    for row, arm in enumerate(arms):
        mine = [r for r in results if r['arm'] == arm]
        top1 = [r['top1'] for r in mine]
        half = half_interval(top1)
        axes[0].scatter(top1, [row] * len(mine), color=colours[arm], alpha=0.4)
        axes[0].errorbar(statistics.mean(top1), row - 0.25, xerr=half, fmt='|', color=colours[arm], capsize=4)
        curves = [r['entropy'] for r in mine if 'entropy' in r]
        if curves:
            axes[1].plot(range(1, 1 + len(curves[0])), np.mean(curves, axis=0), color=colours[arm], label=arm)
    axes[0].set(xlabel='test top-1 [%]: networks, mean, 95 % interval', yticks=range(len(arms)))
    axes[0].set_yticklabels(arms)
    axes[0].invert_yaxis()
    axes[1].set(xlabel='epoch of the search', ylabel='entropy of operators (1: uniform)')
    axes[2].set(xlabel='supernet top-1 of the path [%]', ylabel='trained alone, test top-1 [%]')
    if pairs:
        axes[2].scatter(*zip(*pairs, strict=True), s=12, alpha=0.5, color='0.3')
    for axis in axes:
        axis.grid(alpha=0.3)
    if axes[1].lines:
        axes[1].legend(fontsize=7)
    figure.tight_layout()
    write_atomic(save / 'three_freedoms.png', partial(figure.savefig, format='png'))
    plt.close(figure)


def report(runs: list[Run], table, args) -> None:
    """Write results.jsonl, table.md and the picture of the runs that are tested."""
    save = Path(args.save)
    results = [result for run in runs if (result := result_of(run, args, table))]
    write_text(save / 'results.jsonl', ''.join(json.dumps(result) + '\n' for result in results))
    if results:
        summarise(results, Counter(run.arm for run in runs), [correlation(results)], save)


def summarise(results: list[dict], planned: Counter[str], found: list[tuple[str, list]], save: Path) -> None:
    """Write table.md and the picture.

    Args:
        planned: number of runs by arm.
        found: the `correlation` of each experiment.
    """
    ranks, pairs = '; '.join(text for text, _ in found if text), [pair for _, own in found for pair in own]
    text = table_text(results, planned)
    text += f'\nRank correlation of supernet paths and the same networks trained alone: {ranks}\n' if ranks else ''
    write_text(save / 'table.md', text)
    draw(results, pairs, save)
