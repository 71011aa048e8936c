"""Separate differences of networks from differences of trainings, and compare networks with their ranks in supernets.

    python experiments/repeated.py experiments/evidence/follow_up.jsonl \\
        --first experiments/evidence/preregistered.jsonl

Each line of the results is a training: `seed` of the random network, `train_seed`, `at` (the target), `top1`. The
networks at the target of most lines are analysed, the others compared by target. `--first` has an earlier training of
each network, and its accuracy in supernets.
"""

import re
import sys
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.join import read_results
from experiments.results import difference
from tools.errors import BadInput
from tools.options import Parser, run_script


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument('results', help='file with a line for each training')
    parser.add_argument('--first', required=True, help='file results.jsonl of three_freedoms.py')
    return parser.parse_args()


class Spread(NamedTuple):
    """Analysis of variance of networks with several trainings each: F test, standard deviations, and how much of the
    variance of a network's mean is its own."""

    statistic: float
    p: float
    networks: float
    low: float
    high: float
    trainings: float
    reliability: float


def spread(top1: np.ndarray) -> Spread:
    """Return the analysis of accuracies [networks, trainings]; the interval of the networks' deviation is of 95 %.

    The interval follows from that of the ratio of variances, by F; the deviation of trainings is taken as it is.
    """
    count, times = top1.shape
    within = top1.var(axis=1, ddof=1).mean()
    statistic = times * top1.mean(axis=1).var(ddof=1) / within
    freedom = count - 1, count * (times - 1)
    ratios = [(statistic / bound - 1) / times for bound in (1, *stats.f.ppf([0.975, 0.025], *freedom))]
    deviations = [max(0.0, ratio * within) ** 0.5 for ratio in ratios]
    p = stats.f.sf(statistic, *freedom)
    return Spread(statistic, p, *deviations, within**0.5, max(0.0, 1 - 1 / statistic))


def rank_correlation(one, other) -> str:
    """Return Spearman's rho of two lists of accuracies, as text."""
    found = stats.spearmanr(one, other)
    return f'rho = {found.statistic:+.2f} (p = {found.pvalue:.2f}, n = {len(one)})'


def trainings(results: list[dict], path: str) -> tuple[list[int], np.ndarray, dict[str, list[float]]]:
    """Return the seeds of the networks of the usual target, their accuracies [networks, trainings], and by target those
    of the other networks.

    Raises:
        BadInput: a line has no target, or the networks have not equally many trainings, two or more.
    """
    if odd := [result for result in results if not re.fullmatch(r'[\d.]+%?', str(result.get('at')))]:
        raise BadInput(f"{path}: 'at' is {odd[0].get('at')!r} in a line, should be a target such as 50%")
    usual = Counter(result['at'] for result in results).most_common(1)[0][0]
    by_network, others = defaultdict(list), defaultdict(list)
    for result in results:
        (by_network[result['seed']] if result['at'] == usual else others[result['at']]).append(result['top1'])
    times = {len(values) for values in by_network.values()}
    if len(times) != 1 or times == {1}:
        raise BadInput(f'{path}: expected as many trainings of each network, two or more; found {sorted(times)}')
    seeds = sorted(by_network)
    return seeds, np.array([by_network[seed] for seed in seeds]), others


def main(args):
    """Print the analysis."""
    seeds, top1, others = trainings(read_results(args.results), args.results)
    first = read_results(args.first)
    alone = {result['seed']: result['top1'] for result in first if result['arm'] == 'random'}
    supernets = [result['path_top1'] for result in first if 'path_top1' in result]
    if missing := [seed for seed in seeds if seed not in alone]:
        raise BadInput(f'{args.first}: has no random networks {missing}, which {args.results} has')
    found, mean = spread(top1), top1.mean(axis=1)
    print(f'{len(seeds)} networks, {top1.shape[1]} trainings each: F = {found.statistic:.2f} (p = {found.p:.3f})')
    print(
        f'standard deviation of networks {found.networks:.2f} ({found.low:.2f} to {found.high:.2f}), of trainings'
        f" {found.trainings:.2f}; reliability of a network's mean {found.reliability:.2f}"
    )
    print(f'first training and mean: {rank_correlation([alone[seed] for seed in seeds], mean)}')
    if supernets:
        paths = np.mean(supernets, axis=0)[[sorted(alone).index(seed) for seed in seeds]]
        print(f'mean of {len(supernets)} supernets and mean: {rank_correlation(paths, mean)}')
    for low, high in combinations(sorted(others, key=lambda at: float(at.rstrip('%'))), 2):
        print(f'{high} against {low}: {difference(others[high], others[low])}')


if __name__ == '__main__':
    run_script(main, get_args())
