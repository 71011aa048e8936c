"""Exceptions that end a script in one line on stderr."""

import errno
import os
import select
from typing import TextIO

import torch

INTERRUPTED = 130
"""Exit code after SIGINT."""


class BadInput(ValueError):
    """Input that cannot be used. The message names the value, where it came from, and what would be right.

    A script prints it as one line on stderr and exits with code 2. An unexpected exception is a bug and keeps its
    traceback.
    """


class RunFailed(RuntimeError):
    """A run that cannot continue although its input was good. A script prints one line and exits with code 1."""


def silence(stream: TextIO) -> None:
    """Send all further output of stdout or stderr nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def has_no_reader(stream: TextIO) -> bool:
    """Whether stdout or stderr is a pipe or terminal that nothing reads any more."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return bool(poll.poll(0))


DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Errors of writing: disk full, quota, file size limit, read-only file system."""

ACCESS = {errno.EACCES, errno.EPERM, errno.EIO}
"""Errors of reading or writing: no permission, broken disk."""

ENOUGH_FILES = 65536

MEMORY_FLAGS = ('checkpoint_ops', 'amp', 'opt_level', 'grad_accum')
"""Flags that reduce memory, in the scripts that have them."""


def explain(error: Exception, args) -> str:
    """Return one line about an error caused by the machine (memory, disk, processes); empty for other errors.

    Args:
        args: the flags of the run.
    """
    text = str(error)
    if isinstance(error, RunFailed):
        return text
    if 'shared memory' in text or 'Bus error' in text:
        return (
            'a process that loads images ran out of shared memory (/dev/shm); a container needs --shm-size 8g or'
            ' --ipc host (docker run), --workers 0 needs none'
        )
    if 'Too many open files' in text or 'ancdata' in text:
        return f'too many open files; run: ulimit -n {ENOUGH_FILES}, or use fewer --workers, 0 at least'
    from_worker = isinstance(error, (EOFError, ConnectionError)) and getattr(args, 'workers', 0)
    if not from_worker and ('Connection closed by peer' in text or 'Connection reset by peer' in text):
        return 'another process of this run ended; see its message'
    if from_worker or text.startswith('DataLoader worker'):
        detail = text.splitlines()[0] if text else 'in the middle of a batch'
        return (
            f'a process that loads images ended ({detail}); the system may have killed it to free memory: fewer'
            ' --workers need less'
            + ('; --snapshot auto resumes from the last checkpoint' if 'snapshot' in args else '')
        )
    if isinstance(error, OSError):
        verb = 'written' if error.errno in DISK else 'opened'
        name = error.filename or 'a file'
        known = error.errno in DISK | ACCESS
        return f'{name} could not be {verb} ({error.strerror}); earlier files are intact' if known else ''
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        sizes = ', '.join(f'--{name} {getattr(args, name)}' for name in ('batch_size', 'img_size') if name in args)
        flags = ', '.join(f'--{name}' for name in MEMORY_FLAGS if name in args)
        also = f'; {flags} reduce memory too' if flags else ''
        return f'out of memory with {sizes}; smaller ones need less{also} ({text.splitlines()[0] if text else error!r})'
    return ''
