"""Environment of a run (libraries, device, commit), and settings of its process."""

import ctypes
import hashlib
import logging
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

log = logging.getLogger('tf-nas')

ROOT = Path(__file__).resolve().parent.parent


def git_commit() -> str | None:
    """Return the commit of this project, with `-dirty` if files have changed since; None outside a repository."""
    command = ['git', '-C', str(ROOT), 'describe', '--always', '--dirty', '--exclude', '*', '--abbrev=12']
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def describe_environment(device: torch.device) -> dict:
    """Return versions, device and commit, as plain values."""
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
    """Return the first 16 hex digits of a file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def prepare(
    device: torch.device, deterministic: bool = False, *, tf32: bool = True, shapes_change: bool = False
) -> None:
    """Set up this process for many steps: fastest kernels, and on a CPU memory that is kept from step to step.

    Args:
        deterministic: instead use only kernels that give the same bits each time. On a CPU all used here do.
        tf32: compute float32 products and convolutions of a GPU in TF32, with 10 bits of mantissa instead of 23.
        shapes_change: the convolutions get new shapes all the time, as in a search, whose widths change. Then cuDNN
            chooses kernels by its heuristics: a new shape takes a seventh of a second on average, and 2.4 times as long
            if ten kernels are tried out. A search has some 290 new shapes an epoch (docs/gpu.md).
    """
    set_tf32(tf32)
    torch.backends.cudnn.benchmark = not (deterministic or shapes_change)
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when CUDA starts
        torch.utils.deterministic.fill_uninitialized_memory = False  # else one more kernel for each torch.empty
    if device.type == 'cpu':
        keep_freed_memory()


INDEXED = 2**31  # elements of a tensor from which cuDNN's fast kernels, which count in 32 bits, do not take it


def note_large_tensors(elements: int, images: int, device: torch.device) -> None:
    """Log if the largest activation on a GPU is too large for its fast kernels.

    Args:
        elements: of the largest activation of one image.
        images: of a batch, on each GPU.
    """
    if device.type == 'cuda' and elements * images >= INDEXED:
        text = 'slow: with %d images on each GPU an activation has 2^31 elements or more; at most %d avoid that'
        log.warning(text, images, (INDEXED - 1) // elements)


def set_tf32(enabled: bool) -> None:
    """Set one precision for matrix products and convolutions; torch's defaults differ."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, 'fp32_precision'):
        matmul.fp32_precision = cudnn.conv.fp32_precision = 'tf32' if enabled else 'ieee'
    else:  # torch before 2.9
        matmul.allow_tf32 = cudnn.allow_tf32 = enabled


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor with its family and model if the system lists them.

    Virtual machines may give several processor generations one name.
    """
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        first = Path('/proc/cpuinfo').read_text().split('\n\n', 1)[0]
        info = dict(re.split(r'\s*:\s*', line, maxsplit=1) for line in first.splitlines() if ':' in line)
        kind = [f'{word} {info[key]}' for word, key in (('family', 'cpu family'), ('model', 'model')) if key in info]
        return ', '.join([info['model name'], *kind])
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def keep_freed_memory() -> None:
    """Make glibc's allocator keep freed memory for the next step instead of returning it to the system.

    Returned memory costs a page fault and zeroing per page when it is allocated again: a quarter of a training step on
    a CPU, and up to a third of a forward pass, depending on the layout of the heap. The process does not shrink. No
    effect without glibc.
    """
    if libc := _libc():
        libc.mallopt(MALLOC_MMAP_MAX, 0)  # allocate large tensors on the heap too
        libc.mallopt(MALLOC_TRIM_THRESHOLD, 2**31 - 1)


def _libc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if not hasattr(libc, 'mallopt'):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    return libc
