"""What a run was made with: libraries, device, commit."""

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
