"""Print the figures of networks side by side, from what parsing_model.py and test.py printed of each.

python -m tools.report.summary searched=searched.txt random=random.txt
"""

import re
from pathlib import Path

from tools.errors import BadInput
from tools.options import Parser, run_script

ROWS = {
    'target': (r'^Target: ([\d.]+) ', 'ms'),
    'predicted': (r'^Lat_LUT: ([\d.]+) ', 'ms'),
    'measured': (r'^Lat_[CG]PU bs=\d+[^:]*: ([\d.]+)', 'ms'),
    'MACs': (r'^FLOPs: ([\d.]+)', 'M'),
    'parameters': (r'^Params: ([\d.]+)', 'M'),
    'top-1': (r'^Val_acc_top1: ([\d.]+)', '%'),
}
"""Figure of a network: pattern of the line that has it, and unit."""


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = Parser(__doc__)
    parser.add_argument('networks', nargs='+', metavar='NAME=FILE', help='what was printed of a network')
    return parser.parse_args(argv)


def read_figures(text: str, source: str) -> dict[str, float]:
    """Return the figures in what was printed of a network, the first of each kind.

    Raises:
        BadInput: one is missing.
    """
    found = {name: re.search(pattern, text, re.M) for name, (pattern, _) in ROWS.items()}
    if missing := [name for name, match in found.items() if not match]:
        raise BadInput(
            f'{source}: has no {", ".join(missing)}; parsing_model.py --target_lat --print_lat and test.py print them'
        )
    return {name: float(match[1]) for name, match in found.items()}


def summary(figures: dict[str, dict[str, float]]) -> str:
    """Return the figures of networks, by name, as a table of one column for each."""
    lines = [['', *figures]]
    for row, (_, unit) in ROWS.items():
        digits = 1 if unit == '%' else 2 if unit == 'M' else 3
        lines.append([row, *(f'{one[row]:.{digits}f} {unit}' for one in figures.values())])
    off = [100 * (one['measured'] / one['target'] - 1) for one in figures.values()]
    lines.insert(4, ['  off the target', *(f'{percent:+.1f} %' for percent in off)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return '\n'.join(
        '   '.join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def main(args):
    """Read the files, print the table."""
    figures = {}
    for word in args.networks:
        name, equals, path = word.partition('=')
        if not (name and equals and Path(path).is_file()):
            raise BadInput(f'{word}: should be NAME=FILE, and the file should be there')
        figures[name] = read_figures(Path(path).read_text(), path)
    print(summary(figures))


if __name__ == '__main__':
    run_script(main, get_args())
