"""Files that are written whole or not at all, and checkpoints that cannot run code."""

import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tools.errors import BadInput


def write_atomic(path: str | Path, write) -> None:
    """Call `write(binary file)` on a temporary file beside `path`, sync it to disk, then rename it to `path`."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent or Path('.'), prefix=f'.{path.name}.')
    try:
        with os.fdopen(handle, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent or Path('.'), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_atomic(path, lambda f: f.write(text.encode()))


def save_checkpoint(data: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint whole or not at all."""
    write_atomic(path, lambda f: torch.save(data, f))


def load_checkpoint(path: str | Path, device: torch.device | str = 'cpu') -> Any:
    """Read a checkpoint of tensors and plain values; nothing in the file is executed.

    Raises:
        BadInput: no such file, damaged, or it holds other objects than tensors, numbers, strings and containers.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise BadInput(f'{path}: cannot be read as a checkpoint ({reason})') from e


def strip_module_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict without the `module.` that data-parallel wrappers put before each name."""
    return {name.removeprefix('module.'): value for name, value in state.items()}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a data-parallel wrapper, or the model itself."""
    return model.module if hasattr(model, 'module') else model


def load_weights(model: nn.Module, path: str | Path, device: torch.device | str = 'cpu') -> None:
    """Load a network's weights: a plain state dict or a checkpoint with `state_dict`, with or without `module.`.

    Raises:
        BadInput: unreadable, or of another network; the message counts and names what does not fit.
    """
    checkpoint = load_checkpoint(path, device)
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get('state_dict'), dict):
        checkpoint = checkpoint['state_dict']
    if not isinstance(checkpoint, dict) or not all(isinstance(value, Tensor) for value in checkpoint.values()):
        raise BadInput(f'{path}: holds no state dict of tensors')
    state, wanted = strip_module_prefix(checkpoint), model.state_dict()
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
        raise BadInput(f'{path}: weights of another network: {"; ".join(filter(None, problems))}')
    model.load_state_dict(state)


def _name_some(what: str, names: list[str]) -> str:
    if not names:
        return ''
    return f'{len(names)} {what} ({", ".join(names[:3])}{", ..." if len(names) > 3 else ""})'
