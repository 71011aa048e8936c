"""What a run was made with: libraries, device, commit; and how a process is prepared for it."""

import ctypes
import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def git_commit() -> str | None:
    """The commit of this project's files, with `-dirty` where they were changed since; None outside a repository."""
    command = ['git', '-C', str(ROOT), 'describe', '--always', '--dirty', '--exclude', '*', '--abbrev=12']
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def describe_environment(device: torch.device) -> dict:
    """Versions, device and commit, as plain values."""
    return {
        'python': platform.python_version(),
        'torch': str(torch.__version__),
        'torchvision': version('torchvision'),
        'cuda': torch.version.cuda,
        'system': platform.platform(),
        'device': device_name(device),
        'threads': torch.get_num_threads(),
        'commit': git_commit(),
    }


def fingerprint(path: str | Path) -> str:
    """The first 16 digits of a file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def prepare(device: torch.device, deterministic: bool = False) -> None:
    """Prepare this process for many steps: the fastest kernels, or on a GPU only those that give the same bits each
    time (on a CPU all that are used here do), and memory that is kept from step to step.
    """
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    if device.type == 'cpu':
        keep_freed_memory()


def device_name(device: torch.device) -> str:
    """Name of a GPU, or of the processor with its family and model, where the system tells them: virtual machines may
    call several generations by one name.
    """
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        first = Path('/proc/cpuinfo').read_text().split('\n\n', 1)[0]
        said = dict(re.split(r'\s*:\s*', line, maxsplit=1) for line in first.splitlines() if ':' in line)
        kind = [f'{word} {said[key]}' for word, key in (('family', 'cpu family'), ('model', 'model')) if key in said]
        return ', '.join([said['model name'], *kind])
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep all memory that is freed for the next step, instead of handing it back.

    What is handed back comes again page by page, each with a fault and filled with zeros: a quarter of a training step
    on a CPU, and up to a third of a forward pass, by the layout of the heap. The process stays as large as it ever was.
    No effect without glibc.
    """
    if libc := _libc():
        libc.mallopt(MALLOC_MMAP_MAX, 0)  # large tensors too come from the heap that is kept
        libc.mallopt(MALLOC_TRIM_THRESHOLD, 2**31 - 1)


def _libc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if not hasattr(libc, 'mallopt'):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    return libc
