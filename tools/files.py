"""Atomic writing of files, and reading of checkpoints without running code."""

import errno
import json
import os
import re
import secrets
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from tools.errors import BadInput

WEIGHT_KEYS = ('state_dict_ema', 'state_dict', 'model')  # of weights in checkpoints; first the moving average
CLASS_NAMES = 'class_names'  # key of the names of the classes in checkpoints: a list of texts by label, or None


def write_atomic(
    path: str | Path, write: Callable[[BinaryIO], object], before_rename: Callable[[], object] = lambda: None
) -> None:
    """Call `write(binary file)` on a temporary file in the folder of `path`, sync it to disk, then rename it."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}')
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # minus the umask, as for any new file
    try:
        with os.fdopen(handle, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        before_rename()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that a new name in it survives a power cut; not all file systems can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def check_target(path: str | Path, flag: str, inputs: Iterable[str | Path | None] = ()) -> None:
    """Check before any work that its result can be written.

    Args:
        inputs: files that are read; None for those that are not given.

    Raises:
        BadInput: the folder of `path` does not exist or cannot be written to, or `path` is a folder or one of `inputs`.
    """
    for read in filter(None, inputs):
        if Path(path).resolve() == Path(read).resolve():
            raise BadInput(f'{flag} {path}: would overwrite {read}, which is read here; choose another name')
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise BadInput(f'{flag} {path}: its folder does not exist; make it first')
    if Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise BadInput(f'{flag} {path}: cannot be written; expected a file in a writable folder')


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_atomic(path, lambda f: f.write(text.encode()))


def save_checkpoint(data: dict[str, Any], path: str | Path, before_rename: Callable[[], object] = lambda: None) -> None:
    """Write a checkpoint whole or not at all.

    Raises:
        OSError: the file cannot be written, such as on a full disk; `path` is unchanged.
    """
    try:
        write_atomic(path, lambda f: torch.save(data, f), before_rename)
    except (OSError, RuntimeError) as e:  # torch wraps the error of the disk in a RuntimeError
        cause = e
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause:
            raise OSError(cause.errno, cause.strerror, str(path)) from e
        raise


def load_checkpoint(path: str | Path, whole: bool = True) -> Any:
    """Read a checkpoint of tensors and plain values to the CPU. Nothing in the file is executed.

    Args:
        whole: check all of the file for damage. Without, tensors stay in the file until they are used.

    Raises:
        BadInput: no such file, damaged, or with objects other than tensors, numbers, strings and containers.
    """
    try:
        if Path(path).suffix == '.safetensors':
            return _read_safetensors(path)
        is_zip = zipfile.is_zipfile(path)
        if whole and is_zip:  # torch writes checksums but does not look at them
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f'{damaged} is damaged')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of torch, on files that are no pickles
            return torch.load(path, map_location='cpu', weights_only=True, mmap=is_zip and not whole)
    except Exception as e:  # a damaged file can raise anything at all
        found = re.search(r'unsupported (?:global|class|type)\S* (?:global )?([\w.]+)', str(e), re.IGNORECASE)
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        if found or reason.startswith('Weights only load failed'):  # torch's advice is to run the file's code
            what = f'a {found[1]}' if found else 'more'
            reason = f'it holds {what}; only tensors, numbers, strings and containers of them are read'
        raise BadInput(f'{path}: cannot be read as a checkpoint ({reason})') from e


def _read_safetensors(path: str | Path) -> dict[str, Any]:
    """Return the weights, and the file's metadata as plain values."""
    try:
        from safetensors import safe_open
        from safetensors.torch import load_file
    except ImportError as e:
        raise ValueError('it needs a package that is not here: pip install safetensors') from e
    with safe_open(path, 'pt') as file:
        texts = file.metadata() or {}
    return {'state_dict': load_file(path), 'meta': {name: _from_json(text) for name, text in texts.items()}}


def _from_json(text: str) -> Any:
    """Return a value of JSON; None for other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def strip_module_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict without the `module.` of data parallelism before each name."""
    return {name.removeprefix('module.'): value for name, value in state.items()}


class Weights(NamedTuple):
    """Weights in a file, without `module.`; their key there, '' if none; the other entries of the file."""

    state: dict[str, Tensor]
    key: str
    about: dict[str, Any]


def read_weights(path: str | Path, average: bool = True) -> Weights:
    """Read the weights in a state dict or checkpoint.

    Args:
        average: prefer the moving average of the weights if the file has one.

    Raises:
        BadInput: the file is unreadable or has no weights.
    """
    checkpoint = load_checkpoint(path)
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    key = ''
    for name in WEIGHT_KEYS if average else WEIGHT_KEYS[1:]:
        if not key and isinstance(entries.get(name), dict):
            key = name
    state = entries[key] if key else entries
    if not state or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise BadInput(f'{path}: holds no state dict of tensors')
    about = {name: value for name, value in entries.items() if name != key} if key else {}
    state = strip_module_prefix(state)
    state.pop('n_averaged', None)  # of a moving average
    return Weights(state, key, about)


def put_weights(model: nn.Module, state: Mapping[str, Tensor], where: str | Path) -> None:
    """Load a state dict without `module.` that came from `where`.

    Raises:
        BadInput: it is of another network; the message counts and names what does not fit.
    """
    own = model.state_dict()
    counters = {name: value for name, value in own.items() if name.endswith('num_batches_tracked')}
    state = counters | dict(state)  # old checkpoints lack them
    check_weights(own, state, where)
    model.load_state_dict(state)


def check_weights(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str | Path) -> None:
    """Compare names and shapes of a state dict without `module.`, which came from `where`, with those wanted.

    Raises:
        BadInput: it is of another network; the message counts and names what does not fit.
    """
    wrong = []
    for name in wanted.keys() & state.keys():
        if state[name].shape != wanted[name].shape:
            wrong.append(f'{name} {list(state[name].shape)} for {list(wanted[name].shape)}')
    problems = {
        'missing': [name for name in wanted if name not in state],
        'unexpected': [name for name in state if name not in wanted],
        'wrong shape': sorted(wrong),
    }
    texts = [f'{len(names)} {what} ({", ".join(names[:3])})' for what, names in problems.items() if names]
    if texts:
        raise BadInput(f'{where}: weights of another network: {"; ".join(texts)}')
