"""Run folders and their logs."""

import logging
import re
import sys
import time
from pathlib import Path

from tqdm import tqdm

from tools.errors import BadInput


def make_run_folder(save: str | Path, kind: str, note: str) -> Path:
    """Make and return `<save>/<kind>-<time>-<note>/`, which did not exist before.

    Raises:
        BadInput: `save` cannot be written to.
    """
    if '/' in note or '\0' in note:
        raise BadInput(f'--note {note!r}: becomes part of the name of a folder; leave out the /')
    stem = f'{kind}-{time.strftime("%Y%m%d-%H%M%S")}-{note}'
    for suffix in ['', *(f'.{i}' for i in range(2, 100))]:
        folder = Path(save) / (stem + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as e:
            raise BadInput(f'--save {save}: cannot make a run folder there ({e.strerror})') from e
        return folder
    raise BadInput(f'--save {save}: too many runs of the same name {stem}')


def run_folders(save: str | Path, kind: str, note: str) -> list[Path]:
    """All folders that `make_run_folder` made with these arguments."""
    name = re.compile(rf'{kind}-\d{{8}}-\d{{6}}-{re.escape(note)}(\.\d+)?')
    return [folder for folder in Path(save).glob(f'{kind}-*/') if name.fullmatch(folder.name)]


class _Console(logging.Handler):
    """Writes to stdout, above a bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _LogFile(logging.FileHandler):
    """A log that the disk does not take is an error of the run, not a message among others."""

    def handleError(self, _record: logging.LogRecord) -> None:
        raise  # noqa: PLE0704  (called where the error is being handled)


def make_logger(folder: Path | None) -> logging.Logger:
    """A logger to stdout and `<folder>/log.txt` (appended, a line at a time); a silent one where `folder` is None."""
    logger = logging.Logger('tf-nas', logging.INFO if folder else logging.CRITICAL)
    if folder:
        formatter = logging.Formatter('%(asctime)s %(message)s', datefmt='%m/%d %H:%M:%S')
        for handler in (_Console(), _LogFile(folder / 'log.txt', encoding='utf-8')):
            handler.setFormatter(formatter)
            logger.addHandler(handler)
    return logger


def log_flags(logger: logging.Logger, args) -> None:
    """One line a flag, so that a log tells how its run was started."""
    for name, value in sorted(vars(args).items()):
        logger.info('--%s %s', name, value)
