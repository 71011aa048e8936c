"""What a run was made with: libraries, device, commit, kernels."""

import hashlib
import os
import platform
import subprocess
from pathlib import Path

import torch
import torchvision

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
        'torchvision': str(torchvision.__version__),
        'cuda': torch.version.cuda,
        'system': platform.platform(),
        'device': device_name(device),
        'threads': torch.get_num_threads(),
        'commit': git_commit(),
    }


def fingerprint(path: str | Path) -> str:
    """The first 16 digits of a file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def choose_kernels(deterministic: bool) -> None:
    """Let torch take the fastest kernels on a GPU, or only those that give the same bits each time.

    On a CPU all kernels used here do.
    """
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
