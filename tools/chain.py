"""What a step (search, parse, train, test, export) hands to the next one: values of flags, and its command."""

import argparse
import copy
import logging
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tools.environment import ROOT

log = logging.getLogger('tf-nas')

Value = TypeVar('Value')


def settle(flag: str, given: Value | None, known: Iterable[tuple[Value | None, object]], usual: Value) -> Value:
    """Return the value of a flag: the given one, else the first that a file has, else the usual one.

    Log if a file gives the value, and warn if a file has another one.

    Args:
        known: pairs of the value in a file, None for none, and the name of the file.
    """
    there = [(value, where) for value, where in known if value is not None]
    if given is None and not there:
        return usual
    value = there[0][0] if given is None else given
    if given is None:
        log.info('%s %s: from %s', flag, value, there[0][1])
    for other, where in there:
        if other != value:
            log.warning('%s is %s, %s has %s', flag, value, where, other)
    return value


def with_flags(args: argparse.Namespace, **values: object) -> argparse.Namespace:
    """Return the flags with some values replaced; `args` stays as it is."""
    new = copy.copy(args)
    vars(new).update(values)
    return new


def shown(path: str | Path) -> str:
    """Return a path relative to the working directory if it is below that, else the absolute one."""
    absolute = Path(path).absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def command(script: str, flags: Mapping[str, Any], between: str = ' ') -> str:
    """Return the command line of a script of this project, quoted for a shell.

    Args:
        flags: values by name; a path as `Path`. None and False leave a flag out, True has no value.
        between: text between two flags.
    """
    python = 'python' if shutil.which('python') == sys.executable else sys.executable
    words = [[python, shown(ROOT / script)]]
    for name, value in flags.items():
        if value is None or value is False:
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        texts = [shown(one) if isinstance(one, Path) else str(one) for one in values if one is not True]
        words.append([f'--{name}', *texts])
    return between.join(map(shlex.join, words))


def suggest(what: str, script: str, flags: Mapping[str, Any]) -> None:
    """Log the command of the next step, on lines of its own. `what`: the step."""
    log.info('next, %s:\n%s', what, command(script, flags, ' \\\n    '))


def changed(args: argparse.Namespace, *names: str, **usual: Any) -> dict[str, Any]:
    """Return those flags of `names` and `usual` that the next step should have too: all but the usual values."""
    given = {name: getattr(args, name, None) for name in (*names, *usual)}
    return {name: value for name, value in given.items() if value is not None and value != usual.get(name)}
