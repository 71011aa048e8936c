"""A small network, small images, and ways to start, watch and kill training runs; shared by the tests of training."""

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import train_eval_amp
from models.config import ConvSpec, LinearSpec, MBSpec, NetworkConfig, dump_config
from tools.run import read_run

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 3


def small_config(batch_norm=True):
    """A network of three blocks, one of them with a residual, one with squeeze-excitation."""
    rest = {} if batch_norm else {'use_bn': False, 'bias': True}
    return NetworkConfig(
        ConvSpec(3, 2, 3, 8, 'relu', **rest),
        MBSpec(8, 8, 4, 8, 3, 1, 'relu', **rest),
        {
            'stage1': [MBSpec(8, 16, 0, 12, 3, 2, 'swish', **rest)],
            'stage2': [MBSpec(12, 24, 12, 12, 5, 1, 'swish', **rest)],
        },
        ConvSpec(1, 1, 12, 24, 'swish', **rest),
        LinearSpec(24, CLASSES),
    )


def make_data(folder):
    """40 training and 19 validation images of three colours; lists, and the config of the small network."""
    rng, lines = np.random.default_rng(0), []
    for label, colour in enumerate([(160, 90, 90), (90, 160, 90), (90, 90, 160)]):
        (folder / f'class {label}').mkdir()
        for i in range(20):
            pixels = np.clip(np.array(colour) + rng.normal(0, 60, (36, 36, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f'class {label}' / f'{i}.png')
            lines.append(f'class {label}/{i}.png {label}')
    random.Random(0).shuffle(lines)
    (folder / 'train.txt').write_text('\n'.join(lines[:40]) + '\n')
    (folder / 'val.txt').write_text('\n'.join(lines[40:59]) + '\n')
    (folder / 'small.config').write_text(dump_config(small_config()))
    (folder / 'plain.config').write_text(dump_config(small_config(batch_norm=False)))
    return folder


def flags(data, save, **changes):
    """Flags of a training run as a list of words: 10 batches of 4 images an epoch, two epochs."""
    chosen = {
        'train_root': data,
        'val_root': data,
        'train_list': data / 'train.txt',
        'val_list': data / 'val.txt',
        'config_path': data / 'small.config',
        'save': save,
        'num_classes': CLASSES,
        'img_size': 32,
        'batch_size': 4,
        'workers': 0,
        'epochs': 2,
        'lr': 0.05,
        'print_freq': 1,
        'device': 'cpu',
    } | changes
    words = ['--no-report']
    for name, value in chosen.items():
        words += [f'--{name}'] if value is True else [] if value is None else [f'--{name}', str(value)]
    return words


def command(script, words, processes=1, launcher='torch.distributed.run', options=()):
    """The command line of a run of one or many processes."""
    if processes == 1:
        return [sys.executable, script, *words]
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    launch = [f'--nproc_per_node={processes}', f'--master_port={port}', *options]
    return [sys.executable, '-m', launcher, *launch, script, *words]


def start(words, cwd=ROOT, **environment):
    """Start a command in a session of its own, its output in a pipe. `cwd`: another copy of the project."""
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'} | environment
    return subprocess.Popen(
        list(map(str, words)),
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, code=0):
    """Wait for the end of a process; returns the rest of its output."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, f'ended with {process.returncode}:\n{output}'
    return output


def run(script, words, code=0, environment=None, **launch):
    """Run a script to its end; returns its output."""
    return finish(start(command(script, words, **launch), **(environment or {})), code)


def wait_for_steps(process, steps):
    """Read the output of a run until it has logged so many steps; returns what was read."""
    lines = []
    while steps > 0 and (line := process.stdout.readline()):
        lines.append(line)
        steps -= ' step ' in line and ' images/s ' in line
    return ''.join(lines)


def ranks_of(process):
    """The pids of the training processes under a launcher, by rank."""
    ranks = {}
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            words = (entry / 'environ').read_bytes().split(b'\0')
            parent = int((entry / 'stat').read_text().rsplit(')', 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if parent == process.pid:
            ranks |= {int(word[5:]): int(entry.name) for word in words if word.startswith(b'RANK=')}
    return ranks


def kill_all(process):
    """SIGKILL a run: the process, or the launcher and its training processes."""
    for pid in [process.pid, *ranks_of(process).values()]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


class Loader(list):
    """Batches in place of a loader."""

    @property
    def sampler(self):
        """As much of an `EpochSampler` as training needs."""
        return self

    def set_epoch(self, epoch, start_batch=0):
        """These batches are the same in every epoch."""
        assert start_batch == 0


def only_run(save):
    """The one run folder under `save`."""
    (folder,) = Path(save).iterdir()
    return folder


def load(path):
    return torch.load(path, weights_only=True)


def leaves(value, name=''):
    """(name, value) of everything in a checkpoint."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None:
        yield name, value
    else:
        for key, inner in items:
            yield from leaves(inner, f'{name}/{key}')


def differences(a, b):
    """Names of what differs between two checkpoints, in any bit, apart from the flags."""
    a, b = (dict(leaves({key: value for key, value in x.items() if key != 'flags'})) for x in (a, b))
    same = {
        name
        for name in a.keys() & b.keys()
        if (torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name])
    }
    return sorted((a.keys() | b.keys()) - same)


def assert_same_end(folder_a, folder_b):
    """Both runs left bit-identical files behind, and the same lines of metrics but for times."""
    for name in ('checkpoint.pth.tar', 'model_best.pth.tar'):
        assert differences(load(folder_a / name), load(folder_b / name)) == []
    assert timeless(folder_a) == timeless(folder_b)


def timeless(folder):
    """The lines of a run's metrics.jsonl after the first: positions of steps, and all but the time of the others."""
    lines = read_run(folder).lines
    return [(x['epoch'], x['step']) if 'step' in x else {key: x[key] for key in x if key != 'time'} for x in lines]


def run_here(monkeypatch, words, code=0):
    """Run train_eval_amp.py in this process, which is faster; returns the run's folder."""
    monkeypatch.setattr(sys, 'argv', ['train_eval_amp.py', *words])
    args = train_eval_amp.get_args()
    assert train_eval_amp.main(args) in (None, code)
    return max(Path(args.save).iterdir(), key=lambda path: path.stat().st_mtime_ns)
