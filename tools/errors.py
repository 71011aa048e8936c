"""The one exception that means 'the user can mend this'."""


class BadInput(ValueError):
    """Input that cannot be used: the message names the value, where it came from, and what would be good.

    A script turns it into one line on stderr and exit code 2. Every other exception is a bug of ours and keeps its
    traceback.
    """
