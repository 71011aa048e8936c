"""The one logger of the project, `logging.getLogger('tf-nas')`: lines to the console, and to the log of a run."""

import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

from tqdm import tqdm

from tools.errors import silence

CAPACITY = 10_000  # lines; without a target, a MemoryHandler keeps more too

log = logging.getLogger('tf-nas')


class _Lines(logging.Formatter):
    """Formatter that marks warnings."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.mark = 'warning: ' if record.levelno >= logging.WARNING else ''
        return super().formatMessage(record)


TIMED = _Lines('%(asctime)s %(mark)s%(message)s', '%m/%d %H:%M:%S')


class _Console(logging.Handler):
    """Lines to stdout, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # stdout is closed, such as by `| head` or a lost connection: the run goes on
            silence(sys.stdout)


class _LogFile(logging.FileHandler):
    """Log file whose errors, such as a full disk, are errors of the run."""

    def handleError(self, _record: logging.LogRecord) -> None:
        raise  # noqa: PLE0704  (called where the error is being handled)


def start_console() -> None:
    """Log to stdout, without the level DEBUG, and hold all lines for the log file of a run, which may open later."""
    log.setLevel(logging.DEBUG)
    for handler in list(log.handlers):
        log.removeHandler(handler)
    console = _Console(logging.INFO)
    console.setFormatter(_Lines('%(mark)s%(message)s'))
    log.addHandler(console)
    log.addHandler(MemoryHandler(CAPACITY, flushLevel=logging.CRITICAL + 1, flushOnClose=False))


def open_log(path: Path) -> logging.Handler:
    """Append the lines held so far, and all that follow, to a file. From now on the console shows times too."""
    file = _LogFile(path, encoding='utf-8')
    file.setFormatter(TIMED)
    for handler in list(log.handlers):
        if isinstance(handler, MemoryHandler):
            log.removeHandler(handler)
            handler.setTarget(file)
            handler.flush()
        elif isinstance(handler, _Console):
            handler.setFormatter(TIMED)
    log.addHandler(file)
    return file


def close_log(handler: logging.Handler) -> None:
    """Close what `open_log` returned; the process may begin another run."""
    handler.close()
    start_console()
