"""Atomic writing of files, and reading of checkpoints without running code."""

import argparse
import errno
import json
import os
import re
import secrets
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tools.errors import BadInput

AVERAGE_KEYS = ('state_dict_ema', 'model_ema')
WEIGHT_KEYS = ('state_dict', 'model', 'net', 'model_state_dict', 'weights')
"""Keys of the moving average and of the weights in checkpoints of ours and of common training scripts."""

CLASS_NAMES = 'class_names'
"""Key of the names of the classes in checkpoints: a list of texts by label, or None."""

WRAPPERS = re.compile(r'^((module|_orig_mod|model)\.)+')
"""What data parallelism, torch.compile and Lightning put before each name."""


def write_atomic(path: str | Path, write, before_rename=lambda: None) -> None:
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


def save_checkpoint(data: dict[str, Any], path: str | Path, before_rename=lambda: None) -> None:
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


def previous_of(path: str | Path) -> Path:
    """Return the path of the previous file, such as `checkpoint.previous.pth.tar` for `checkpoint.pth.tar`."""
    path = Path(path)
    stem, _, suffixes = path.name.partition('.')
    return path.with_name(f'{stem}.previous.{suffixes}')


def save_and_keep_previous(data: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint whole or not at all, and keep the previous one. At least one of them exists at any time."""
    path = Path(path)

    def keep() -> None:
        if not path.exists():
            return
        link = path.with_name(f'.{path.name}.link')
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
            os.replace(link, previous_of(path))
        except OSError:  # no hard links: for a moment only the previous file exists
            os.replace(path, previous_of(path))

    save_checkpoint(data, path, keep)


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
        if whole and zipfile.is_zipfile(path):  # torch writes checksums but does not look at them
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f'{damaged} is damaged')
        with warnings.catch_warnings(), torch.serialization.safe_globals(STAND_INS):
            warnings.simplefilter('ignore')  # of torch, on files that are no pickles
            return torch.load(path, map_location='cpu', weights_only=True, mmap=not whole and zipfile.is_zipfile(path))
    except Exception as e:  # a damaged file can raise anything at all
        if found := re.search(r'unsupported (?:global|class|type)\S* (?:global )?([\w.]+)', str(e), re.IGNORECASE):
            reason = f'it holds a {found[1]}; only tensors, numbers, strings and containers of them are read'
        else:
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            if reason.startswith('Weights only load failed'):  # torch's advice is to run the file's code
                reason = 'it holds more than tensors, numbers, strings and containers of them'
        raise BadInput(f'{path}: cannot be read as a checkpoint ({reason})') from e


class _NumpyDtype:
    """Stand-in for numpy.dtype, as far as scalars of checkpoints need it."""

    def __init__(self, code: str, *_):
        self.code, self.order = code, '='

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def _numpy_scalar(dtype: _NumpyDtype, data: bytes | str) -> bool | int | float:
    """Stand-in for NumPy's function of that name: the number alone."""
    kind = np.dtype(dtype.order.replace('|', '') + dtype.code)
    if kind.kind not in 'biuf':
        raise ValueError(f'a NumPy scalar of type {dtype.code} is no number')
    return np.frombuffer(data.encode('latin1') if isinstance(data, str) else data, kind)[0].item()


STAND_INS = [
    argparse.Namespace,
    (_NumpyDtype, 'numpy.dtype'),
    (_numpy_scalar, 'numpy._core.multiarray.scalar'),
    (_numpy_scalar, 'numpy.core.multiarray.scalar'),
]
"""Types that other programs store beside the weights; none of them runs anything of the file."""


def _read_safetensors(path: str | Path) -> dict[str, Any]:
    """Return the weights, and the file's metadata as plain values."""
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file
    except ImportError as e:
        raise BadInput(f'{path}: reading it needs a package that is not here: pip install safetensors') from e
    try:
        with safe_open(path, 'pt') as file:
            texts = file.metadata() or {}
        return {'state_dict': load_file(path), 'meta': {name: _from_json(text) for name, text in texts.items()}}
    except SafetensorError as e:
        raise ValueError(str(e)) from e


def _from_json(text: str) -> Any:
    """Return a value of JSON; None for other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def strip_module_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict without the names of wrappers, such as `module.`, before each name."""
    return {WRAPPERS.sub('', name): value for name, value in state.items()}


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
    keys = (*AVERAGE_KEYS, *WEIGHT_KEYS) if average else WEIGHT_KEYS
    key = next((key for key in keys if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict)), '')
    state = checkpoint[key] if key else checkpoint
    if not isinstance(state, dict) or not state or not all(map(_is_weight, state.items())):
        raise BadInput(f'{path}: holds no state dict of tensors')
    state = {name: value for name, value in strip_module_prefix(state).items() if name != 'n_averaged'}
    return Weights(state, key, {name: value for name, value in checkpoint.items() if name != key} if key else {})


def _is_weight(item: tuple) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


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
    problems = [
        _name_some('missing', [name for name in wanted if name not in state]),
        _name_some('unexpected', [name for name in state if name not in wanted]),
        _name_some(
            'wrong shape',
            [
                f'{name} {list(state[name].shape)} for {list(value.shape)}'
                for name, value in wanted.items()
                if name in state and state[name].shape != value.shape
            ],
        ),
    ]
    if any(problems):
        raise BadInput(f'{where}: weights of another network: {"; ".join(filter(None, problems))}')


def _name_some(what: str, names: list[str]) -> str:
    if not names:
        return ''
    return f'{len(names)} {what} ({", ".join(names[:3])}{", ..." if len(names) > 3 else ""})'
