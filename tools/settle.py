"""Values of flags that need not be given: earlier steps have written them into files."""

import argparse
import copy
import logging
from collections.abc import Iterable
from typing import TypeVar

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
    changed = copy.copy(args)
    vars(changed).update(values)
    return changed
