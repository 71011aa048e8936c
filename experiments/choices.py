"""Compare what searches choose with its runner-ups, in their own supernets.

    python experiments/choices.py experiments/evidence/second_follow_up.jsonl \\
        --random experiments/evidence/preregistered.jsonl

Each line of the results is a search: `arm`, `seed`; `choice_test_top1` and `runner_up_test_top1`, accuracies with the
weights of the supernet; `changed`, [blocks whose choice changed, blocks], and `entropy`, by epoch; `top1`, trained
alone. `--random` has the random networks to compare with.
"""

import statistics
import sys
from itertools import combinations
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.join import read_results
from experiments.results import difference, half_interval
from tools.errors import BadInput
from tools.options import Parser, run_script

NEEDED = ('choice_test_top1', 'runner_up_test_top1', 'changed', 'entropy')


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument('results', help='file with a line for each search')
    parser.add_argument('--random', required=True, help='file results.jsonl of three_freedoms.py')
    return parser.parse_args()


def signed(values: list[float]) -> str:
    """Return mean and 95 % t-interval, with signs, as text."""
    mean, half = statistics.mean(values), half_interval(values)
    return f'{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})'


def margins(results: list[dict]) -> dict[int, float]:
    """Return by seed how much better the choice is than its runner-ups on average, in percentage points."""
    return {r['seed']: r['choice_test_top1'] - statistics.mean(r['runner_up_test_top1']) for r in results}


def main(args):
    """Print the figures of each arm, then differences of arms, paired by seed."""
    results = read_results(args.results)
    if missing := [name for name in NEEDED for result in results if not result.get(name)]:
        raise BadInput(f'{args.results}: a line has no {missing[0]}')
    drawn = [result['top1'] for result in read_results(args.random) if result['arm'] == 'random']
    arms = {arm: [r for r in results if r['arm'] == arm] for arm in dict.fromkeys(r['arm'] for r in results)}
    for arm, mine in arms.items():
        beaten = np.concatenate([np.less(r['runner_up_test_top1'], r['choice_test_top1']) for r in mine])
        changed, blocks = np.sum([r['changed'][-1] for r in mine], axis=0)
        print(
            f'{arm}: choice against runner-ups {signed(list(margins(mine).values()))}, n = {len(mine)};'
            f' better than {100 * beaten.mean():.0f} % of {len(beaten)}'
        )
        entropy = statistics.mean(r['entropy'][-1] for r in mine)
        print(f'  {100 * changed / blocks:.0f} % of the blocks changed in the last epoch; entropy {entropy:.2f}')
        print(f'  trained alone, against random: {difference([r["top1"] for r in mine], drawn)}')
    for one, other in combinations(arms, 2):
        first, second = margins(arms[one]), margins(arms[other])
        more = [second[seed] - first[seed] for seed in first.keys() & second.keys()]
        if more:
            print(f'{other} against {one}, {len(more)} seeds: margin {signed(more)}')


if __name__ == '__main__':
    run_script(main, get_args())
