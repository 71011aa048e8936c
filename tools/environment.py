"""What a run was made with: libraries, device, commit; and how a process is prepared for it."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from tools.memory import keep_freed_memory
from tools.profiling import device_name

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
