"""Draw the pictures and the report of a run from its metrics.jsonl, or compare runs.

    python -m tools.plots checkpoints/search-<time>-try
    python -m tools.plots RUN_A RUN_B RUN_C --out comparison

Needs neither images nor a GPU, and also works during the run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools.needed  # noqa: F401  # isort: skip
from tools.options import Parser, run_script
from tools.report.draw import draw_run
from tools.run import read_run


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = Parser(__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='a run folder, or a metrics.jsonl')
    parser.groups['output'].add_argument(
        '--out', metavar='FOLDER', help='folder of the pictures; default: that of the run, or comparison for several'
    )
    return parser.parse_args(argv)


def main(args):
    """Draw one run, or compare several."""
    if len(args.runs) == 1:
        print(f'Drawing {args.runs[0]}', flush=True)
        written = draw_run(args.runs[0], args.out)
    else:
        from tools.report.compare import compare_runs, results, results_text

        runs = [read_run(path) for path in args.runs]
        print(f'Comparing {len(runs)} runs', flush=True)
        written = compare_runs(runs, Path(args.out or 'comparison'))
        print(results_text(*results(runs)))
    for path in written:
        print(path)


if __name__ == '__main__':
    run_script(main, get_args())
