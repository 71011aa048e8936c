"""The command of the next step (search, parse, train, test, export), for the end of each script."""

import logging
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger('tf-nas')

ROOT = Path(__file__).resolve().parent.parent
"""Folder of the scripts."""

WIDTH = 120
"""Columns after which a printed command goes on in the next line."""


def shown(path: str | Path) -> str:
    """Return a path relative to the working directory if it is below that, else the absolute one."""
    absolute = Path(path).absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def command(script: str, flags: Mapping[str, Any], width: float = WIDTH) -> str:
    """Return the command line of a script of this project, quoted for a shell, in lines of at most `width` columns.

    Args:
        flags: values by name; a path as `Path`. None and False leave a flag out, True has no value.
    """
    python = 'python' if shutil.which('python') == sys.executable else sys.executable
    words = [shlex.join([python, shown(ROOT / script)])]
    for name, value in flags.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
        texts = [shown(one) if isinstance(one, Path) else str(one) for one in values]
        words.append(shlex.join([f'--{name}', *texts]))
    lines = ['']
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + 3 > width:
            lines.append('   ')
        lines[-1] += f'{" " if lines[-1] else ""}{word}'
    return ' \\\n'.join(lines)


def suggest(what: str, script: str, flags: Mapping[str, Any]) -> None:
    """Log the command of the next step, on lines of its own. `what`: the step."""
    log.info('next, %s:\n%s', what, command(script, flags))


def changed(args, *names: str, **usual: Any) -> dict[str, Any]:
    """Return those flags of `names` and `usual` that the next step should have too: all but the usual values."""
    given = {name: getattr(args, name, None) for name in (*names, *usual)}
    return {name: value for name, value in given.items() if value is not None and value != usual.get(name)}


def batch_for(images: int, most: int = 512) -> int:
    """Return the largest power of two, of 2 to `most`, that makes at least eight batches an epoch of these images."""
    return min(most, max(2, 1 << max(images // 8, 2).bit_length() - 1))
