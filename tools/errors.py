"""Exceptions that end a script in one line on stderr."""


class BadInput(ValueError):
    """Input that cannot be used: the message names the value, where it came from, and what would be good.

    A script turns it into one line on stderr and exit code 2. Any exception without such a meaning is a bug of ours and
    keeps its traceback.
    """


class RunFailed(RuntimeError):
    """A run that cannot go on though its input was good, such as for want of disk space: one line, exit code 1."""
