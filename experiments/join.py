"""Join the results of several experiments of three_freedoms.py, with different seeds, in one table and one picture.

    python experiments/join.py one/results.jsonl another/results.jsonl \\
        --save both
"""

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.results import correlation, summarise
from tools.errors import BadInput
from tools.options import Parser, run_script


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument('results', nargs='+', help='files results.jsonl')
    parser.add_argument('--save', required=True, help='folder that gets table.md and three_freedoms.png')
    return parser.parse_args()


def read_results(path: str) -> list[dict]:
    """Return the lines of a results.jsonl."""
    try:
        results = [json.loads(line) for line in Path(path).read_text().splitlines()]
        for result in results:
            result['arm'], result['seed'], result['unit'], float(result['top1']), float(result['predicted'])
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise BadInput(f'{path}: not a results.jsonl of three_freedoms.py ({e!r})') from e
    return results


def main(args):
    """Join the files. Of runs with the same arm and seed, the first one counts."""
    experiments = [read_results(path) for path in args.results]
    results = {}
    for path, experiment in zip(args.results, experiments, strict=True):
        for result in experiment:
            name = f'{result["arm"]}-{result["seed"]}'
            if name in results:
                print(f'left out: {name} of {path}: an earlier file has it')
            results.setdefault(name, result)
    runs = list(results.values())
    for what, values in (
        ('unit', {run['unit'] for run in runs}),
        ('length of searches in epochs', {len(run['entropy']) for run in runs if 'entropy' in run} or {0}),
    ):
        if len(values) != 1:
            raise BadInput(f'{" ".join(args.results)}: expected one {what}, found {sorted(values)}')
    Path(args.save).mkdir(parents=True, exist_ok=True)
    summarise(runs, Counter(run['arm'] for run in runs), [correlation(own) for own in experiments], Path(args.save))
    print((Path(args.save) / 'table.md').read_text())


if __name__ == '__main__':
    run_script(main, get_args())
